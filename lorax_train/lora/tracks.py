"""Where the axes of a parameter go: what `layout` knows of primitives.

`USES` are the primitives that contract or look up: a letter for each dimension
they are given. `VIEWS` are those that look at a value anew: where its
dimensions come from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from lorax_train.lora.factored import groups

Axes = frozenset[int]
NONE: Axes = frozenset()


@dataclasses.dataclass(frozen=True)
class View:
  """A parameter, or what has become of it.

  Attributes:
    path: of the parameter.
    shape: of the parameter.
    dims: the parameter's axes that each dimension of this value is made of.
    stack: axes of which this value is one index.
  """

  path: str
  shape: tuple[int, ...]
  dims: tuple[Axes, ...]
  stack: Axes = NONE

  def indexed(self, dim: int) -> 'View':
    """One index of a dimension."""
    real = {axis for axis in self.dims[dim] if self.shape[axis] > 1}
    return dataclasses.replace(
      self,
      dims=self.dims[:dim] + self.dims[dim + 1 :],
      stack=self.stack | real,
    )

  def widened(self, dim: int) -> 'View':
    """A further dimension, which is no axis of the parameter."""
    dims = (*self.dims[:dim], NONE, *self.dims[dim:])
    return dataclasses.replace(self, dims=dims)


def _of_dot(eqn: Any, side: int, value: View) -> str | None:
  inner, batch = eqn.params['dimension_numbers']
  return ''.join(
    'i' if d in inner[side] else 's' if d in batch[side] else 'o'
    for d in range(len(value.dims))
  )


def _of_conv(eqn: Any, side: int, value: View) -> str | None:
  if side != 1 or eqn.params['batch_group_count'] != 1:
    return None
  kept = eqn.params['dimension_numbers'].rhs_spec[0]
  return ''.join('o' if d == kept else 'i' for d in range(len(value.dims)))


def _of_ragged_dot(eqn: Any, side: int, value: View) -> str | None:
  spec = eqn.params['ragged_dot_dimension_numbers']
  if side != 1:
    return None
  inner, batch = spec.dot_dimension_numbers
  stack = {*spec.rhs_group_dimensions, *batch[1]}
  return ''.join(
    'i' if d in inner[1] else 's' if d in stack else 'o'
    for d in range(len(value.dims))
  )


def _of_gather(eqn: Any, side: int, value: View) -> str | None:
  """A look-up: in a matrix, in a table of several indices, in many tables.

  Indices that leave more than one axis, and start at the first, select from a
  stack of weights: that is no use yet.
  """
  spec, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  ndim, batch = len(value.dims), spec.operand_batching_dims
  if side != 0:
    return None
  shape = eqn.invars[0].aval.shape
  index = {d for d, n in enumerate(shape) if sizes[d] < n and d not in batch}
  if not index:
    return None
  tables = {*batch, *range(min(index))} if max(index) == ndim - 2 else {*batch}
  if ndim - len(index) - len(tables) != 1:
    return None
  return ''.join(
    'i' if d in index else 's' if d in tables else 'o' for d in range(ndim)
  )


def _selected(eqn: Any, value: View) -> View:
  """What a gather selects of a stack of weights."""
  spec = eqn.params['dimension_numbers']
  for dim in sorted(
    {*spec.collapsed_slice_dims, *spec.operand_batching_dims}, reverse=True
  ):
    value = value.indexed(dim)
  kept = iter(value.dims)
  ndim = len(eqn.outvars[0].aval.shape)
  dims = [
    next(kept, NONE) if d in spec.offset_dims else NONE for d in range(ndim)
  ]
  return dataclasses.replace(value, dims=tuple(dims))


def _transposed(eqn: Any, value: View) -> View:
  dims = tuple(value.dims[d] for d in eqn.params['permutation'])
  return dataclasses.replace(value, dims=dims)


def _reshaped(eqn: Any, value: View) -> View:
  old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  if 0 in old or eqn.params['dimensions'] is not None:
    return dataclasses.replace(value, dims=(NONE,) * len(new))
  for dim in reversed(range(len(old))):
    if old[dim] == 1:
      value = value.indexed(dim)
  dims: list[Axes] = []
  pairs = groups([n for n in old if n != 1], [n for n in new if n != 1])
  for before, after in pairs:
    merged = NONE.union(*(value.dims[d] for d in before))
    dims += [merged] * len(after)
  real = iter(dims)
  return dataclasses.replace(
    value, dims=tuple(NONE if n == 1 else next(real) for n in new)
  )


def _squeezed(eqn: Any, value: View) -> View:
  for dim in sorted(eqn.params['dimensions'], reverse=True):
    value = value.indexed(dim)
  return value


def _broadcast(eqn: Any, value: View) -> View:
  dims = [NONE] * len(eqn.params['shape'])
  for old, new in enumerate(eqn.params['broadcast_dimensions']):
    dims[new] = value.dims[old]
  return dataclasses.replace(value, dims=tuple(dims))


def _unchanged(eqn: Any, value: View) -> View:
  return value


USES: dict[str, Callable[[Any, int, View], str | None]] = {
  'conv_general_dilated': _of_conv,
  'dot_general': _of_dot,
  'gather': _of_gather,
  'ragged_dot_general': _of_ragged_dot,
}
VIEWS: dict[str, Callable[[Any, View], View]] = {
  'broadcast_in_dim': _broadcast,
  'gather': _selected,
  'reshape': _reshaped,
  'squeeze': _squeezed,
  'transpose': _transposed,
  **dict.fromkeys(
    ('convert_element_type', 'copy', 'copy_p', 'dynamic_slice',
     'name', 'neg', 'pvary', 'rev', 'sharding_constraint', 'slice',
     'stop_gradient'),
    _unchanged,
  ),
}  # fmt: skip
