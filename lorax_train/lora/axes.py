"""What the axes of a leaf are to the function that uses it.

A letter an axis: `s` stack (each index has an adapter of its own: the layers of
a scan, the experts of a mixture), `i` contracted with the input (in), `o` kept
(out). A dense kernel is 'io', that of a layer scan 'sio'; an einsum's [D, N, H]
is 'ioo', its [N, H, D] 'iio'; a convolution's HWIO 'iiio'. In a layout `v` is
an `i` whose entries are looked up: an embedding [V, D] is 'vo'.

Factors have the stack in front, then the rank, then their own axes in the
order of the leaf: A [*stack, R, *in], B [*stack, R, *out].
"""

import math

import jax
import jax.numpy as jnp

MATRIX = 'io'


def default(ndim: int) -> str:
  """[*stack, in, out]."""
  return 's' * (ndim - 2) + MATRIX


def is_matrix(axes: str) -> bool:
  """Whether `x @ w` contracts what there is to contract."""
  return axes.lstrip('s') == MATRIX


def sizes(shape: tuple[int, ...], axes: str, kind: str) -> tuple[int, ...]:
  """Sizes of the axes of a kind, in the order of the leaf.

  >>> sizes((3, 5, 7), 'ioo', 'o')
  (5, 7)
  """
  return tuple(n for n, k in zip(shape, axes, strict=True) if k == kind)


def to_matrices(w: jax.Array, axes: str) -> jax.Array:
  """The leaf as [*stack, in, out], in and out flattened."""
  if is_matrix(axes):
    return w
  stack, n_in, n_out = (sizes(w.shape, axes, kind) for kind in 'sio')
  shape = (*stack, math.prod(n_in), math.prod(n_out))
  return jnp.transpose(w, _order(axes)).reshape(shape)


def from_matrices(m: jax.Array, shape: tuple[int, ...], axes: str) -> jax.Array:
  """What `to_matrices` was given."""
  if is_matrix(axes):
    return m
  order = _order(axes)
  turned = m.reshape([shape[at] for at in order])
  return jnp.transpose(turned, [order.index(i) for i in range(len(order))])


def flatten(x: jax.Array, n_kept: int) -> jax.Array:
  """[*stack, R, *in or *out] as [*stack, R, in or out], kept up to R."""
  kept, flat = x.shape[:n_kept], x.shape[n_kept:]
  return x.reshape(*kept, math.prod(flat))


def unflatten(
  x: jax.Array, shape: tuple[int, ...], axes: str, kind: str
) -> jax.Array:
  """What `flatten` was given: the axes of a kind, of a leaf of this shape."""
  return x.reshape(*x.shape[:-1], *sizes(shape, axes, kind))


def _order(axes: str) -> list[int]:
  """Which axis of the leaf stands where in [*stack, *in, *out]."""
  return [i for kind in 'sio' for i, k in enumerate(axes) if k == kind]
