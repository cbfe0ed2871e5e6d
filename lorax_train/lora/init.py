"""How A and B begin.

What is in FROM_BASE begins with an update that is not zero, and takes it away
again (`Fixed.a0`, `b0`): W itself is never changed, so that the base stays
shared and unrounded. PEFT subtracts it from W instead. LoftQ's update stays: it
is what W lost in quantising.

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
  'whitened',
)
FROM_BASE = ('pissa', 'olora')

Pair = tuple[jax.Array, jax.Array]


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
  if some.init == 'loftq' and not is_quantised(w):
    raise ValueError(
      'init loftq corrects what quantising lost, and this weight is not quantised:'
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
    if some.init == 'loftq':  # its sum is not W at the start
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
) -> Pair:
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
    a = {'default': default, 'gaussian': gaussian}[kind](key, shape_a)
    return _live(a, live), jnp.zeros(shape_b, jnp.float32)
  if kind == 'loftq' and given is None:
    raise ValueError(
      'init loftq wants the weights as they were before quantising: give split'
      ' givens'
    )
  if kind == 'whitened' and given is None:
    raise ValueError(
      "init whitened wants the second moments of the leaf's inputs: give split"
      ' givens (lora.inputs)'
    )
  matrices = None
  if kind not in ('orthogonal', 'whitened'):
    matrices = _flat_stack(axes_lib.to_matrices(w, axes), len(stack))

  def of(i: int, place: 'Placement') -> Pair:
    if kind == 'orthogonal':
      own = jax.random.fold_in(key, i)
      return orthogonal(own, n_in, n_out, place.rank)
    if kind == 'whitened' and given is not None:
      return whitened(given(i), n_out, place.rank)
    matrix = plain(jax.tree.map(lambda x: x[i], matrices), jnp.float32)
    if kind == 'loftq' and given is not None:
      return loftq_factors(given(i), matrix, place.rank, place.scale)
    return from_base(kind, matrix, place.rank, place.scale)

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


def default(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A [..., R, in] uniform in +-1/sqrt(in): PEFT's, Kaiming with a = sqrt(5)."""
  bound = 1.0 / math.sqrt(shape[-1])
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A [..., R, in] normal of deviation 1/R: PEFT's, after Hu et al. 2021."""
  return jax.random.normal(key, shape, jnp.float32) / shape[-2]


def orthogonal(key: jax.Array, n_in: int, n_out: int, rank: int) -> Pair:
  """A and B random, of spaces of rank that are orthogonal: A^T B is zero.

  As PEFT's `orthogonal`: the rows of an orthogonal [R, R] are dealt out, the
  even ones to A and the odd ones to B.
  """
  if rank % 2:
    raise ValueError(f'init orthogonal: rank {rank} is odd, give an even one')
  keys = jax.random.split(key, 3)
  q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank), jnp.float32))

  def half(key, rows, n):
    return rows.T @ jax.random.normal(key, (rank // 2, n), jnp.float32) / 10

  with jax.default_matmul_precision('highest'):
    return half(keys[1], q[0::2], n_in), half(keys[2], q[1::2], n_out)


def from_base(kind: str, w: jax.Array, rank: int, scale: float) -> Pair:
  """`pissa` or `olora` of W [in, out]."""
  _check_rank(kind, w, rank)
  w = w.astype(jnp.float32)
  return pissa(w, rank, scale) if kind == 'pissa' else olora(w, rank)


def _check_rank(kind: str, w: jax.Array, rank: int) -> None:
  if rank > min(w.shape):
    raise ValueError(
      f'init {kind}: rank {rank} is above the smaller side of a weight'
      f' [in, out] = {list(w.shape)}'
    )


def pissa(w: jax.Array, rank: int, scale: float) -> Pair:
  """The first R singular triples of W, shared out by roots (Meng et al. 2024).

  scale A^T B is the best approximation of W of that rank.
  """
  u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  root = jnp.sqrt(s[:rank] / scale)[:, None]
  return root * u.T[:rank], root * vt[:rank]


def olora(w: jax.Array, rank: int) -> Pair:
  """R columns of the QR of W^T (Büyükakyüz 2024): B orthonormal, A the rest."""
  q, r = jnp.linalg.qr(w.T)
  return r[:rank], q.T[:rank]


def whitened(moments: jax.Array, n_out: int, rank: int) -> Pair:
  """A [R, in] that makes R uncorrelated features of mean square 1; B is zero.

  The directions are EVA's (Paischer et al. 2024), those along which the inputs
  are largest; divided by how large, none of them drowns the others.

  Args:
    moments: [in, in] mean of x x^T over inputs x.
    n_out: out.
    rank: R.
  """
  n_in = len(moments)
  if rank > n_in:
    raise ValueError(
      f'init whitened: rank {rank} is above the {n_in} inputs of a weight'
    )
  squares, directions = jnp.linalg.eigh(moments.astype(jnp.float32))
  squares, directions = squares[::-1][:rank], directions.T[::-1][:rank]
  # Directions that no input has: of the size of rounding, and of no sign.
  least = 1e-6 * squares[0]
  seen = squares > least
  gains = jnp.where(seen, lax.rsqrt(jnp.maximum(squares, least)), 0.0)
  return gains[:, None] * directions, jnp.zeros((rank, n_out), jnp.float32)


def loftq_factors(
  w: Any, w_quantised: jax.Array, rank: int, scale: float
) -> Pair:
  """A and B of the best update from the quantised W to W (Li et al. 2023).

  Args:
    w: [in, out] before it was quantised.
    w_quantised: [in, out] what is left of it.
    rank: R.
    scale: of the update scale A^T B.

  Returns:
    A [R, in] and B [R, out] float32.
  """
  _check_rank('loftq', w_quantised, rank)
  lost = jnp.asarray(w).astype(jnp.float32) - w_quantised.astype(jnp.float32)
  return pissa(lost, rank, scale)


def loftq(
  w: jax.Array,
  quantise: Callable[[jax.Array], Any],
  rank: int,
  scale: float,
  iterations: int = 1,
) -> tuple[Any, jax.Array, jax.Array]:
  """LoftQ (Li et al. 2023, algorithm 1): Q and A, B with Q + scale A^T B near W.

  With one iteration (PEFT's default) Q is W quantised as ever, and the adapter
  fits any load of the same base.

  Args:
    w: [in, out].
    quantise: [in, out] float32 -> an array, or a weight with `dequantised`.
    rank: R.
    scale: of the update.
    iterations: how often Q, and then A and B, are chosen anew.

  Returns:
    (quantise's answer, A [R, in], B [R, out]).
  """
  w = w.astype(jnp.float32)
  residual = w
  for _ in range(iterations):
    q = quantise(residual)
    a, b = loftq_factors(w, plain(q, jnp.float32), rank, scale)
    residual = w - scale * a.T @ b
  return q, a, b
