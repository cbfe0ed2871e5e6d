"""NF4 on devices: a layout that is cut without an exchange.

Where in is a multiple of 64, every block of 64 lies along `in` of one output:

    packed  uint8 [*stack, in / 2, out]   byte k of block b: inputs 64 b + k in
                                          its high half and 64 b + 32 + k in
                                          its low one
    absmax  uint8 [*stack, in / 64, out]  of block b and output o

so that a cut of `in` into multiples of 64, or of `out`, is one of both arrays.
The order of bitsandbytes' second level is kept: block b of output o is its
number o in / 64 + b. Other matrices stay as bitsandbytes has them ('flat'),
whole on each device. Both ways are lossless.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.weight import node
from lorax_train.quant.base import QuantWeight
from lorax_train.quant.blockwise import (
  BLOCK,
  BLOCK2,
  NF4,
  ROWS,
  Quantised,
)

Array = Any
HALF = BLOCK // 2


@node('packed', 'absmax', 'absmax2', 'offset', static=('dtype', 'flat'))
class Nf4Weight(QuantWeight):
  """A frozen weight [*stack, in, out] in NF4, see the head of this file.

  Attributes:
    packed: uint8, two numbers a byte.
    absmax: uint8; float32 where it is not quantised itself.
    absmax2: [*stack, ceil(blocks / 256)] float32, or None with such an absmax.
    offset: [*stack] float32, likewise.
    dtype: what it stands for; static.
    flat: (in, out) of a matrix in bitsandbytes' own layout, packed
      [*stack, ceil(in out / 2)] and absmax [*stack, blocks]; None otherwise.
  """

  packed: Array
  absmax: Array
  absmax2: Array | None
  offset: Array | None
  dtype: Any
  flat: tuple[int, int] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of what it stands for, [*stack, in, out]."""
    if self.flat is not None:
      return (*self.packed.shape[:-1], *self.flat)
    *stack, n_half, n_out = self.packed.shape
    return (*stack, 2 * n_half, n_out)

  @property
  def sharding(self) -> Any:
    """Where `packed` lies: by the axes of `shape`, or by its stack if flat."""
    return self.packed.sharding

  def dequantised(self, dtype: Any = None) -> jax.Array:
    """What it stands for, [*stack, in, out], rounded once to `dtype`.

    Args:
      dtype: None for its own.
    """
    *stack, n_in, n_out = self.shape
    high, low = self.packed >> 4, self.packed & 15
    if self.flat is not None:
      n = n_in * n_out
      codes = jnp.stack([high, low], -1).reshape(*stack, -1)[..., :n]
      absmax = jnp.repeat(self._absmax(), BLOCK, -1)[..., :n]
      values = (_nf4(codes) * absmax).astype(dtype or self.dtype)
      return jnp.swapaxes(values.reshape(*stack, n_out, n_in), -1, -2)
    halves = (*stack, n_in // BLOCK, HALF, n_out)
    codes = jnp.concatenate([high.reshape(halves), low.reshape(halves)], -2)
    values = _nf4(codes) * self._absmax()[..., None, :]
    return values.astype(dtype or self.dtype).reshape(*stack, n_in, n_out)

  def _absmax(self) -> jax.Array:
    """float32, shaped as `absmax`."""
    if self.absmax2 is None or self.offset is None:
      return self.absmax
    *stack, n_in, n_out = self.shape
    n_blocks = -(-n_in * n_out // BLOCK)
    absmax2 = jnp.repeat(self.absmax2, BLOCK2, -1)[..., :n_blocks]
    offset = self.offset[..., None]
    if self.flat is None:
      absmax2 = absmax2.reshape(*stack, n_out, n_in // BLOCK)
      absmax2, offset = jnp.swapaxes(absmax2, -1, -2), offset[..., None]
    return _dynamic(self.absmax) * absmax2 + offset


def _nf4(codes: Array) -> jax.Array:
  """NF4[codes] by selects: a TPU looks up one number after the other."""
  values: list[Any] = [_bits(value) for value in NF4]
  for bit in range(4):
    odd = _mask(codes >> bit & 1)
    values = [
      _select(odd, high, low)
      for low, high in zip(values[::2], values[1::2], strict=True)
    ]
  return _float(values[0])


def _dynamic(codes: Array) -> jax.Array:
  """DYNAMIC[codes] to 2e-7 of each, without a table of 256.

  Code 127 is 0, and m above or below it is 10^(p - 6) (0.1 + 0.9 t) with its
  sign: p is m's highest bit, t in (0, 1) the middle of what its others cut.
  Code 255 is 1.
  """
  signed = codes.astype(jnp.int32) - 127
  m = jnp.abs(signed)
  power: Any = np.int32(0)
  fraction: Any = np.int32(0)
  for p in range(7):
    reached = _mask(m >= 1 << p)
    power = _select(reached, _bits(10.0 ** (p - 6)), power)
    fraction = _select(reached, _bits(0.5**p), fraction)
  t = (m.astype(jnp.float32) + np.float32(0.5)) * _float(fraction)
  t = t - np.float32(1)
  value = _float(power) * (np.float32(0.1) + np.float32(0.9) * t)
  last = jax.lax.bitcast_convert_type(value, jnp.int32)
  value = _float(_select(_mask(codes == 255), _bits(1.0), last))
  return jnp.where(signed < 0, -value, value)


def _bits(value: float) -> np.int32:
  return np.float32(value).view(np.int32)


def _float(bits: Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mask(true: Array) -> jax.Array:
  """All bits where it is true or 1."""
  return -true.astype(jnp.int32)


def _select(mask: Array, high: Array, low: Array) -> Array:
  """high where all bits are set, else low, of which both may be numbers.

  `jnp.where` makes arrays of numbers, which depend on nothing: jax takes them
  out of the scan over the layers, and they stay in memory for the backward pass.
  Each operand but the mask stands here once: XLA for TPU stores in int32 what
  is used twice (`low ^ mask & (low ^ high)`: 2 GiB for a matrix of a 7B).
  """
  return mask & high | ~mask & low


def abstract(
  shape: tuple[int, ...], dtype: Any, double: bool = True
) -> Nf4Weight:
  """A weight of ShapeDtypeStructs: which arrays [*stack, in, out] takes."""
  *stack, n_in, n_out = shape
  n = n_in * n_out
  n_blocks = -(-n // BLOCK)

  def of(dtype, *own):
    return jax.ShapeDtypeStruct((*stack, *own), dtype)

  whole = n_in % BLOCK == 0
  packed = (n_in // 2, n_out) if whole else (-(-n // 2),)
  absmax = (n_in // BLOCK, n_out) if whole else (n_blocks,)
  return Nf4Weight(
    of(np.uint8, *packed),
    of(np.uint8 if double else np.float32, *absmax),
    of(np.float32, -(-n_blocks // BLOCK2)) if double else None,
    of(np.float32) if double else None,
    jnp.dtype(dtype),
    None if whole else (n_in, n_out),
  )


def from_bitsandbytes(q: Quantised) -> Nf4Weight:
  """One matrix [out, in] as a weight [in, out] of numpy arrays."""
  n_out, n_in = q.shape
  if n_in % BLOCK:
    return Nf4Weight(
      q.packed, q.absmax, q.absmax2, q.offset, q.dtype, (n_in, n_out)
    )
  pairs = q.packed.reshape(n_out, -1, 2, HALF // 2)
  packed = np.empty((n_in // 2, n_out), np.uint8)
  for at in range(0, n_out, ROWS):
    rows = pairs[at : at + ROWS]
    # Bytes j and j + 16 of a block hold inputs 2 j, 2 j + 1 and those 32 on.
    first, second = rows[:, :, 0], rows[:, :, 1]
    halves = [first & 0xF0 | second >> 4, first << 4 | second & 0x0F]
    packed[:, at : at + ROWS] = np.stack(halves, -1).reshape(len(rows), -1).T
  absmax = np.ascontiguousarray(q.absmax.reshape(n_out, -1).T)
  return Nf4Weight(packed, absmax, q.absmax2, q.offset, q.dtype)


def to_bitsandbytes(w: Nf4Weight) -> Quantised:
  """What `from_bitsandbytes` was given; of a weight without stack axes."""
  n_in, n_out = w.shape
  packed, absmax = np.asarray(w.packed), np.asarray(w.absmax)
  if w.flat is None:
    halves = packed.T.reshape(n_out, -1, HALF // 2, 2)
    even, odd = halves[..., 0], halves[..., 1]
    pairs = [even & 0xF0 | odd >> 4, even << 4 | odd & 0x0F]
    packed, absmax = np.stack(pairs, 2).reshape(-1), absmax.T.reshape(-1)
  absmax2, offset = (
    None if x is None else np.asarray(x) for x in (w.absmax2, w.offset)
  )
  return Quantised(packed, absmax, absmax2, offset, (n_out, n_in), w.dtype)
