"""Attention that others wrote: splash on TPU, cuDNN on NVIDIA GPUs, jax's own.

Axis letters: B batch, T time, N heads, K kv heads, H head dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorax_train.models.attention_xla import NAME

Array = Any
_LANES = 128  # splash's blocks are multiples of it
_BLOCK = 512  # and of this size, MaxText's default, where the rows are as long


def splash_lacks(platform: str, head_dim: int) -> str:
  """Why splash can't run there; '' where it can."""
  if platform != 'tpu':
    return f'is a kernel for TPUs, and the devices are of {platform}'
  if head_dim % 8:
    return f'wants a head_dim that is a multiple of 8, not {head_dim}'
  return ''


def cudnn_lacks(platform: str, head_dim: int, dtype: Any) -> str:
  """Why cuDNN can't run there; '' where it can."""
  if platform not in ('gpu', 'cuda'):
    return f'is a kernel for NVIDIA GPUs, and the devices are of {platform}'
  if jnp.dtype(dtype).itemsize != 2:
    return f'wants bfloat16, not {dtype}'
  if head_dim % 8 or head_dim > 128:
    return f'wants a head_dim of 8, 16 ... 128, not {head_dim}'
  return ''


def splash_attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  segments_BT: Array | None = None,
  *,
  window: int | None,
  interpret: bool = False,
) -> Array:
  """`attention` by jax's splash kernel (Pallas for TPU).

  Rows are padded to a multiple of the kernel's blocks, on the right, where
  causal attention does not look.

  Args:
    q_BTNH: queries.
    k_BTKH: keys.
    v_BTKH: values.
    segments_BT: of packs.
    window: keys that a query sees; None for all before it.
    interpret: run anywhere, slowly: what a test without a TPU has.
  """
  # Pallas for TPU takes a second to import, which only TPUs need.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  time, heads = q_BTNH.shape[1:3]
  block = min(_BLOCK, -(-time // _LANES) * _LANES)
  extra = -time % block
  padded = time + extra
  mask: Any
  if window is None:
    mask = splash.CausalMask((padded, padded))
  else:
    mask = splash.LocalMask((padded, padded), (window - 1, 0), 0)
  names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute')
  blocks = {f'block_{name}': block for name in (*names, 'q_dq', 'kv_dq')}
  # Its code mixes dtypes and ranks, also where the caller asked for none.
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads),
      head_shards=1,
      q_seq_shards=1,
      block_sizes=splash.BlockSizes(**blocks),
      residual_checkpoint_name=NAME,
      interpret=interpret,
    )
    q_BNTH, k_BKTH, v_BKTH = (
      jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2)
      for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    # The kernel does not scale; in float32, as other kernels scale scores.
    scale = 1.0 / math.sqrt(q_BTNH.shape[-1])
    q_BNTH = (q_BNTH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    if segments_BT is None:
      out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH)
    else:
      ids_BT = jnp.pad(segments_BT, ((0, 0), (0, extra)), mode='edge')
      ids = splash.SegmentIds(q=ids_BT, kv=ids_BT)
      out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids)
  return out_BNTH.swapaxes(1, 2)[:, :time]


def cudnn_attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  segments_BT: Array | None = None,
  *,
  window: int | None,
) -> Array:
  """`attention` by cuDNN's flash attention, in bfloat16.

  cuDNN knows no segments: those of packs are a mask of [B, 1, T, T], the only
  thing of that size, 2 bytes a number. Blocks of plain XLA would need none,
  but for the 7B's heads at 2,048 tokens they take more memory.
  """
  extra = q_BTNH.shape[1] % 2  # cuDNN wants even lengths
  q_BTNH, k_BTKH, v_BTKH = (
    jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))
    for x in (q_BTNH, k_BTKH, v_BTKH)
  )
  mask_BNTS = None
  if segments_BT is not None:
    ids_BT = jnp.pad(segments_BT, ((0, 0), (0, extra)), mode='edge')
    mask_BNTS = same_segment(ids_BT)
  out_BTNH = _cudnn(q_BTNH, k_BTKH, v_BTKH, mask_BNTS, window)
  return out_BTNH[:, : out_BTNH.shape[1] - extra]


def same_segment(segments_BT: Array) -> Array:
  """Which tokens of packs are of one row: [B, 1, T, T]."""
  return (segments_BT[:, :, None] == segments_BT[:, None])[:, None]


def causal_attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  mask_BNTS: Array | None,
  window: int | None,
  **how: Any,
) -> Array:
  """`masked_attention` that looks at what went before, within a window."""
  return masked_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask_BNTS,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    **how,
  )


def masked_attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  mask_BNTS: Array | None,
  **limits: Any,
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn(q_BTNH, k_BTKH, v_BTKH, mask_BNTS, window):
  """jax's, with names on what its backward pass keeps."""
  return causal_attention(
    q_BTNH, k_BTKH, v_BTKH, mask_BNTS, window, implementation='cudnn'
  )


def _cudnn_forward(q_BTNH, k_BTKH, v_BTKH, mask_BNTS, window):
  operands = (q_BTNH, k_BTKH, v_BTKH)
  flash = functools.partial(
    causal_attention,
    mask_BNTS=mask_BNTS,
    window=window,
    implementation='cudnn',
  )
  out_BTNH, pullback = jax.vjp(flash, *operands)
  named_BTNH = checkpoint_name(out_BTNH, NAME)
  mask = (q_BTNH.shape[1],) * 2  # is made again, as the operands are

  def save(kept):
    if kept is out_BTNH:
      return named_BTNH
    if kept.shape[-2:] == mask or any(kept is x for x in operands):
      return kept
    return checkpoint_name(kept, NAME)

  return named_BTNH, jax.tree.map(save, pullback)


def _cudnn_backward(window, pullback, grad_BTNH):
  del window
  return *pullback(grad_BTNH), None


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)
