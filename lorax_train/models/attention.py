"""Softmax attention: which token sees which, and who computes it.

Rows of training go through one of KERNELS, none of which holds T x T scores
(cuDNN wants a T x T mask for packs), and none of which can be differentiated
twice or forwards; padding masks and caches, which only inference has, through
jax's own, as does what users of `load` differentiate as they like.

Axis letters: B batch, T query time, S key time, N heads, K kv heads, H head
dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from lorax_train.models import attention_kernels, attention_xla
from lorax_train.models.attention_kernels import causal_attention, same_segment
from lorax_train.parallel import partition

Array = Any
NAME = attention_xla.NAME
KERNELS = ('xla', 'splash', 'cudnn')
# One of these, or a function with their arguments.
Kernel = str | Callable[..., Any]


class Packed(NamedTuple):
  """Several rows side by side in one, none of which sees another.

  Attributes:
    segments_BT: int32, which of its rows a token belongs to: one number from a
      row's first token to its last, and another in the row beside it.
  """

  segments_BT: Array


def choose(wanted: str, platform: str, head_dim: int, dtype: Any) -> str:
  """Which of KERNELS computes attention.

  Args:
    wanted: one of them, or 'auto' for the best that can run.
    platform: of the devices it will run on, not of those that are here.
    head_dim: H.
    dtype: of queries, keys and values.

  Raises:
    ValueError: why the kernel that is wanted can't run there.

  >>> choose('auto', 'tpu', 128, 'bfloat16')
  'splash'
  """
  lacks = {
    'xla': '',
    'splash': attention_kernels.splash_lacks(platform, head_dim),
    'cudnn': attention_kernels.cudnn_lacks(platform, head_dim, dtype),
  }
  if wanted == 'auto':
    return next(n for n in ('splash', 'cudnn', 'xla') if not lacks[n])
  if lacks[wanted]:
    raise ValueError(f'{wanted} {lacks[wanted]}; give auto or xla')
  return wanted


def attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  window: int | None,
  packed: Packed | None = None,
  kernel: Kernel = 'xla',
) -> Array:
  """Causal softmax attention -> [B, T, N, H]; K divides N.

  Query t sees keys s with t - window < s <= t, of its own segment; scores
  scaled by 1/sqrt(H). Under a mesh each device has its rows and its heads, or
  all heads where the mesh does not divide them.

  The output and the log-sum-exp are named NAME: a remat policy that saves them
  keeps the backward pass from computing them again.
  """
  function = _KERNELS[kernel] if isinstance(kernel, str) else kernel
  attend = functools.partial(function, window=window)
  segments = () if packed is None else (packed.segments_BT,)
  operands = (q_BTNH, k_BTKH, v_BTKH, *segments)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return attend(*operands)
  return _on_mesh(mesh, attend, *operands)


def _on_mesh(
  mesh: Any,
  attend: Callable[..., Array],
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  *segments_BT: Array,
) -> Array:
  """Each device attends in its rows and for its heads, by itself."""
  axes = ('batch', None, 'heads', None)
  whole = partition(mesh, axes, q_BTNH.shape)
  ways = 1 if whole[2] is None else mesh.shape[whole[2]]
  copies = ways // math.gcd(ways, k_BTKH.shape[2])
  if q_BTNH.shape[2] % (k_BTKH.shape[2] * copies):
    whole, copies = partition(mesh, ('batch',), q_BTNH.shape[:1]), 1
  if copies > 1:  # fewer heads of keys than devices: neighbours have the same
    k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
  rows = partition(mesh, ('batch',), q_BTNH.shape[:1])
  on_each = jax.shard_map(
    attend,
    in_specs=(whole, whole, whole, *(rows for _ in segments_BT)),
    out_specs=whole,
    check_vma=False,
  )
  return on_each(q_BTNH, k_BTKH, v_BTKH, *segments_BT)


def _xla(q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, window):
  first_BT = first_seen(window, segments_BT, q_BTNH.shape[:2])
  return attention_xla.blocked_attention(q_BTNH, k_BTKH, v_BTKH, first_BT)


_KERNELS = {
  'xla': _xla,
  'splash': attention_kernels.splash_attention,
  'cudnn': attention_kernels.cudnn_attention,
}


def first_seen(
  window: int | None, segments_BT: Array | None, shape: tuple[int, int]
) -> Array:
  """The first token that each of [B, T] sees, int32.

  A segment has no gaps, so places in the pack are as far apart as positions in
  the segment. Padding is a segment like any other: nothing learned is of it,
  and a query that sees nothing at all would be a softmax over nothing.

  >>> first_seen(3, jnp.asarray([[1, 1, 1, 1, 2, 2]]), (1, 6)).tolist()
  [[0, 0, 0, 1, 4, 4]]
  """
  place_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  first_BT = jnp.zeros(shape, jnp.int32)
  if segments_BT is not None:
    begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(begins_BT, ((0, 0), (1, 0)))
    first_BT = jax.lax.cummax(jnp.where(begins_BT, place_BT, 0), axis=1)
  if window is not None:
    first_BT = jnp.maximum(first_BT, place_BT - window + 1)
  return first_BT


def plain_attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  segments_BT: Array | None = None,
  *,
  window: int | None,
) -> Array:
  """A kernel with T x T scores: differentiable forwards, and at any order."""
  mask_BNTS = None if segments_BT is None else same_segment(segments_BT)
  return causal_attention(q_BTNH, k_BTKH, v_BTKH, mask_BNTS, window)


def padded_attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  window: int | None,
  mask_BS: Array,
) -> Array:
  """`attention` where keys of which the mask is False are not seen."""
  mask_BNTS = mask_BS[:, None, None]
  return causal_attention(q_BTNH, k_BSKH, v_BSKH, mask_BNTS, window)


def visible(window: int | None, before_BS: Array, positions_BT: Array) -> Array:
  """Which of the S tokens before and of the T see which: [B, T, S + T]."""
  key = jnp.concatenate((before_BS, positions_BT), axis=1)[:, None, :]
  query = positions_BT[:, :, None]
  seen = (key >= 0) & (key <= query)
  return seen if window is None else seen & (key > query - window)
