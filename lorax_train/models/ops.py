"""What a model may do with a weight, beyond `w[ids]`, `w.T` and `w.shape`.

A weight is a plain array or anything that behaves as one under these: a
weight that has `apply_to(x, out_dtype)` multiplies by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any


class BeforeHead(NamedTuple):
  """What logits are made of, for those who want few of them at a time.

  Attributes:
    x_BTD: final hidden states.
    w_head: [D, V]; logits are `dot(x_BTD, w_head, float32)`.
  """

  x_BTD: Array
  w_head: Array


def dot(x: Array, w: Array, out_dtype: Any = None) -> Array:
  """x [..., in] @ w [in, out] -> [..., out], in x's dtype or `out_dtype`.

  `out_dtype=float32` sums in float32 as well: logits rounded to bfloat16 cost
  up to 0.07 of loss a token. A weight stored in another dtype than x is cast
  for the product and cast again in the backward pass, so that no scan saves a
  cast copy of all layers.
  """
  if hasattr(w, 'apply_to'):
    return w.apply_to(x, out_dtype)
  if w.dtype == x.dtype:
    return jnp.matmul(x, w, preferred_element_type=out_dtype)

  @jax.checkpoint
  def cast_dot(x, w):
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)

  return cast_dot(x, w)


def lookup(w: Array, ids: Array, dtype: Any) -> Array:
  """Rows of w [V, D] at ids [...] -> [..., D] in `dtype`.

  An id past the last row gives the last row, silently, as XLA's gather does:
  ids are checked where data enters.
  """
  return w[ids].astype(dtype)
