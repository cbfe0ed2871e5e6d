"""A and B of one matrix, as each way of beginning has them.

Axis letters: R rank.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_train.lora.weight import plain

Pair = tuple[jax.Array, jax.Array]


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
  return pissa(_lost(w, w_quantised), rank, scale)


def _lost(w: Any, w_quantised: jax.Array) -> jax.Array:
  return jnp.asarray(w).astype(jnp.float32) - w_quantised.astype(jnp.float32)


def qera_factors(
  w: Any, w_quantised: jax.Array, moments: jax.Array, rank: int, scale: float
) -> Pair:
  """A and B that bring outputs nearest to those of W (Zhang et al. 2024).

  Of all updates of rank R they have the least mean square of
  x (W - Q - scale A^T B) over inputs x: QERA's theorem 1, with S of
  S^T S = E[x x^T] as the root. LoftQ has S = 1, where every direction counts as
  much, though inputs are long in few.

  Args:
    w: [in, out] before it was quantised.
    w_quantised: [in, out] what is left of it, Q.
    moments: [in, in] mean of x x^T.
    rank: R.
    scale: of the update scale A^T B.

  Returns:
    A [R, in] and B [R, out] float32, shared out by roots as `pissa` does.
  """
  _check_rank('qera', w_quantised, rank)
  squares, directions = jnp.linalg.eigh(moments.astype(jnp.float32))
  # Below that it is rounding; without any inputs all count alike.
  least = 1e-6 * squares[-1]
  sizes = jnp.sqrt(jnp.where(least > 0, jnp.maximum(squares, least), 1.0))
  with jax.default_matmul_precision('highest'):
    seen = sizes[:, None] * (directions.T @ _lost(w, w_quantised))
    u, s, vt = jnp.linalg.svd(seen, full_matrices=False)
    # The update is (directions / sizes) u s vt; vt and q turn its R x R core.
    left = u[:, :rank] * s[None, :rank]
    q, small = jnp.linalg.qr((directions / sizes[None]) @ left)
    a, b = pissa(small, rank, scale)
    return a @ q.T, b @ vt[:rank]


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
