"""Mistral, and Llama, which is the same decoder without a window.

After Jiang et al. 2023 (arXiv 2310.06825) and Touvron et al. 2023, with the
numerics of transformers' `MistralForCausalLM`: norms, rotary angles, softmax
and logits in float32, the rest in the compute dtype.

Modules own parameters and call plain functions. They know weights only
through `x @ w`, `w[ids]` and `w.T` (ops.py), never what lies behind them.

Axis letters: B batch, T query time, S key time, D model, N heads, K kv heads,
H head dim, F mlp, V vocab, L layers.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lorax_train.models import ops, remat
from lorax_train.models import params as params_lib
from lorax_train.models.attention import (
  Kernel,
  Packed,
  attention,
  padded_attention,
  visible,
)
from lorax_train.models.attention_kernels import masked_attention
from lorax_train.models.params import DecoderConfig, RopeScaling
from lorax_train.parallel import constrain

Array = Any
KeysValues = tuple[Array, Array]  # [B, S, K, H] each; [L, ...] over layers


class Cache(NamedTuple):
  """Keys and values of tokens that went before, in S slots.

  Attributes:
    k_LBSKH: rotated keys, in the compute dtype.
    v_LBSKH: values.
    positions_BS: int32, each token's place in its row; negative where there
      is none to attend to: padding, or a slot not filled yet.
  """

  k_LBSKH: Array
  v_LBSKH: Array
  positions_BS: Array


class Attention(nn.Module):
  """Grouped-query attention with rotary positions and a sliding window."""

  cfg: DecoderConfig
  kernel: Kernel = 'xla'

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    rope_BTH: Array,
    mask: Array | Packed | None,
    past: KeysValues | None = None,
  ) -> tuple[Array, KeysValues]:
    """[B, T, D] -> [B, T, D], and the keys and values of these T tokens.

    `mask` is of packs; [B, S]; or, with a past, [B, 1, T, past and T], and the
    whole truth.
    """
    cfg = self.cfg
    w_q, w_k, w_v, w_o = (
      weight(self, cfg, name)
      for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
    )
    q_BTNH = _heads(ops.dot(x_BTD, w_q), cfg.heads, 'heads')
    k_BSKH = _heads(ops.dot(x_BTD, w_k), cfg.kv_heads, 'kv_heads')
    v_BSKH = _heads(ops.dot(x_BTD, w_v), cfg.kv_heads, 'kv_heads')
    q_BTNH, k_BSKH = rotate(q_BTNH, rope_BTH), rotate(k_BSKH, rope_BTH)
    q_BTNH = checkpoint_name(q_BTNH, 'q')
    k_BSKH = checkpoint_name(k_BSKH, 'k')
    v_BSKH = checkpoint_name(v_BSKH, 'v')
    new = k_BSKH, v_BSKH
    if past is not None:
      k_BSKH = jnp.concatenate((past[0], k_BSKH), axis=1)
      v_BSKH = jnp.concatenate((past[1], v_BSKH), axis=1)
    qkv = q_BTNH, k_BSKH, v_BSKH
    if mask is None or isinstance(mask, Packed):
      out_BTNH = attention(*qkv, cfg.window, mask, self.kernel)
    elif mask.ndim == 2:
      out_BTNH = padded_attention(*qkv, cfg.window, mask)
    else:
      out_BTNH = masked_attention(*qkv, mask)
    out_BTE = out_BTNH.reshape(*x_BTD.shape[:2], cfg.heads * cfg.head_dim)
    return ops.dot(out_BTE, w_o), new


class Mlp(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    """[B, T, D] -> [B, T, D]."""
    w_gate, w_up, w_down = (
      weight(self, self.cfg, name)
      for name in ('gate_proj', 'up_proj', 'down_proj')
    )
    gate_BTF = checkpoint_name(ops.dot(x_BTD, w_gate), 'gate')
    up_BTF = checkpoint_name(ops.dot(x_BTD, w_up), 'up')
    h_BTF = constrain(nn.silu(gate_BTF) * up_BTF, 'batch', None, 'mlp')
    return ops.dot(h_BTF, w_down)


class Block(nn.Module):
  """One layer: attention and MLP, each behind a norm and around a residual."""

  cfg: DecoderConfig
  kernel: Kernel = 'xla'

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    rope_BTH: Array,
    mask: Array | Packed | None,
    past: KeysValues | None = None,
  ) -> tuple[Array, KeysValues | None]:
    """The carry of the layer scan; stacked, with a past, keys and values."""
    cfg = self.cfg
    norm = functools.partial(rms_norm, eps=cfg.norm_eps)
    h_BTD = norm(x_BTD, weight(self, cfg, 'input_layernorm'))
    attend = Attention(cfg, self.kernel, name='self_attn')
    out_BTD, new = attend(h_BTD, rope_BTH, mask, past)
    x_BTD = checkpoint_name(x_BTD + out_BTD, 'residual')
    h_BTD = norm(x_BTD, weight(self, cfg, 'post_attention_layernorm'))
    x_BTD = x_BTD + Mlp(cfg, name='mlp')(h_BTD)
    x_BTD = constrain(x_BTD, 'batch', None, None)
    return x_BTD, None if past is None else new


class Decoder(nn.Module):
  """Token ids to logits.

  Attributes:
    cfg: sizes and constants.
    dtype: compute dtype of the layers.
    remat: what the backward pass of a layer makes again, see remat.py.
    kernel: who computes attention in rows without padding mask and cache, one
      of `attention.KERNELS`, or a function like them.
    head: whether logits come out; else an `ops.BeforeHead` in their place.
  """

  cfg: DecoderConfig
  dtype: Any = jnp.float32
  remat: str = 'none'
  kernel: Kernel = 'xla'
  head: bool = True

  @nn.compact
  def __call__(
    self,
    ids_BT: Array,
    positions_BT: Array | None = None,
    mask_BS: Array | None = None,
    cache: Cache | None = None,
    segments_BT: Array | None = None,
  ) -> Any:
    """Logits [B, T, V] in float32; with a cache, (logits, what T adds to it).

    Args:
      ids_BT: token ids, int32, each below V.
      positions_BT: rotary positions; None counts from 0 in each row.
      mask_BS: False where a token may not be attended to (padding); None
        where that cannot happen: padding on the right needs no mask.
      cache: the tokens before these, which are then attended to as well; for
        none before, a cache of no slots. It wants positions_BT, negative for
        padding, and no mask_BS. `extend` puts into it what comes back.
      segments_BT: int32, which of its rows a token of a pack belongs to; tokens
        of other segments are not attended to. It wants positions_BT, which
        begin anew in each segment, and neither mask_BS nor a cache.
    """
    cfg = self.cfg
    past = None
    mask: Array | Packed | None = mask_BS
    if segments_BT is not None:
      assert positions_BT is not None and mask_BS is None and cache is None
      mask = Packed(segments_BT)
    if cache is not None:
      assert positions_BT is not None and mask_BS is None
      positions_BT = jnp.broadcast_to(positions_BT, ids_BT.shape)
      past = cache.k_LBSKH, cache.v_LBSKH
      mask = visible(cfg.window, cache.positions_BS, positions_BT)[:, None]
    if positions_BT is None:
      positions_BT = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None]
    w_embed = weight(self, cfg, 'embed_tokens')
    x_BTD = ops.lookup(w_embed, ids_BT, self.dtype)
    x_BTD = constrain(x_BTD, 'batch', None, None)
    layers = nn.scan(
      remat_block(self.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, 0),
      length=cfg.layers,
    )
    rope_BTH = rope_angles(cfg, positions_BT)
    blocks = layers(cfg, self.kernel, name='layers')
    x_BTD, new = blocks(x_BTD, rope_BTH, mask, past)
    x_BTD = rms_norm(x_BTD, weight(self, cfg, 'norm'), cfg.norm_eps)
    w_head = w_embed.T if cfg.tied else weight(self, cfg, 'lm_head')
    out: Any = ops.BeforeHead(x_BTD, w_head)
    if self.head:
      out = ops.dot(x_BTD, w_head, jnp.float32)
      out = constrain(out, 'batch', None, 'vocab')
    if cache is None:
      return out
    return out, Cache(new[0], new[1], positions_BT)


def empty_cache(cfg: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """A cache of that many slots, with nothing in any of them."""
  shape = (cfg.layers, rows, slots, cfg.kv_heads, cfg.head_dim)
  kv = jnp.zeros(shape, dtype)
  return Cache(kv, kv, jnp.full((rows, slots), -1, jnp.int32))


def extend(cache: Cache, new: Cache, slot: Array | int) -> Cache:
  """The cache with the slots from `slot` on overwritten by `new`."""
  write = jax.lax.dynamic_update_slice_in_dim
  return Cache(
    write(cache.k_LBSKH, new.k_LBSKH, slot, 2),
    write(cache.v_LBSKH, new.v_LBSKH, slot, 2),
    write(cache.positions_BS, new.positions_BS, slot, 1),
  )


def remat_block(policy: str) -> type[nn.Module]:
  """Block, or Block recomputed in the backward pass."""
  if policy == 'none':
    return Block
  # prevent_cse is for code outside a scan; within, it only costs speed.
  return nn.remat(Block, policy=remat.policy(policy), prevent_cse=False)


def weight(module: nn.Module, cfg: DecoderConfig, name: str) -> Array:
  """The module's own weight, as whatever kind of weight it is.

  `self.param` would compare shapes and refuse a weight that is not an array,
  so it is used to initialise only. Shapes come from the PARAMS table.
  """
  if not module.is_initializing():
    return module.get_variable('params', name)
  path = '/'.join((*module.path, name))
  row = next(p for p in params_lib.table(cfg) if p.path == path)
  shape = params_lib.shape(cfg, row)[1 if row.stacked else 0 :]
  init = (
    nn.initializers.ones
    if row.axes[-1] == 'norm'
    else nn.initializers.normal(cfg.init_std)
  )
  return module.param(name, init, shape, jnp.float32)


def rms_norm(x_BTD: Array, w_D: Array, eps: float) -> Array:
  """x / rms(x) * w over the last axis, in float32 inside (arXiv 1910.07467)."""
  x32 = x_BTD.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed_BTD = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x_BTD.dtype)
  return w_D.astype(x_BTD.dtype)[None, None] * normed_BTD


def rope_angles(cfg: DecoderConfig, positions_BT: Array) -> Array:
  """Rotary angles [B, T, H/2] in float32 (Su et al. 2021)."""
  inv_freq = jnp.asarray(rope_frequencies(cfg), jnp.float32)
  return jnp.multiply.outer(positions_BT.astype(jnp.float32), inv_freq)


def rope_frequencies(cfg: DecoderConfig) -> np.ndarray:
  """Radians a position of each pair of components, [H/2] float64."""
  exponents = np.arange(0, cfg.head_dim, 2) / cfg.head_dim
  return _stretched(1.0 / cfg.rope_theta**exponents, cfg.rope_scaling)


def _stretched(freq: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
  if scaling is None:
    return freq
  if scaling.kind == 'linear':
    return freq / scaling.factor
  # Llama 3.1: by wavelength, with a linear ramp in between.
  turns = scaling.original_max_positions * freq / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return kept * freq + (1 - kept) * freq / scaling.factor


def rotate(x_BTNH: Array, rope_BTH: Array) -> Array:
  """Turns each pair (i, i + H/2) of components by its angle, as HF does."""
  cos, sin = jnp.cos(rope_BTH)[:, :, None], jnp.sin(rope_BTH)[:, :, None]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin), axis=-1
  )
  return turned.astype(x_BTNH.dtype)


def _heads(x_BTE: Array, heads: int, axis: str) -> Array:
  x = x_BTE.reshape(*x_BTE.shape[:2], heads, -1)
  return constrain(x, 'batch', None, axis, None)
