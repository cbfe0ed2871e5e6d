"""Where a low-rank weight is used up: products and convolutions.

Each rule gives `W's result + ((x A) scale) B` for one primitive, times DoRA's
gain where there is one. Letters are axis names in the manner of einsum:
lower-case ones are dimensions of W, upper-case ones those of the other operand
alone, `*` is the rank.
"""

import string
from collections.abc import Callable, Sequence
from functools import partial
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
  as_kind,
  contract,
)

Array = Any


def dot_general(eqn: Any, values: Sequence[Any]) -> list[Array]:
  """A product that contracts all in axes, all out axes, or some of either."""
  side = only_weight(values)
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
  gain, gain_letters = value.gain, value.gain_letters
  x, gain = _gained(x, x_letters, gain, gain_letters, inside, value)
  seen = dropped(x, value)
  update = _times(x, seen, x_letters, value, inside, letters, options)
  on_w = partial(with_w, eqn, values, side)
  if gain is not None:
    gain = aligned(gain, gain_letters, letters)
  return [_summed(on_w, x, seen, update, gain)]


def _gained(
  x: Array,
  x_letters: str,
  gain: Array | None,
  gain_letters: str,
  inside: set[str],
  value: Factored,
) -> tuple[Array, Array | None]:
  """(x, the gain that the result has yet to be multiplied by).

  Where the out axes are contracted (a transpose, a tied head) the gain falls
  on x, before the product.
  """
  if gain is None:
    return x, None
  if not inside & set(value.letters('o')):
    if inside & set(gain_letters):
      raise NoRule("it sums over a stack of DoRA's gains")
    return x, gain
  if not set(gain_letters) <= set(x_letters):
    raise NoRule("DoRA's gain has axes that the other operand has not")
  return x * aligned(gain, gain_letters, x_letters).astype(x.dtype), None


def _summed(
  on_w: Callable[[Array], Array],
  x: Array,
  seen: Array,
  update: Array,
  gain: Array | None,
) -> Array:
  """The result on W and the update, brought to DoRA's lengths.

  Args:
    on_w: the equation on W itself, of x.
    x: the other operand.
    seen: x under dropout; x itself without.
    update: what the factors add.
    gain: as it broadcasts over the result; None without DoRA.
  """
  base = on_w(x)
  update = update.astype(base.dtype)
  if gain is None:
    return base + update
  gain = gain.astype(base.dtype)
  if seen is x:
    return gain * (base + update)
  # As PEFT: what the gain adds to the base is an update, and sees dropout.
  return base + (gain - 1) * on_w(seen) + gain * update


def _times(
  x: Array,
  seen: Array,
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
  kept = [
    c for c in x_letters if c not in first[1] or c in second[1] or c in letters
  ]
  u_letters = ''.join(kept + [c for c in first[1] if c not in x_letters])

  def through(x, factor):
    factor, precision = factor.astype(x.dtype), options['precision']
    return contract(x, x_letters, factor, first[1], u_letters, precision)

  u = _ranked(through, x, seen, value, first, u_letters.index(RANK))
  u = scaled(u, u_letters, value)
  return contract(
    u, u_letters, second[0].astype(x.dtype), second[1], letters, **options
  )


def _ranked(
  through: Callable[[Array, Array], Array],
  x: Array,
  seen: Array,
  value: Factored,
  factor: tuple[Array, str],
  axis: int,
) -> Array:
  """x through a factor (array, letters): `axis` of the result is the rank.

  A frozen pair is part of the base, and sees no dropout.
  """
  array, letters = factor
  at, n = letters.index(RANK), value.n_dropped
  if seen is x or n == array.shape[at]:
    return through(seen, array)
  own, frozen = jnp.split(array, [n], at)
  return jnp.concatenate([through(seen, own), through(x, frozen)], axis)


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
  """A convolution with R output features, then their mixture by B.

  With groups of features, each has R of its own: A is the same for all.
  """
  side = only_weight(values)
  if side != 1:
    raise NoRule('the weight is convolved, and not the kernel')
  params = dict(eqn.params)
  if params['batch_group_count'] != 1:
    raise NoRule('the batch is convolved in groups')
  x, value = values
  spec = params['dimension_numbers']
  out_dim, out_axis = spec.rhs_spec[0], spec.out_spec[1]
  for dim in range(len(value.axes)):
    value = as_kind(value, dim, 'o' if dim == out_dim else 'i')
  if value.letters('o') != value.w_letters[out_dim] or value.letters('s'):
    raise NoRule(f'its out axis is not the only one kept ({value.axes})')
  n_groups = params['feature_group_count']
  out_dtype = params.pop('preferred_element_type')
  letters = string.ascii_uppercase[: x.ndim]
  before, after = letters[:out_axis], letters[out_axis + 1 :]

  def through(x, a):
    kernel = jnp.moveaxis(a.astype(x.dtype), 0, out_dim)
    reps = [n_groups if d == out_dim else 1 for d in range(kernel.ndim)]
    u = lax.conv_general_dilated(x, jnp.tile(kernel, reps), **params)
    return _grouped(u, n_groups, out_axis)

  seen = dropped(x, value)
  u = _ranked(through, x, seen, value, (value.a, value.a_letters), out_axis + 1)
  u = u * value.scale.astype(u.dtype)
  b = _grouped(value.b.astype(x.dtype), n_groups, 1)
  update = contract(
    u, f'{before}g{RANK}{after}', b, f'{RANK}go', f'{before}go{after}',
    params['precision'], out_dtype,
  )  # fmt: skip
  update = lax.collapse(update, out_axis, out_axis + 2)
  gain = value.gain
  if gain is not None:
    gain = aligned(gain, 'o', f'{before}o{after}')
  return [_summed(partial(with_w, eqn, values, side), x, seen, update, gain)]


def _grouped(x: Array, n_groups: int, axis: int) -> Array:
  """An axis as [groups, rest]."""
  return x.reshape(*x.shape[:axis], n_groups, -1, *x.shape[axis + 1 :])


def ragged_dot_general(eqn: Any, values: Sequence[Any]) -> list[Array]:
  """Rows in groups, each against the weight of its group (experts)."""
  side = only_weight(values)
  x, value, sizes, *rest = values
  spec = eqn.params['ragged_dot_dimension_numbers']
  (x_inner, w_inner), batch = spec.dot_dimension_numbers
  grouped = spec.rhs_group_dimensions
  if side != 1 or rest or batch[0] or not grouped:
    raise NoRule('only [group, in, out] weights on the right have a rule')
  used = ''.join(
    'i' if d in w_inner else 's' if d in grouped else 'o'
    for d in range(len(value.axes))
  )
  turned = used.translate(str.maketrans('io', 'oi'))
  if value.axes not in (used, turned):
    raise NoRule(f'it wants {used}, and the weight is {value.axes}')
  if value.key is not None:
    raise NoRule('dropout needs one adapter at a time: scan the stack')

  (ragged,) = spec.lhs_ragged_dimensions
  rows = [d for d in range(x.ndim) if d not in x_inner]
  names = list(string.ascii_uppercase[: x.ndim])
  for d, w_d in zip(x_inner, w_inner, strict=True):
    names[d] = value.w_letters[w_d]
  gain, gain_letters = value.gain, names[ragged] + value.letters('o')
  if gain is not None:
    gain = jnp.repeat(gain, sizes, 0, total_repeat_length=x.shape[ragged])
  inside = {value.w_letters[d] for d in w_inner}
  x, gain = _gained(x, ''.join(names), gain, gain_letters, inside, value)
  if gain is not None:
    letters = ''.join(names[d] for d in rows) + value.letters('o')
    gain = aligned(gain, gain_letters, letters)
  update = _ragged_update(eqn, x, value, sizes, value.axes == turned)
  return [_summed(partial(with_w, eqn, values, side), x, x, update, gain)]


def _ragged_update(
  eqn: Any, x: Array, value: Factored, sizes: Array, turned: bool
) -> Array:
  """x against the update alone; through B first where W is `turned`."""
  spec = eqn.params['ragged_dot_dimension_numbers']
  (x_inner, w_inner), _ = spec.dot_dimension_numbers
  (ragged,) = spec.lhs_ragged_dimensions
  rows = [d for d in range(x.ndim) if d not in x_inner]
  first, second = (value.a, value.a_letters), (value.b, value.b_letters)
  if turned:
    first, second = second, first
  inner = [first[1].index(value.w_letters[d]) for d in w_inner]

  def product(x, x_inner, ragged, factor, inner, out_dtype):
    numbers = lax.RaggedDotDimensionNumbers(
      ((tuple(x_inner), tuple(inner)), ((), ())), [ragged], [0]
    )
    factor, precision = factor.astype(x.dtype), eqn.params['precision']
    return lax.ragged_dot_general(
      x, factor, sizes, numbers, precision, out_dtype
    )

  u = product(x, x_inner, ragged, first[0], inner, None)
  # The scale is one a group: it goes into the second factor, of few rows.
  scale = aligned(value.scale, value.letters('s'), second[1])
  out_dtype = eqn.params['preferred_element_type']
  scaled = second[0] * scale
  return product(u, [len(rows)], rows.index(ragged), scaled, [1], out_dtype)


def only_weight(values: Sequence[Any]) -> int:
  """Which operand is the weight."""
  sides = [i for i, v in enumerate(values) if isinstance(v, Factored)]
  if len(sides) > 1:
    raise NoRule('both operands are adapted weights')
  return sides[0]


def with_w(eqn: Any, values: Sequence[Any], side: int, x: Array) -> Array:
  """The equation on W itself and on x, its other operand.

  W is cast first if it counts as another dtype. The cast is made again in the
  backward pass, and not kept: those of a whole scan would be a second copy of
  the model.
  """
  value, others = values[side], list(values)
  others[1 - side] = x
  del others[side]

  def on(w, others):
    return run(eqn, [*others[:side], w, *others[side:]])[0]

  if value.w.dtype == value.dtype:
    return on(value.w, others)
  cast_and_run = jax.checkpoint(lambda w, o: on(w.astype(value.dtype), o))
  return cast_and_run(value.w, others)
