"""The weight protocol, and LoRA behind it.

A model uses a weight `w` in four ways only: `x @ w`, `w[ids]`, `w.T` and
`w.shape` / `w.dtype` (plus `apply_to` where it wants another result dtype).
A plain array does these by itself; `LoraWeight` does them as W + scale * A^T B
without ever forming that sum (Hu et al. 2021, equation 3).

Axis letters: R rank. `in` and `out` are the axes that `x @ w` contracts and
keeps. Every array of a weight carries the stack axes (those of a layer scan)
in front, because a scan slices every leaf.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any


@typing.dataclass_transform(frozen_default=True, eq_default=False)
def _node(*data: str, static: tuple[str, ...] = ()):
  """A frozen dataclass that is a pytree node."""

  def wrap(cls):
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    return jax.tree_util.register_dataclass(
      cls, data_fields=list(data), meta_fields=list(static)
    )

  return wrap


@_node('w', 'scale', 'rate', static=('ranks',))
class Fixed:
  """The frozen half of an adapted leaf.

  Attributes:
    w: [*stack, in, out], an array or anything with the weight protocol.
    scale: [*stack] float32: alpha / r, or alpha / sqrt(r) for rsLoRA; 0 where
      the stack index has no adapter.
    rate: [*stack] float32 dropout rate, None without dropout.
    ranks: the true rank of each stack index, row-major. Static: counts and
      export need it, the arithmetic doesn't (factors are padded with zeros).
  """

  w: Array
  scale: Array
  rate: Array | None
  ranks: tuple[int, ...]


@_node('a', 'b')
class Adapter:
  """The trainable half: A [*stack, R, in] and B [*stack, R, out], float32.

  A is in PEFT's layout and B in its transpose. Rows past a stack index's true
  rank are zero in both, and stay exactly zero under any elementwise optimizer:
  each one's gradient is a product with the other.
  """

  a: Array
  b: Array


@_node('w', 'a', 'b', 'scale', 'rate', 'key')
class LoraWeight:
  """W and its low-rank update, behaving as the sum under the protocol.

  `key` ([*stack] typed PRNG keys) turns dropout on: it falls on the input of
  A only, as in the paper and in PEFT.
  """

  w: Array
  a: Array
  b: Array
  scale: Array
  rate: Array | None = None
  key: Array | None = None

  # numpy must hand `x @ weight` to us instead of trying elementwise.
  __array_ufunc__ = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of W."""
    return self.w.shape

  @property
  def ndim(self) -> int:
    """Number of axes of W."""
    return len(self.w.shape)

  @property
  def dtype(self) -> Any:
    """Dtype W is stored in."""
    return self.w.dtype

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x @ (W + scale A^T B) as x @ W + ((x A^T) scale) B.

    Args:
      x: [..., in]; the factors are cast to its dtype here, inside whatever
        scan we are in, so no second copy of all the adapters exists.
      out_dtype: dtype of the result and of the sums; None keeps x's.

    Returns:
      [..., out].
    """
    base = product(x, self.w, out_dtype)
    if self.key is not None and self.rate is not None:
      x = _dropped(x, self.key, self.rate)
    u = _contract(x, self.a.astype(x.dtype), -1)
    u = u * _over_rank(self.scale, u).astype(u.dtype)
    return base + _contract(u, self.b.astype(x.dtype), -2, out_dtype)

  def __rmatmul__(self, x: Array) -> Array:
    return self.apply_to(x)

  def __getitem__(self, ids: Array) -> Array:
    """Rows of W + scale A^T B: the embedding look-up, [..., out]."""
    if len(self.shape) != 2:
      raise ValueError(f'look-up in a stacked weight of shape {self.shape}')
    rows = self.w[ids]
    u = jnp.moveaxis(self.a[:, ids], 0, -1) * self.scale
    return rows + _contract(u, self.b, -2).astype(rows.dtype)

  @property
  def T(self) -> 'LoraWeight':
    """The transpose: A and B change places. Dropout has no meaning there."""
    if self.key is not None:
      raise ValueError('a transposed adapter has no input to drop from')
    return LoraWeight(
      w=jnp.swapaxes(self.w, -1, -2), a=self.b, b=self.a, scale=self.scale
    )


def _dropped(x: Array, key: Array, rate: Array) -> Array:
  """Inverted dropout of x, one mask an adapter."""
  if rate.ndim:
    raise ValueError('dropout needs one layer at a time: scan the stack')
  keep = 1.0 - rate
  mask = jax.random.bernoulli(key, keep, x.shape)
  return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros_like(x))


def product(x: Array, w: Array, out_dtype: Any = None) -> Array:
  """x @ w for a plain array or for anything with `apply_to`.

  A weight stored in another dtype is cast for the product alone and cast
  again in the backward pass: saved instead, the casts of all the layers of a
  scan would be a second copy of the model.
  """
  if hasattr(w, 'apply_to'):
    return w.apply_to(x, out_dtype)
  if w.dtype == x.dtype:
    return _contract(x, w, -2, out_dtype)

  @jax.checkpoint
  def cast_product(x, w):
    return _contract(x, w.astype(x.dtype), -2, out_dtype)

  return cast_product(x, w)


def _contract(x: Array, w: Array, axis: int, out_dtype: Any = None) -> Array:
  """x's last axis against w's `axis`; leading axes of w are batch axes.

  Written as one dot_general: its derivative in w is then g^T x, with the rank
  in front, which runs many times faster on CPU than x^T g.
  """
  batch = tuple(range(w.ndim - 2))
  if batch and x.shape[: len(batch)] != w.shape[: len(batch)]:
    raise ValueError(
      f'x of shape {x.shape} does not line up with a stack of weights of'
      f' shape {w.shape}'
    )
  dims = (((x.ndim - 1,), (w.ndim + axis,)), (batch, batch))
  return lax.dot_general(x, w, dims, preferred_element_type=out_dtype)


def _over_rank(scale: Array, u: Array) -> Array:
  """scale [*stack] with axes of size 1 until it broadcasts over u [..., R]."""
  return scale.reshape(scale.shape + (1,) * (u.ndim - scale.ndim))
