"""Softmax attention: which token sees which, and who computes it.

Axis letters: B batch, T query time, S key time, N heads, K kv heads, H head
dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  window: int | None,
  mask_BS: Array | None,
) -> Array:
  """Causal softmax attention -> [B, T, N, H]; K divides N.

  Query t sees keys s with t - window < s <= t; scores scaled by 1/sqrt(H).
  """
  return masked_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    None if mask_BS is None else mask_BS[:, None, None],
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
  )


def masked_attention(
  q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BNTS: Array | None, **limits
) -> Array:
  """Softmax attention -> [B, T, N, H] by a mask and jax's own `limits`."""
  # jax's own code promotes bfloat16 to float32 here, also where the caller
  # has asked for strict dtypes.
  with jax.numpy_dtype_promotion('standard'):
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      mask=mask_BNTS,
      scale=1.0 / math.sqrt(q_BTNH.shape[-1]),
      **limits,
    )


def visible(window: int | None, before_BS: Array, positions_BT: Array) -> Array:
  """Which of the S tokens before and of the T see which: [B, T, S + T]."""
  key = jnp.concatenate((before_BS, positions_BT), axis=1)[:, None, :]
  query = positions_BT[:, :, None]
  seen = (key >= 0) & (key <= query)
  return seen if window is None else seen & (key > query - window)


def visible_in_segment(window: int | None, segments_BT: Array) -> Array:
  """Which of T tokens see which, of their own segment alone: [B, T, S].

  A segment has no gaps, so places in the pack are as far apart as positions in
  the segment. Padding is a segment like any other: nothing learned is of it,
  and a query that sees nothing at all would be a softmax over nothing.
  """
  place = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
  behind_TS = place[:, None] - place[None, :]
  seen_TS = behind_TS >= 0
  if window is not None:
    seen_TS &= behind_TS < window
  return (segments_BT[:, :, None] == segments_BT[:, None, :]) & seen_TS[None]
