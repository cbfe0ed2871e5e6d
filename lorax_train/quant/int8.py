"""int8 rows, as bitsandbytes' 8-bit linears keep them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.weight import node
from lorax_train.quant.base import QuantWeight
from lorax_train.quant.blockwise import ROWS

Array = Any


@node('q', 'scale', static=('dtype',))
class Int8Weight(QuantWeight):
  """A frozen weight [*stack, in, out] as W = q scale / 127.

  Attributes:
    q: [*stack, in, out] int8.
    scale: [*stack, out] float32, each output's largest magnitude: `SCB` of
      bitsandbytes.
    dtype: what it stands for; static.
  """

  q: Array
  scale: Array
  dtype: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of what it stands for, [*stack, in, out]."""
    return self.q.shape

  @property
  def sharding(self) -> Any:
    """Where `q` lies."""
    return self.q.sharding

  def dequantised(self, dtype: Any = None) -> jax.Array:
    """What it stands for, [*stack, in, out], rounded once to `dtype`.

    Args:
      dtype: None for its own.
    """
    values = self.q.astype(jnp.float32) * self.scale[..., None, :]
    return (values * np.float32(1 / 127)).astype(dtype or self.dtype)


def abstract(shape: tuple[int, ...], dtype: Any) -> Int8Weight:
  """A weight of ShapeDtypeStructs: which arrays [*stack, in, out] takes."""
  *stack, _, n_out = shape
  return Int8Weight(
    jax.ShapeDtypeStruct(tuple(shape), np.int8),
    jax.ShapeDtypeStruct((*stack, n_out), np.float32),
    jnp.dtype(dtype),
  )


def quantise(matrix: np.ndarray) -> Int8Weight:
  """A matrix [out, in] of floats as a weight [in, out] of numpy arrays.

  To the bit as bitsandbytes 0.50 does it on a CPU. What is not finite makes
  its output's scale not finite.

  >>> w = quantise(np.array([[1, -2, 0.5]], np.float32))
  >>> w.q.T.tolist(), w.scale.tolist()
  ([[64, -127, 32]], [2.0])
  """
  n_out, n_in = matrix.shape
  q = np.empty((n_in, n_out), np.int8)
  scale = np.empty(n_out, np.float32)
  for at in range(0, n_out, ROWS):
    part = matrix[at : at + ROWS].astype(np.float32)
    peaks = scale[at : at + ROWS]
    np.max(np.abs(part), 1, out=peaks)
    some = np.where(peaks == 0, np.float32(1), peaks)
    with np.errstate(invalid='ignore'):
      # Rounded three times, as torch has 127 / scale by way of 1 / scale.
      part *= (np.float32(1) / some * np.float32(127))[:, None]
      q[:, at : at + ROWS] = np.rint(part, out=part).astype(np.int8).T
  return Int8Weight(q, scale, matrix.dtype)
