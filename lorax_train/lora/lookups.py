"""Rows of a low-rank weight by index: look-ups, and selections of weights.

Letters are as in `products`.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lorax_train.lora.factored import (
  RANK,
  Factored,
  NoRule,
  aligned,
  arranged,
  contract,
)
from lorax_train.lora.products import scaled, with_w

Array = Any


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
  letters = _gathered_letters(eqn, value, ids)
  if kind == 'i':
    if value.key is not None:
      raise NoRule('dropout falls on what A contracts: a look-up has no input')
    u, u_letters = _gathered(eqn, value, value.a, value.a_letters, ids)
    update = contract(
      scaled(u, u_letters, value), u_letters, value.b, value.b_letters, letters
    )
    return [_summed(eqn, value, ids, update, letters)]
  if spec.operand_batching_dims:
    raise NoRule('it indexes a batch of weights')
  rows = with_w(eqn, values, 0, ids)
  kinds = dict(zip(value.w_letters, value.axes, strict=True))
  axes = ''.join(kinds.get(c, kind) for c in letters)
  stack = ''.join(c for c in letters if kinds.get(c, kind) == 's')
  stack, ins, outs = (
    ''.join(c for c in letters if kinds.get(c, kind) == k) for k in 'sio'
  )
  places = {
    'a': (value.a_letters, stack + RANK + ins),
    'b': (value.b_letters, stack + RANK + outs),
    'gain': (value.gain_letters, stack + outs),
    **dict.fromkeys(('scale', 'rate', 'key'), (value.letters('s'), stack)),
  }
  new = {}
  for name, (old, wanted) in places.items():
    array = getattr(value, name)
    if array is not None and (kind == 's' or name in ('b', 'gain')):
      # What lies outside is filled by W's rows: nothing is done to it.
      fill = 1 if name == 'gain' else 0
      array, old = _gathered(eqn, value, array, old, ids, fill)
      array = arranged(array, old, wanted)
    new[name] = array
  return [dataclasses.replace(value, w=rows, axes=axes, **new)]


def _summed(
  eqn: Any, value: Factored, ids: Array, update: Array, letters: str
) -> Array:
  """Rows of W and of the update, brought to DoRA's lengths."""
  rows = with_w(eqn, [value, ids], 0, ids)
  update = update.astype(rows.dtype)
  if value.gain is None:
    return rows + update
  gain = aligned(value.gain, value.gain_letters, letters).astype(rows.dtype)
  # What lies outside keeps what it is filled with: there `inside` is zero.
  inside, found = _gathered(eqn, value, value.w, value.w_letters, ids)
  inside = arranged(inside, found, letters).astype(rows.dtype)
  return rows + (gain - 1) * inside + gain * update


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
  eqn: Any,
  value: Factored,
  factor: Array,
  letters: str,
  ids: Array,
  fill: int = 0,
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
    fill_value=fill,
  )
  return result, ''.join(index + kept)
