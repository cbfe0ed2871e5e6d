"""Attention as a kernel looks to who counts: what goes in, comes out, is kept.

Whoever computes it, none of the scores is an array of the program, and the
backward pass keeps the output and the log-sum-exp. What happens within is counted
by formula (`estimate`).
"""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorax_train.models.attention import NAME
from lorax_train.models.attention_kernels import same_segment

Array = Any
PRIMITIVE = 'pure_callback'  # what it is in a jaxpr
RESULTS = {2: 'forward', 3: 'backward'}  # which of both, by its results


def attention(
  q_BTNH: Array,
  k_BTKH: Array,
  v_BTKH: Array,
  segments_BT: Array | None = None,
  *,
  window: int | None,
  mask: bool = False,
) -> Array:
  """In the place of one of `models.attention`'s kernels, to be traced alone.

  Args:
    q_BTNH: queries.
    k_BTKH: keys.
    v_BTKH: values.
    segments_BT: of packs.
    window: keys that a query sees.
    mask: segments come to the kernel as an array of [B, 1, T, T].
  """
  del window
  extra: tuple[Array, ...] = ()
  if segments_BT is not None:
    extra = (segments_BT,)
    if mask:
      extra = (same_segment(segments_BT).astype(q_BTNH.dtype),)
  return _attend(q_BTNH, k_BTKH, v_BTKH, extra)


@jax.custom_vjp
def _attend(q_BTNH, k_BTKH, v_BTKH, extra):
  return _forward(q_BTNH, k_BTKH, v_BTKH, extra)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, extra):
  b, t, n, _ = q_BTNH.shape
  lse_BNT = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
  given = (q_BTNH, k_BTKH, v_BTKH, *extra)
  # Of a batch of them, as MeZO's probes are, each is one by itself.
  made = jax.pure_callback(
    _nobody, (_like(q_BTNH), lse_BNT), *given, vmap_method='sequential'
  )
  out_BTNH, lse_BNT = map(functools.partial(checkpoint_name, name=NAME), made)
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, extra, out_BTNH, lse_BNT)


def _backward(residuals, grad_BTNH):
  q_BTNH, k_BTKH, v_BTKH, extra, out_BTNH, lse_BNT = residuals
  wanted = tuple(map(_like, (q_BTNH, k_BTKH, v_BTKH)))
  given = (q_BTNH, k_BTKH, v_BTKH, *extra, out_BTNH, lse_BNT, grad_BTNH)
  return *jax.pure_callback(_nobody, wanted, *given), None


_attend.defvjp(_forward, _backward)


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _nobody(*_: Any) -> NoReturn:
  raise AssertionError('a program that is only to be traced was run')
