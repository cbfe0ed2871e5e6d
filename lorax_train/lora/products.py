"""Where a low-rank weight is used up: products, convolutions, look-ups.

Each rule gives `W's result + ((x A) scale) B` for one primitive. Letters are
axis names in the manner of einsum: lower-case ones are dimensions of W,
upper-case ones those of the other operand alone, `*` is the rank.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_train.lora import weight
from lorax_train.lora.equation import run
from lorax_train.lora.factored import (
  RANK,
  Factored,
  NoRule,
  aligned,
  arranged,
  as_kind,
  contract,
)

Array = Any


def dot_general(eqn: Any, values: Sequence[Any]) -> list[Array]:
  """A product that contracts all in axes, all out axes, or some of either."""
  side = _only_weight(values)
  value, x = values[side], values[1 - side]
  inner, batch = eqn.params['dimension_numbers']
  names = list(string.ascii_uppercase[: x.ndim])
  for part in (inner, batch):
    for d, w_d in zip(part[1 - side], part[side], strict=True):
      names[d] = value.w_letters[w_d]
  x_letters = ''.join(names)
  inside = {value.w_letters[d] for d in inner[side]}
  across = [value.w_letters[d] for d in batch[side]]
  pair = (x_letters, value.w_letters)
  first, second = pair if side else pair[::-1]
  free = [c for c in first + second if c not in inside and c not in across]
  letters = ''.join(across + free)

  options = {
    'precision': eqn.params['precision'],
    'out_dtype': eqn.params['preferred_element_type'],
  }
  update = _times(x, x_letters, value, inside, letters, options)
  base = _with_w(eqn, values, side)
  return [base + update.astype(base.dtype)]


def _times(
  x: Array,
  x_letters: str,
  value: Factored,
  inside: set[str],
  letters: str,
  options: dict[str, Any],
) -> Array:
  """x against the update alone, first through the factor that shrinks it."""
  ins, outs = set(value.letters('i')), set(value.letters('o'))
  a, b = (value.a, value.a_letters), (value.b, value.b_letters)
  if ins and ins <= inside:
    first, second = a, b
  elif outs and outs <= inside:
    first, second = b, a
  elif ins & inside:
    first, second = a, b
  elif outs & inside:
    first, second = b, a
  else:
    raise NoRule('it contracts neither an in nor an out axis')
  by_a = first is a and ins <= inside and not outs & inside
  if value.key is not None and not by_a:
    raise NoRule('dropout falls on what A contracts, and here A does not')
  x = dropped(x, value)
  kept = [
    c for c in x_letters if c not in first[1] or c in second[1] or c in letters
  ]
  u_letters = ''.join(kept + [c for c in first[1] if c not in x_letters])
  u = contract(
    x, x_letters, first[0].astype(x.dtype), first[1], u_letters,
    options['precision'],
  )  # fmt: skip
  u = scaled(u, u_letters, value)
  return contract(
    u, u_letters, second[0].astype(x.dtype), second[1], letters, **options
  )


def scaled(u: Array, letters: str, value: Factored) -> Array:
  """u times the scale of each stack index."""
  return u * aligned(value.scale, value.letters('s'), letters).astype(u.dtype)


def dropped(x: Array, value: Factored) -> Array:
  """x as A sees it under the weight's dropout."""
  if value.key is None or value.rate is None:
    return x
  if value.key.ndim:
    raise NoRule('dropout needs one adapter at a time: scan the stack')
  return weight.dropped(x, value.key, value.rate)


def conv_general_dilated(eqn: Any, values: Sequence[Any]) -> list[Array]:
  """A convolution with R output features, then their mixture by B."""
  side = _only_weight(values)
  if side != 1:
    raise NoRule('the weight is convolved, and not the kernel')
  params = dict(eqn.params)
  if params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
    raise NoRule('features are convolved in groups')
  x, value = values
  spec = params['dimension_numbers']
  out_dim = spec.rhs_spec[0]
  for dim in range(len(value.axes)):
    value = as_kind(value, dim, 'o' if dim == out_dim else 'i')
  if value.letters('o') != value.w_letters[out_dim] or value.letters('s'):
    raise NoRule(f'its out axis is not the only one kept ({value.axes})')
  x = dropped(x, value)
  kernel = jnp.moveaxis(value.a.astype(x.dtype), 0, out_dim)
  out_dtype = params.pop('preferred_element_type')
  u = lax.conv_general_dilated(x, kernel, **params)
  u = u * value.scale.astype(u.dtype)
  letters = list(string.ascii_uppercase[: u.ndim])
  letters[spec.out_spec[1]] = RANK
  u_letters = ''.join(letters)
  letters[spec.out_spec[1]] = value.letters('o')
  update = contract(
    u, u_letters, value.b.astype(x.dtype), value.b_letters, ''.join(letters),
    params['precision'], out_dtype,
  )  # fmt: skip
  base = _with_w(eqn, values, side)
  return [base + update.astype(base.dtype)]


def ragged_dot_general(eqn: Any, values: Sequence[Any]) -> list[Array]:
  """Rows in groups, each against the weight of its group (experts)."""
  side = _only_weight(values)
  x, value, sizes, *rest = values
  params = dict(eqn.params)
  spec = params.pop('ragged_dot_dimension_numbers')
  (x_inner, w_inner), batch = spec.dot_dimension_numbers
  kinds = ['o'] * len(value.axes if side == 1 else '')
  for d in w_inner:
    kinds[d] = 'i'
  for d in spec.rhs_group_dimensions:
    kinds[d] = 's'
  if side != 1 or rest or batch[0] or ''.join(kinds) != value.axes:
    raise NoRule('only [group, in, out] weights on the right have a rule')
  if value.key is not None:
    raise NoRule('dropout needs one adapter at a time: scan the stack')

  (ragged,) = spec.lhs_ragged_dimensions
  rows = [d for d in range(x.ndim) if d not in x_inner]
  # The scale is one a group: it goes into B, whose rows are few.
  b = value.b * aligned(value.scale, value.letters('s'), value.b_letters)
  w_to_a = [value.a_letters.index(value.w_letters[d]) for d in w_inner]

  def grouped(x, x_inner, ragged, factor, inner, out_dtype):
    numbers = lax.RaggedDotDimensionNumbers(
      ((tuple(x_inner), tuple(inner)), ((), ())), [ragged], [0]
    )
    factor, precision = factor.astype(x.dtype), params['precision']
    return lax.ragged_dot_general(
      x, factor, sizes, numbers, precision, out_dtype
    )

  u = grouped(x, x_inner, ragged, value.a, w_to_a, None)
  out_dtype = params['preferred_element_type']
  update = grouped(u, [len(rows)], rows.index(ragged), b, [1], out_dtype)
  base = _with_w(eqn, values, side)
  return [base + update.astype(base.dtype)]


def gather(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Rows by index.

  Along in axes it is a look-up and gives an array; along stack or out axes
  it selects adapters or columns, and gives a weight again.
  """
  if isinstance(values[1], Factored):
    raise NoRule('the weight is the index')
  value, ids = values
  spec, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  touched = {
    value.axes[d]
    for d, n in enumerate(value.w.shape)
    if d in spec.collapsed_slice_dims
    or (sizes[d] != n and d not in spec.operand_batching_dims)
  }
  if len(touched) != 1:
    raise NoRule('it indexes axes of different kinds')
  if any(value.axes[d] != 's' for d in spec.operand_batching_dims):
    raise NoRule('it indexes along a batch of in or out axes')
  (kind,) = touched
  rows = _with_w(eqn, values, 0)
  letters = _gathered_letters(eqn, value, ids)
  if kind == 'i':
    if value.key is not None:
      raise NoRule('dropout falls on what A contracts: a look-up has no input')
    u, u_letters = _gathered(eqn, value, value.a, value.a_letters, ids)
    update = contract(
      scaled(u, u_letters, value), u_letters, value.b, value.b_letters, letters
    )
    return [rows + update.astype(rows.dtype)]
  if spec.operand_batching_dims:
    raise NoRule('it indexes a batch of weights')
  kinds = dict(zip(value.w_letters, value.axes, strict=True))
  axes = ''.join(kinds.get(c, kind) for c in letters)
  stack = ''.join(c for c in letters if kinds.get(c, kind) == 's')
  new = {}
  for name in ('a', 'b', 'scale', 'rate', 'key'):
    array, old, end = getattr(value, name), value.letters('s'), ''
    if name in 'ab':
      old = value.a_letters if name == 'a' else value.b_letters
      own = 'i' if name == 'a' else 'o'
      end = RANK + ''.join(c for c in letters if kinds.get(c, kind) == own)
    if array is not None and (kind == 's' or name == 'b'):
      array, old = _gathered(eqn, value, array, old, ids)
      array = arranged(array, old, stack + end)
    new[name] = array
  return [dataclasses.replace(value, w=rows, axes=axes, **new)]


def _gathered_letters(eqn: Any, value: Factored, ids: Array) -> str:
  """Letters of a gather's result."""
  spec = eqn.params['dimension_numbers']
  index = iter(_index_letters(spec, value, ids))
  gone = {*spec.collapsed_slice_dims, *spec.operand_batching_dims}
  offset = iter(c for d, c in enumerate(value.w_letters) if d not in gone)
  ndim = len(eqn.outvars[0].aval.shape)
  return ''.join(
    next(offset if d in spec.offset_dims else index) for d in range(ndim)
  )


def _index_letters(spec: Any, value: Factored, ids: Array) -> list[str]:
  """Letters of the index array, without its last axis (the coordinates)."""
  letters = list(string.ascii_uppercase[: ids.ndim - 1])
  shared = zip(
    spec.operand_batching_dims, spec.start_indices_batching_dims, strict=True
  )
  for w_dim, ids_dim in shared:
    letters[ids_dim] = value.w_letters[w_dim]
  return letters


def _gathered(
  eqn: Any, value: Factored, factor: Array, letters: str, ids: Array
) -> tuple[Array, str]:
  """The same gather of a factor: (result, its letters)."""
  spec, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  at = {value.w_letters.index(c): d for d, c in enumerate(letters) if c != RANK}

  def moved(dims):
    return tuple(at[d] for d in dims if d in at)

  gone = {
    *moved(spec.collapsed_slice_dims),
    *moved(spec.operand_batching_dims),
  }
  index = _index_letters(spec, value, ids)
  columns = [i for i, d in enumerate(spec.start_index_map) if d in at]
  kept = [c for d, c in enumerate(letters) if d not in gone]
  new_sizes = list(factor.shape)
  for d, new in at.items():
    new_sizes[new] = sizes[d]
  result = lax.gather(
    factor,
    jnp.take(ids, jnp.array(columns), -1)
    if len(columns) < ids.shape[-1]
    else ids,
    lax.GatherDimensionNumbers(
      offset_dims=tuple(range(len(index), len(index) + len(kept))),
      collapsed_slice_dims=tuple(sorted(moved(spec.collapsed_slice_dims))),
      start_index_map=moved(spec.start_index_map),
      operand_batching_dims=tuple(sorted(moved(spec.operand_batching_dims))),
      start_indices_batching_dims=spec.start_indices_batching_dims,
    ),
    tuple(new_sizes),
    indices_are_sorted=eqn.params['indices_are_sorted'],
    unique_indices=eqn.params['unique_indices'],
    mode=eqn.params['mode'],
    # What lies outside is filled by W's rows: the update adds nothing there.
    fill_value=0,
  )
  return result, ''.join(index + kept)


def _only_weight(values: Sequence[Any]) -> int:
  """Which operand is the weight."""
  sides = [i for i, v in enumerate(values) if isinstance(v, Factored)]
  if len(sides) > 1:
    raise NoRule('both operands are adapted weights')
  return sides[0]


def _with_w(eqn: Any, values: Sequence[Any], side: int) -> Array:
  """The equation on W itself, cast first if it counts as another dtype.

  The cast is made again in the backward pass, and not kept: those of a whole
  scan would be a second copy of the model.
  """
  value = values[side]
  if value.w.dtype == value.dtype:
    return run(eqn, [*values[:side], value.w, *values[side + 1 :]])[0]

  @jax.checkpoint
  def cast_and_run(w, others):
    w = w.astype(value.dtype)
    return run(eqn, [*others[:side], w, *others[side:]])[0]

  return cast_and_run(value.w, [*values[:side], *values[side + 1 :]])
