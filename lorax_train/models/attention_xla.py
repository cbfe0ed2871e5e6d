"""Blocked softmax attention in plain XLA: no T x T array, on any platform.

The online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867) over tiles
of queries by keys, and the backward pass of FlashAttention-2 (Dao 2023, arXiv
2307.08691), which makes the probabilities again from the log-sum-exp.

A query sees the keys from `first_BT` to itself: that one number says window and
segment both, and which tiles nobody in a block of queries looks at.

Axis letters: B batch, T query time, S key time, N heads, K kv heads, H head
dim; X blocks of queries, M the queries of a block for each head of a group, C
the keys of a tile.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = Any
NAME = 'attention'  # what a remat policy may save by name
TILE = (64, 128)  # queries and keys: a tile's scores stay in a core's cache
_UNSEEN = -1e30  # a score: finite, so that no difference of two is a NaN


def blocked_attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  first_BT: Array,
  tile: tuple[int, int] = TILE,
) -> Array:
  """softmax(q k^T / sqrt(H)) v over the keys that each query sees.

  Products are in the dtype of q, sums and the softmax in float32. The backward
  pass keeps q, k, v, the output and the log-sum-exp, the last two under the
  name of NAME; the forward pass cannot be differentiated twice.

  Args:
    q_BTNH: queries; K divides N, and neighbouring heads share keys.
    k_BTKH: keys.
    v_BTKH: values.
    first_BT: int32, the first key that each query sees, `first_seen`; the last
      one is its own.
    tile: queries and keys of a tile.

  Returns:
    [B, T, N, H] in the dtype of q.
  """
  time = q_BTNH.shape[1]
  queries, keys = (min(n, time) for n in tile)
  past_T, past_S = -time % queries, -time % keys
  pad = lambda x, n: jnp.pad(x, ((0, 0), (0, n), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
  out_BTNH = _attend(
    pad(q_BTNH, past_T),
    pad(k_BTKH, past_S).swapaxes(1, 2),
    pad(v_BTKH, past_S).swapaxes(1, 2),
    jnp.pad(first_BT, ((0, 0), (0, past_T)), mode='edge'),
    (queries, keys),
  )
  return out_BTNH[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTNH, k_BKSH, v_BKSH, first_BT, tile):
  return _forward(q_BTNH, k_BKSH, v_BKSH, first_BT, tile)[0]


def _forward(q_BTNH, k_BKSH, v_BKSH, first_BT, tile):
  heads, kv_heads = q_BTNH.shape[2], k_BKSH.shape[1]
  block = functools.partial(_blocks, kv_heads=kv_heads, size=tile[0])

  def attend(x):
    index, q_BKMH, first_BQ = x
    seen, tiles = _seen(index, first_BQ, tile, heads // kv_heads)

    def see(j, carry):
      top_BKM, total_BKM, out_BKMH = carry
      s_BKMC = _scores(q_BKMH, _cut(k_BKSH, j, tile), 'bkmh,bkch->bkmc')
      s_BKMC = jnp.where(seen(j).swapaxes(2, 3), s_BKMC, _UNSEEN)
      new_BKM = jnp.maximum(top_BKM, s_BKMC.max(-1))
      p_BKMC = jnp.exp(s_BKMC - new_BKM[..., None])
      shrunk_BKM = jnp.exp(top_BKM - new_BKM)
      out_BKMH *= shrunk_BKM[..., None]
      out_BKMH += _dot(
        'bkmc,bkch->bkmh', p_BKMC.astype(q_BKMH.dtype), _cut(v_BKSH, j, tile)
      )
      return new_BKM, total_BKM * shrunk_BKM + p_BKMC.sum(-1), out_BKMH

    zeros_BKM = jnp.zeros(q_BKMH.shape[:-1], jnp.float32)
    top_BKM, total_BKM, out_BKMH = jax.lax.fori_loop(
      *tiles,
      see,
      (zeros_BKM + _UNSEEN, zeros_BKM, jnp.zeros(q_BKMH.shape, jnp.float32)),
    )
    out_BKMH /= total_BKM[..., None]
    return out_BKMH.astype(q_BKMH.dtype), top_BKM + jnp.log(total_BKM)

  out_XBKMH, lse_XBKM = jax.lax.map(
    attend, _numbered(block(q_BTNH), _queries(first_BT, tile[0]))
  )
  out_BTNH = _unblocks(out_XBKMH, q_BTNH.shape)
  save = functools.partial(checkpoint_name, name=NAME)
  out_BTNH, lse_XBKM = save(out_BTNH), save(lse_XBKM)
  return out_BTNH, (q_BTNH, k_BKSH, v_BKSH, first_BT, out_BTNH, lse_XBKM)


def _backward(tile, residuals, grad_BTNH):
  """Tiles are keys by queries here, so that no product contracts the leading
  axes of both its operands, which a CPU does at a third of the speed.
  """
  q_BTNH, k_BKSH, v_BKSH, first_BT, out_BTNH, lse_XBKM = residuals
  heads, kv_heads = q_BTNH.shape[2], k_BKSH.shape[1]
  block = functools.partial(_blocks, kv_heads=kv_heads, size=tile[0])
  scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
  grad_XBKMH = block(grad_BTNH)
  inner_XBKM = jnp.sum(
    block(out_BTNH).astype(jnp.float32) * grad_XBKMH.astype(jnp.float32), -1
  )

  def attend(grads_kv, x):
    index, q_BKMH, first_BQ, grad_BKMH, lse_BKM, inner_BKM = x
    seen, tiles = _seen(index, first_BQ, tile, heads // kv_heads)

    def see(j, carry):
      dq_BKHM, dk_BKSH, dv_BKSH = carry
      k_BKCH, v_BKCH = _cut(k_BKSH, j, tile), _cut(v_BKSH, j, tile)
      s_BKCM = _scores(k_BKCH, q_BKMH, 'bkch,bkmh->bkcm')
      s_BKCM = jnp.where(seen(j), s_BKCM - lse_BKM[:, :, None], _UNSEEN)
      p_BKCM = jnp.exp(s_BKCM)
      dp_BKCM = _dot('bkch,bkmh->bkcm', v_BKCH, grad_BKMH)
      ds_BKCM = p_BKCM * (dp_BKCM - inner_BKM[:, :, None]) * scale
      ds_BKCM, p_BKCM = (x.astype(q_BKMH.dtype) for x in (ds_BKCM, p_BKCM))
      dq_BKHM += _dot('bkhc,bkcm->bkhm', k_BKCH.swapaxes(2, 3), ds_BKCM)
      dk_BKCH = _dot('bkcm,bkmh->bkch', ds_BKCM, q_BKMH)
      dv_BKCH = _dot('bkcm,bkmh->bkch', p_BKCM, grad_BKMH)
      return (
        dq_BKHM,
        _add(dk_BKSH, dk_BKCH, j, tile),
        _add(dv_BKSH, dv_BKCH, j, tile),
      )

    zeros_BKHM = jnp.zeros(q_BKMH.swapaxes(2, 3).shape, jnp.float32)
    dq_BKHM, *grads_kv = jax.lax.fori_loop(*tiles, see, (zeros_BKHM, *grads_kv))
    return tuple(grads_kv), dq_BKHM.astype(q_BKMH.dtype)

  zeros_BKSH = jnp.zeros(k_BKSH.shape, jnp.float32)
  blocks = _numbered(
    block(q_BTNH), _queries(first_BT, tile[0]), grad_XBKMH, lse_XBKM, inner_XBKM
  )
  grads_kv, dq_XBKHM = jax.lax.scan(attend, (zeros_BKSH, zeros_BKSH), blocks)
  dq_BTNH = _unblocks(dq_XBKHM.swapaxes(3, 4), q_BTNH.shape)
  return dq_BTNH, *(g.astype(k_BKSH.dtype) for g in grads_kv), None


_attend.defvjp(_forward, _backward)


def _seen(
  index: Array, first_BQ: Array, tile: tuple[int, int], group: int
) -> tuple[Callable[[Array], Array], tuple[Array, Array]]:
  """Which keys of a tile a block of queries sees, and which tiles at all.

  Returns:
    (seen, (from, to)): seen(j) is [B, 1, C, M], of tile j.
  """
  queries, keys = tile
  query_Q = index * queries + jnp.arange(queries, dtype=jnp.int32)

  def seen(j):
    key_C = j * keys + jnp.arange(keys, dtype=jnp.int32)
    behind = key_C[:, None] <= query_Q[None]
    seen_BCQ = behind[None] & (key_C[None, :, None] >= first_BQ[:, None])
    return jnp.tile(seen_BCQ, (1, 1, group))[:, None]

  return seen, (first_BQ.min() // keys, query_Q[-1] // keys + 1)


def _numbered(*stacked: Array) -> tuple[Array, ...]:
  return jnp.arange(stacked[0].shape[0], dtype=jnp.int32), *stacked


def _blocks(x_BTNH: Array, kv_heads: int, size: int) -> Array:
  """[B, T, N, H] -> [X, B, K, M, H]: the heads of a group under one another."""
  b, t, n, h = x_BTNH.shape
  group = n // kv_heads
  x = x_BTNH.reshape(b, t // size, size, kv_heads, group, h)
  x = x.transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(t // size, b, kv_heads, group * size, h)


def _unblocks(x_XBKMH: Array, shape: tuple[int, ...]) -> Array:
  """The other way: [X, B, K, M, H] -> [B, T, N, H]."""
  blocks, b, kv_heads, _, h = x_XBKMH.shape
  group = shape[2] // kv_heads
  x = x_XBKMH.reshape(blocks, b, kv_heads, group, shape[1] // blocks, h)
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)


def _queries(first_BT: Array, size: int) -> Array:
  """[B, T] -> [X, B, Q]."""
  return first_BT.reshape(first_BT.shape[0], -1, size).swapaxes(0, 1)


def _cut(x_BKSH: Array, j: Array, tile: tuple[int, int]) -> Array:
  return jax.lax.dynamic_slice_in_dim(x_BKSH, j * tile[1], tile[1], 2)


def _add(
  x_BKSH: Array, part_BKCH: Array, j: Array, tile: tuple[int, int]
) -> Array:
  part_BKCH = _cut(x_BKSH, j, tile) + part_BKCH
  return jax.lax.dynamic_update_slice_in_dim(x_BKSH, part_BKCH, j * tile[1], 2)


def _dot(axes: str, x: Array, y: Array) -> Array:
  return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _scores(x: Array, y: Array, axes: str) -> Array:
  return _dot(axes, x, y) / math.sqrt(x.shape[-1])
