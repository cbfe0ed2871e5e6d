"""What only looks at a low-rank weight anew, and gives a low-rank weight.

Each rule does to the factors what the primitive does to W.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from lorax_train.lora.equation import run
from lorax_train.lora.factored import (
  Factored,
  NoRule,
  changed,
  reshaped,
  transposed,
  value_shape,
  widened,
  without,
)

Array = Any


def convert_element_type(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A cast, which waits until the weight is used."""
  (value,) = values
  dtype = eqn.params['new_dtype']
  if not jnp.issubdtype(dtype, jnp.floating):
    raise NoRule('a sum of products is no integer')
  w = value.w.astype(value.dtype)  # an earlier cast rounds first
  return [dataclasses.replace(value, w=w, dtype=jnp.dtype(dtype))]


def same_factors(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Copies, names, sharding constraints: they concern W alone."""
  results = run(eqn, [v.w if isinstance(v, Factored) else v for v in values])
  return [
    dataclasses.replace(v, w=w) if isinstance(v, Factored) else w
    for v, w in zip(values, results, strict=True)
  ]


def optimization_barrier(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A barrier around all parts of the weight."""
  return list(lax.optimization_barrier(tuple(values)))


def stop_gradient(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """No gradient through W, nor through the factors."""
  return [lax.stop_gradient(values[0])]


def transpose(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Any order of axes."""
  value = transposed(values[0], eqn.params['permutation'])
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def reshape(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """In axes split or merged among themselves, and so out and stack axes."""
  if eqn.params['dimensions'] is not None:
    raise NoRule('it transposes as well')
  value = reshaped(values[0], eqn.params['new_sizes'])
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def squeeze(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Fewer axes of size 1."""
  (value,) = values
  for dim in sorted(eqn.params['dimensions'], reverse=True):
    value = without(value, dim)
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def expand_dims(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """More axes of size 1, which count as stack axes."""
  (value,) = values
  for dim in sorted(eqn.params['dimensions']):
    value = widened(value, dim, 1)
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def broadcast_in_dim(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """More axes, all along which the weight is the same: stack axes."""
  value, *sizes = values
  if sizes:
    raise NoRule('its shape is not static')
  shape, kept = eqn.params['shape'], eqn.params['broadcast_dimensions']
  for old, new in enumerate(kept):
    if value.w.shape[old] != shape[new]:
      value = changed(value, old, partial(_repeated, shape[new]))
  for dim, n in enumerate(shape):
    if dim not in kept:
      value = widened(value, dim, n)
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def _repeated(size: int, x: Array, axis: int) -> Array:
  shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
  return lax.broadcast_in_dim(x, shape, range(x.ndim))


def slice_(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A static slice, of any axes."""
  (value,) = values
  starts, stops = eqn.params['start_indices'], eqn.params['limit_indices']
  strides = eqn.params['strides'] or (1,) * len(starts)
  for dim, n in enumerate(value.w.shape):
    cut = (starts[dim], stops[dim], strides[dim])
    if cut != (0, n, 1):
      value = changed(value, dim, partial(_cut, cut))
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def _cut(cut: tuple[int, int, int], x: Array, axis: int) -> Array:
  start, stop, stride = cut
  return lax.slice_in_dim(x, start, stop, stride, axis)


def dynamic_slice(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A slice that starts where the operands say."""
  value, *starts = values
  if not isinstance(value, Factored):
    raise NoRule('the weight is the index')
  sizes = eqn.params['slice_sizes']
  for dim, (start, n) in enumerate(zip(starts, sizes, strict=True)):
    if n != value.w.shape[dim]:
      value = changed(value, dim, partial(_cut_from, start, n))
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def _cut_from(start: Array, size: int, x: Array, axis: int) -> Array:
  return lax.dynamic_slice_in_dim(x, start, size, axis)


def split(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Slices next to each other."""
  (value,) = values
  axis, start, parts = eqn.params['axis'], 0, []
  for w, n in zip(run(eqn, [value.w]), eqn.params['sizes'], strict=True):
    part = changed(value, axis, partial(_cut, (start, start + int(n), 1)))
    parts.append(dataclasses.replace(part, w=w))
    start += int(n)
  return parts


def rev(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Axes the other way round."""
  (value,) = values
  for dim in eqn.params['dimensions']:
    value = changed(value, dim, lambda x, axis: lax.rev(x, (axis,)))
  return [dataclasses.replace(value, w=_on_w(eqn, values))]


def unstack(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """All indices of an axis, each by itself."""
  (value,) = values
  axis = eqn.params['axis']
  parts = []
  for index, w in enumerate(run(eqn, [value.w])):
    part = changed(value, axis, partial(_cut, (index, index + 1, 1)))
    parts.append(dataclasses.replace(without(part, axis), w=w))
  return parts


def stack(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Weights put into a stack, each with its own adapter."""
  axis = eqn.params['axis']
  return [
    _joined(
      eqn,
      values,
      [widened(v, axis, 1) if isinstance(v, Factored) else v for v in values],
      axis,
    )
  ]


def concatenate(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Weights side by side, along any axis."""
  return [_joined(eqn, values, values, eqn.params['dimension'])]


def _joined(
  eqn: Any, values: Sequence[Any], factors: Sequence[Any], dim: int
) -> Factored:
  """One weight of several.

  Along a stack axis each keeps its factors. Along in or out axes their ranks
  add up, and each reaches its own part of the axis: the others are zeros.

  Args:
    eqn: what joins the arrays.
    values: its operands.
    factors: the operands with their factors already as the result has them.
    dim: of the result, along which they are joined.
  """
  weights = [v for v in factors if isinstance(v, Factored)]
  first = weights[0]
  if any(v.key is not None for v in weights):
    raise NoRule('each has dropout of its own')
  if any((v.axes, v.dtype) != (first.axes, first.dtype) for v in weights):
    raise NoRule('its operands have axes or dtypes of different kinds')
  kind, n = first.axes[dim], first.axes.count('s')
  if kind == 's' and len(weights) < len(values):
    raise NoRule('some of the stack are no adapted weights')
  plain = [
    v.w.astype(v.dtype) if isinstance(v, Factored) else v for v in values
  ]
  w = run(eqn, plain)[0]
  gain = _joined_gains(factors, plain, first.axes, dim)
  if kind == 's':
    rank, at = max(v.a.shape[n] for v in weights), first.axes[:dim].count('s')
    a, b = (
      jnp.concatenate([_padded(x, n, 0, rank) for x in of_all], at)
      for of_all in ([v.a for v in weights], [v.b for v in weights])
    )
    scale = jnp.concatenate([v.scale for v in weights], at)
    return dataclasses.replace(first, w=w, a=a, b=b, scale=scale, gain=gain)
  axis, start = n + 1 + first.axes[:dim].count(kind), 0
  all_a, all_b = [], []
  for v, array in zip(factors, plain, strict=True):
    if isinstance(v, Factored):
      a = v.a * v.scale.reshape(v.scale.shape + (1,) * (v.a.ndim - n))
      a, b = (
        _padded(x, axis, start, w.shape[dim]) if has == kind else x
        for x, has in ((a, 'i'), (v.b, 'o'))
      )
      all_a.append(a)
      all_b.append(b)
    start += array.shape[dim]
  return dataclasses.replace(
    first,
    w=w,
    a=jnp.concatenate(all_a, n),
    b=jnp.concatenate(all_b, n),
    scale=jnp.ones_like(first.scale),
    gain=gain,
  )


def _joined_gains(
  factors: Sequence[Any], arrays: Sequence[Array], axes: str, dim: int
) -> Array | None:
  """The gain of weights joined along `dim` of a result with these axes.

  Args:
    factors: as in `_joined`.
    arrays: the operands without their updates.
    axes: of the result.
    dim: along which they are joined.
  """
  gains = [v.gain if isinstance(v, Factored) else None for v in factors]
  if all(gain is None for gain in gains):
    return None
  if axes[dim] == 'i':
    # Parts of one weight share its gain.
    if all(gain is gains[0] for gain in gains):
      return gains[0]
    raise NoRule("along an in axis DoRA's gains have to be the same")
  order = [d for kind in 'so' for d, k in enumerate(axes) if k == kind]
  shapes = [
    value_shape(v) if isinstance(v, Factored) else array.shape
    for v, array in zip(factors, arrays, strict=True)
  ]
  whole = [
    jnp.ones([shape[d] for d in order]) if gain is None else gain
    for gain, shape in zip(gains, shapes, strict=True)
  ]
  return jnp.concatenate(whole, order.index(dim))


def _padded(x: Array, axis: int, start: int, size: int) -> Array:
  """Zeros of that size along an axis, with x in them from `start` on."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (start, size - start - x.shape[axis])
  return jnp.pad(x, widths)


def neg(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """The scale's sign turned."""
  (value,) = values
  w = _on_w(eqn, values)
  return [dataclasses.replace(value, w=w, scale=-value.scale)]


def mul(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A weight times a number."""
  left, right = values
  value, number = (left, right) if isinstance(left, Factored) else (right, left)
  return [_times_number(eqn, values, value, number, lambda s, n: s * n)]


def div(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A weight over a number."""
  value, number = values
  return [_times_number(eqn, values, value, number, lambda s, n: s / n)]


def _times_number(
  eqn: Any,
  values: Sequence[Any],
  value: Any,
  number: Any,
  with_scale: Callable[[Array, Array], Array],
) -> Any:
  if isinstance(number, Factored) or not isinstance(value, Factored):
    raise NoRule('it takes no weight here')
  if jnp.ndim(number):
    raise NoRule('a weight may be multiplied by a number, not by an array')
  scale = with_scale(value.scale, jnp.asarray(number).astype(jnp.float32))
  w = value.w.astype(value.dtype)
  new = run(eqn, [w if v is value else v for v in values])[0]
  return dataclasses.replace(value, w=new, scale=scale)


def _on_w(eqn: Any, values: Sequence[Any]) -> Array:
  """The equation on W itself."""
  if not isinstance(values[0], Factored):
    raise NoRule('it takes no weight here')
  return run(eqn, [values[0].w, *values[1:]])[0]
