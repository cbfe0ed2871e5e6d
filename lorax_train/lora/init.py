"""How A and B begin.

What is in FROM_BASE begins with an update that is not zero, and takes it away
again (`Fixed.a0`, `b0`): W itself is never changed, so that the base stays
shared and unrounded. PEFT subtracts it from W instead. The update of what is in
FROM_LOST stays: it is what W lost in quantising.

Axis letters: R rank.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_train.lora import axes as axes_lib
from lorax_train.lora import starts
from lorax_train.lora.weight import (
  Adapter,
  Fixed,
  is_quantised,
  plain,
  sum_norm2,
)

if TYPE_CHECKING:
  from lorax_train.lora.spec import Placement

INITS = (
  'default',
  'gaussian',
  'orthogonal',
  'pissa',
  'olora',
  'loftq',
  'qera',
  'whitened',
)
FROM_BASE = ('pissa', 'olora')
FROM_LOST = ('loftq', 'qera')
FROM_INPUTS = ('qera', 'whitened')

_LOST = 'the weights as they were before quantising'
_INPUTS = "the second moments of the leaf's inputs (lora.inputs)"
_WANTS = {'loftq': _LOST, 'qera': f'{_LOST} and {_INPUTS}', 'whitened': _INPUTS}


def begin(
  key: jax.Array,
  w: Any,
  axes: str,
  places: Sequence['Placement | None'],
  look_up: bool = False,
  given: Callable[[int], Any] | None = None,
) -> tuple[Fixed, Adapter]:
  """Both halves of a leaf before the first step.

  Args:
    key: typed PRNG key, the leaf's own.
    w: the leaf.
    axes: of it, see `axes`.
    places: the adapter of each stack index, row-major; at least one is there.
    look_up: whether it is an embedding, see `Fixed.look_up`. Then A begins
      with zeros and B is random (PEFT's), and nothing is dropped.
    given: what a way of beginning wants of a stack index, see `split`.

  Raises:
    ValueError: a rank or a leaf that this way of beginning can't have.
  """
  some = next(p for p in places if p)
  if is_quantised(w) and (look_up or not axes_lib.is_matrix(axes)):
    raise ValueError(
      f'a quantised weight is [*stack, in, out] of a product, not of axes {axes}'
    )
  if some.init in FROM_LOST and not is_quantised(w):
    raise ValueError(
      f'init {some.init} corrects what quantising lost, and this weight is not quantised:'
      ' leave it out of the targets, or load the model quantised'
    )
  if look_up:
    _check_look_up(some)
  stack = axes_lib.sizes(w.shape, axes, 's')

  def per_index(values: Sequence[float]) -> jax.Array:
    return jnp.asarray(np.array(values, np.float32).reshape(stack))

  scale = per_index([p.scale if p else 0.0 for p in places])
  drops = [p.dropout if p and not look_up else 0.0 for p in places]
  rate = per_index(drops) if any(drops) else None
  ranks = tuple(p.rank if p else 0 for p in places)
  kind = 'look-up' if look_up else some.init
  a, b = _factors(kind, key, w, axes, places, given)
  fixed = Fixed(w, scale, rate, ranks, axes, look_up=look_up)
  adapter = Adapter(
    axes_lib.unflatten(a, w.shape, axes, 'i'),
    axes_lib.unflatten(b, w.shape, axes, 'o'),
  )
  if some.init in FROM_BASE:
    fixed = dataclasses.replace(fixed, a0=adapter.a, b0=adapter.b)
  if some.dora:
    norm2 = column_norms2(axes_lib.to_matrices(w, axes))
    norm2 = axes_lib.unflatten(norm2, w.shape, axes, 'o')
    fixed = dataclasses.replace(fixed, norm2=norm2)
    if some.init in FROM_LOST:  # its sum is not W at the start
      with jax.default_matmul_precision('highest'):
        norm2 = by_layer(sum_norm2, w, norm2, a, b, scale)
    adapter = dataclasses.replace(adapter, m=jnp.sqrt(norm2))
  if not some.train_a:
    fixed = dataclasses.replace(fixed, a=adapter.a)
    adapter = dataclasses.replace(adapter, a=None)
  return fixed, adapter


def _check_look_up(place: 'Placement') -> None:
  if place.init not in ('default', 'gaussian'):
    raise ValueError(
      f'init {place.init} is not for an embedding, whose A begins with zeros:'
      ' adapt it with init default, or leave it out'
    )
  if not place.train_a:
    raise ValueError(
      'lora_fa freezes A, which in an embedding begins with zeros: leave it out'
    )


def column_norms2(w: Any) -> jax.Array:
  """Squared norms of W's columns, [*stack, out] float32."""

  def of(w):
    return jnp.sum(jnp.square(plain(w, jnp.float32)), -2)

  return by_layer(of, w) if is_quantised(w) else of(w)


def by_layer(fn: Callable[..., jax.Array], w: Any, *more: Any) -> jax.Array:
  """`fn` of each stack index, so that one W at a time is made whole.

  Args:
    fn: of W [in, out] and what stands beside it.
    w: [*stack, in, out].
    more: arrays [*stack, ...].
  """
  stack = w.shape[:-2]
  if not stack:
    return fn(w, *more)
  out = lax.map(lambda one: fn(*one), _flat_stack((w, *more), len(stack)))
  return out.reshape(*stack, *out.shape[1:])


def _flat_stack(tree: Any, n: int) -> Any:
  """Arrays of n stack axes with one of all their indices, row-major."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[n:]), tree)


def _factors(
  kind: str,
  key: jax.Array,
  w: Any,
  axes: str,
  places: Sequence['Placement | None'],
  given: Callable[[int], Any] | None = None,
) -> starts.Pair:
  """A [*stack, R, in] and B [*stack, R, out], in and out flattened.

  R is the largest rank; rows past an index's own rank are zero in both.
  """
  stack, inner, outer = (axes_lib.sizes(w.shape, axes, k) for k in 'sio')
  n_in, n_out = math.prod(inner), math.prod(outer)
  r = max(p.rank for p in places if p)
  shape_a, shape_b = (*stack, r, n_in), (*stack, r, n_out)
  if kind in ('default', 'gaussian', 'look-up'):
    live = (
      np.arange(r) < np.array([p.rank if p else 0 for p in places])[:, None]
    )
    live = live.reshape(*stack, r, 1)
    if kind == 'look-up':
      b = jax.random.normal(key, shape_b, jnp.float32)
      return jnp.zeros(shape_a, jnp.float32), _live(b, live)
    a = {'default': starts.default, 'gaussian': starts.gaussian}[kind](
      key, shape_a
    )
    return _live(a, live), jnp.zeros(shape_b, jnp.float32)
  if kind in _WANTS and given is None:
    raise ValueError(f'init {kind} wants {_WANTS[kind]}: give split givens')
  wanted: Any = given
  matrices = None
  if kind not in ('orthogonal', 'whitened'):
    matrices = _flat_stack(axes_lib.to_matrices(w, axes), len(stack))

  def of(i: int, place: 'Placement') -> starts.Pair:
    rank, scale = place.rank, place.scale
    if kind == 'orthogonal':
      return starts.orthogonal(jax.random.fold_in(key, i), n_in, n_out, rank)
    if kind == 'whitened':
      return starts.whitened(wanted(i), n_out, rank)
    matrix = plain(jax.tree.map(lambda x: x[i], matrices), jnp.float32)
    if kind == 'loftq':
      return starts.loftq_factors(wanted(i), matrix, rank, scale)
    if kind == 'qera':
      original, moments = wanted(i)
      return starts.qera_factors(original, matrix, moments, rank, scale)
    return starts.from_base(kind, matrix, rank, scale)

  halves: tuple[list[jax.Array], list[jax.Array]] = ([], [])
  for i, place in enumerate(places):
    pair = jnp.zeros((r, n_in)), jnp.zeros((r, n_out))
    if place:
      pair = of(i, place)
    for half, x in zip(halves, pair, strict=True):
      half.append(jnp.pad(x, ((0, r - len(x)), (0, 0))))
  a, b = map(jnp.stack, halves)
  return a.reshape(shape_a), b.reshape(shape_b)


def _live(factor: jax.Array, live: np.ndarray) -> jax.Array:
  """The factor with zeros past each index's own rank."""
  return factor if live.all() else jnp.where(live, factor, 0.0)
