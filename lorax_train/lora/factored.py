"""A weight and its low-rank update as one value that can be looked at anew.

`transform` follows such a value through a function. What only rearranges a
weight (transpose, reshape, slices ...) rearranges W and the factors alike, so
the sum W + scale * A^T B is never formed.

Axis letters: R rank. Each dimension of W is a stack, an in or an out axis
('s', 'i', 'o'), and is an axis of the factors too: A is [*stack, R, *in],
B [*stack, R, *out], scale [*stack] and gain [*stack, *out], each in the order
W has them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
_ARRAYS = ('w', 'a', 'b', 'scale', 'gain', 'rate', 'key')
# The letter of the rank axis; those of W's dimensions are lower-case.
RANK = '*'


class NoRule(Exception):
  """The operation has no low-rank form; the message says why."""


@partial(
  jax.tree_util.register_dataclass,
  data_fields=list(_ARRAYS),
  meta_fields=['n_dropped', 'axes', 'path', 'dtype'],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
  """gain * (W + scale * A^T B), unformed.

  Attributes:
    w: any shape.
    a: [*stack, R, *in] float32.
    b: [*stack, R, *out] float32.
    scale: [*stack] float32.
    gain: [*stack, *out] float32, what DoRA brings the sum's columns to their
      lengths with; None without it.
    rate: [*stack] dropout rate; None without dropout.
    key: [*stack] typed PRNG keys; None without dropout.
    n_dropped: how many rows of the rank see dropout, where it is on; those
      after them are a frozen pair, which is part of the base.
    axes: the kind of each dimension of w, as in `Fixed.axes`.
    path: of the parameter, for messages.
    dtype: what w counts as. A cast waits until w is used: a scan would save
      the cast copy of every layer for the backward pass.
  """

  w: Array
  a: Array
  b: Array
  scale: Array
  gain: Array | None
  rate: Array | None
  key: Array | None
  n_dropped: int
  axes: str
  path: str
  dtype: Any

  def letters(self, kind: str) -> str:
    """Letters of the dimensions of a kind, in order; dimension 0 is 'a'."""
    return ''.join(
      chr(ord('a') + d) for d, k in enumerate(self.axes) if k == kind
    )

  @property
  def w_letters(self) -> str:
    """Letters of all dimensions."""
    return ''.join(chr(ord('a') + d) for d in range(len(self.axes)))

  @property
  def a_letters(self) -> str:
    """Letters of A's axes."""
    return self.letters('s') + RANK + self.letters('i')

  @property
  def b_letters(self) -> str:
    """Letters of B's axes."""
    return self.letters('s') + RANK + self.letters('o')

  @property
  def gain_letters(self) -> str:
    """Letters of the gain's axes."""
    return self.letters('s') + self.letters('o')

  def total(self) -> Array:
    """The sum, formed: what everything else here avoids."""
    wide = jnp.promote_types(self.w.dtype, jnp.float32)
    a = self.a.astype(wide)
    a = a * aligned(self.scale.astype(wide), self.letters('s'), self.a_letters)
    with jax.default_matmul_precision('highest'):
      delta = contract(
        a, self.a_letters, self.b.astype(wide), self.b_letters, self.w_letters
      )
    total = self.w.astype(wide) + delta
    if self.gain is not None:
      gain = aligned(self.gain, self.gain_letters, self.w_letters)
      total = gain.astype(wide) * total
    return total.astype(self.w.dtype).astype(self.dtype)


def contract(
  x: Array,
  x_letters: str,
  y: Array,
  y_letters: str,
  letters: str,
  precision: Any = None,
  out_dtype: Any = None,
) -> Array:
  """The einsum `x_letters,y_letters->letters` as one dot_general.

  >>> contract(jnp.ones((2, 3)), 'ab', jnp.ones((4, 3)), 'cb', 'ca').shape
  (4, 2)
  """
  shared = [c for c in x_letters if c in y_letters]
  batch = [c for c in shared if c in letters]
  inner = [c for c in shared if c not in letters]

  def places(part):
    return [x_letters.index(c) for c in part], [
      y_letters.index(c) for c in part
    ]

  dims = places(inner), places(batch)
  z = lax.dot_general(x, y, dims, precision, out_dtype)
  free = [c for c in x_letters + y_letters if c not in shared]
  return arranged(z, ''.join(batch + free), letters)


def arranged(x: Array, letters: str, wanted: str) -> Array:
  """x transposed from the order `letters` to the order `wanted`."""
  if letters == wanted:
    return x
  return jnp.transpose(x, [letters.index(c) for c in wanted])


def aligned(x: Array, letters: str, wanted: str) -> Array:
  """x with its axes where `wanted` has them, and size 1 elsewhere."""
  order = [c for c in wanted if c in letters]
  sizes = dict(zip(letters, x.shape, strict=True))
  x = arranged(x, letters, ''.join(order))
  return x.reshape([sizes.get(c, 1) for c in wanted])


def on_axes(
  value: Factored, dim: int, change: Callable[[Array, int], Array]
) -> dict[str, Array]:
  """`change(array, axis)` of each factor that has dimension `dim` of W."""
  kind = value.axes[dim]
  axis = value.axes[:dim].count(kind)
  past_stack = value.axes.count('s') + axis
  where = {
    's': dict.fromkeys(_ARRAYS[1:], axis),
    'i': {'a': past_stack + 1},
    'o': {'b': past_stack + 1, 'gain': past_stack},
  }[kind]
  return {
    name: change(getattr(value, name), at)
    for name, at in where.items()
    if getattr(value, name) is not None
  }


def changed(
  value: Factored, dim: int, change: Callable[[Array, int], Array]
) -> Factored:
  """The same change to the axis `dim` of every factor that has it."""
  return dataclasses.replace(value, **on_axes(value, dim, change))


def without(value: Factored, dim: int) -> Factored:
  """Factors without the dimension `dim`, which has size 1."""
  value = changed(value, dim, lambda x, axis: lax.squeeze(x, (axis,)))
  axes = value.axes[:dim] + value.axes[dim + 1 :]
  return dataclasses.replace(value, axes=axes)


def widened(value: Factored, dim: int, size: int, kind: str = 's') -> Factored:
  """Factors with a further dimension before `dim`, the same all along it."""
  axes = value.axes[:dim] + kind + value.axes[dim:]
  value = dataclasses.replace(value, axes=axes)
  return changed(value, dim, partial(_repeat_new, size))


def _repeat_new(size: int, x: Array, axis: int) -> Array:
  kept = [d for d in range(x.ndim + 1) if d != axis]
  shape = (*x.shape[:axis], size, *x.shape[axis:])
  return lax.broadcast_in_dim(x, shape, kept)


def as_kind(value: Factored, dim: int, kind: str) -> Factored:
  """A dimension of size 1 counted as one of another kind."""
  if value.axes[dim] == kind or value.w.shape[dim] != 1:
    return value
  return widened(without(value, dim), dim, 1, kind)


def transposed(value: Factored, order: Sequence[int]) -> Factored:
  """Factors in the order that W's dimensions have after a transpose."""
  axes = ''.join(value.axes[d] for d in order)

  def ranked(kind):
    old = [d for d, k in enumerate(value.axes) if k == kind]
    return [old.index(d) for d in order if value.axes[d] == kind]

  stack, n = ranked('s'), value.axes.count('s')

  def moved(x, own=(), rank=()):
    after = n + len(rank)
    perm = [*stack, *rank, *(after + d for d in own)]
    return x if x is None or perm == sorted(perm) else jnp.transpose(x, perm)

  return dataclasses.replace(
    value,
    a=moved(value.a, ranked('i'), [n]),
    b=moved(value.b, ranked('o'), [n]),
    scale=moved(value.scale),
    gain=moved(value.gain, ranked('o')),
    rate=moved(value.rate),
    key=moved(value.key),
    axes=axes,
  )


def reshaped(value: Factored, sizes: Sequence[int]) -> Factored:
  """Factors after a reshape of W that mixes no in, out and stack axes.

  Dimensions of size 1 come and go freely; new ones count as stack axes.

  Raises:
    NoRule: dimensions of two kinds would be merged.
  """
  if 0 in sizes:
    raise NoRule('it is empty')
  for dim in reversed(range(len(value.axes))):
    if value.w.shape[dim] == 1:
      value = without(value, dim)
  old = [n for n in value_shape(value) if n != 1]
  new = [n for n in sizes if n != 1]
  axes = _regrouped(value.axes, old, new)
  if axes is None:
    raise NoRule(f'it merges axes of different kinds ({value.axes})')
  by_kind = {
    kind: [n for n, k in zip(new, axes, strict=True) if k == kind]
    for kind in 'sio'
  }
  stack, rank = by_kind['s'], value.a.shape[value.axes.count('s')]

  def shaped(x, *rest):
    return None if x is None else x.reshape((*stack, *rest))

  value = dataclasses.replace(
    value,
    a=shaped(value.a, rank, *by_kind['i']),
    b=shaped(value.b, rank, *by_kind['o']),
    scale=shaped(value.scale),
    gain=shaped(value.gain, *by_kind['o']),
    rate=shaped(value.rate),
    key=shaped(value.key),
    axes=axes,
  )
  for dim, n in enumerate(sizes):
    if n == 1:
      value = widened(value, dim, 1)
  return value


def value_shape(value: Factored) -> list[int]:
  """W's shape as the factors have it."""
  n = value.axes.count('s')
  left = {
    's': list(value.scale.shape),
    'i': list(value.a.shape[n + 1 :]),
    'o': list(value.b.shape[n + 1 :]),
  }
  return [left[kind].pop(0) for kind in value.axes]


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
  """Which dimensions of a reshape become which; no sizes of 1 or 0.

  >>> groups([4, 6], [4, 2, 3])
  [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3))]
  """
  found, i, j = [], 0, 0
  while i < len(old):
    to_i, to_j = i + 1, j + 1
    while math.prod(old[i:to_i]) != math.prod(new[j:to_j]):
      if math.prod(old[i:to_i]) < math.prod(new[j:to_j]):
        to_i += 1
      else:
        to_j += 1
    found.append((range(i, to_i), range(j, to_j)))
    i, j = to_i, to_j
  return found


def _regrouped(axes: str, old: Sequence[int], new: Sequence[int]) -> str | None:
  """Kinds of the new dimensions; None if kinds were mixed."""
  out = ''
  for before, after in groups(old, new):
    kinds = {axes[d] for d in before}
    if len(kinds) > 1:
      return None
    out += kinds.pop() * len(after)
  return out
