"""NF4 as bitsandbytes keeps it: one matrix, flattened, in numpy.

A matrix [out, in] is read row by row and cut into blocks of 64. Each block is
divided by its largest magnitude (absmax), and each number replaced by the
nearest of 16 (NF4, Dettmers et al. 2023, appendix E); two make a byte, the
first of them its high half. Double quantisation takes the mean off the absmax
and stores what is left in blocks of 256, a byte each.

To the bit as bitsandbytes 0.50 does it on a CPU, but for the mean, which is
summed in float64 here and in float32 in an order of the machine's own there.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

BLOCK, BLOCK2 = 64, 256
# Numbers at a time: what is made on the way stays in a core's own cache.
_CHUNK = 1 << 16
# Rows at a time that are turned into columns: with more of them, each byte of
# a column is a miss of the cache.
ROWS = 16
# bitsandbytes' least divisor: a block of zeros is divided by it.
_LEAST = np.float32(1e-38)
_LEVELS = 1 << 16

NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


def _dynamic_map() -> np.ndarray:
  """The 256 numbers that a byte of absmax stands for, ascending.

  A sign, a power of ten and a fraction that has the more bits the larger the
  power is (Dettmers et al. 2022, section 1.3).
  """
  half = np.float32(2)
  found: list[np.ndarray] = [np.zeros(1), np.ones(1)]
  for power in range(7):
    n = 1 << power
    # Each end is counted from its own side, and rounded once.
    first, last = np.float32(0.1), np.float32(1)
    step, i = np.float64((last - first) / np.float32(n)), np.arange(n + 1)
    ends = np.where(i < (n + 1) // 2, first + step * i, last - step * (n - i))
    ends = ends.astype(np.float32)
    middles = np.float32(10.0 ** (power - 6)) * ((ends[:-1] + ends[1:]) / half)
    found += [middles, -middles]
  return np.sort(np.concatenate(found).astype(np.float32))


DYNAMIC = _dynamic_map()


@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
  """One matrix [out, in] in NF4, its numbers in row-major order.

  Attributes:
    packed: [ceil(out in / 2)] uint8.
    absmax: [ceil(out in / 64)] uint8, or float32 where it is not quantised
      itself.
    absmax2: [ceil(blocks / 256)] float32; None with a float32 absmax.
    offset: [] float32, likewise.
    shape: (out, in).
    dtype: what it was made from, and stands for.
  """

  packed: np.ndarray
  absmax: np.ndarray
  absmax2: np.ndarray | None
  offset: np.ndarray | None
  shape: tuple[int, int]
  dtype: Any


@np.errstate(invalid='ignore')  # the caller is told, see below
def quantise(matrix: np.ndarray, double: bool = True) -> Quantised:
  """A matrix [out, in] of floats in NF4.

  What is not finite makes its block's absmax, and with it absmax2 and offset,
  not finite: look at them, or before.

  Args:
    matrix: float32, bfloat16 or float16.
    double: whether the absmax is quantised too.

  >>> q = quantise(np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 32))
  >>> q.packed.shape, q.absmax.shape, q.absmax2.shape, hex(q.packed[0])
  ((48,), (2,), (1,), '0x0')
  """
  flat = np.ascontiguousarray(matrix).reshape(-1)
  packed = np.empty(-(-flat.size // 2), np.uint8)
  absmax = np.empty(-(-flat.size // BLOCK), np.float32)
  for at in range(0, flat.size, _CHUNK):
    part = flat[at : at + _CHUNK].astype(np.float32)
    peaks = np.maximum.reduceat(np.abs(part), np.arange(0, part.size, BLOCK))
    absmax[at // BLOCK :][: peaks.size] = peaks
    packed[at // 2 :][: -(-part.size // 2)] = _codes(part, peaks)
  if flat.size % BLOCK:
    absmax[-1] = np.maximum(absmax[-1], _LEAST)
  q = Quantised(packed, absmax, None, None, matrix.shape, matrix.dtype)
  return doubly(q) if double else q


def _codes(part: np.ndarray, peaks: np.ndarray) -> np.ndarray:
  """The packed bytes of float32 numbers, which are overwritten."""
  rest = part.size % BLOCK
  whole = part[: part.size - rest].reshape(-1, BLOCK)
  peaks = np.maximum(peaks, _LEAST)
  whole *= (np.float32(1) / peaks[: len(whole)])[:, None]
  if rest:
    part[-rest:] /= peaks[-1]
  if part.size % 2:
    part = np.append(part, np.float32(0))
  codes = np.zeros(part.size, np.uint8)
  above = np.empty(part.size, bool)
  # Fifteen comparisons run faster than one search.
  for bound in (NF4[:-1] + NF4[1:]) / np.float32(2):
    np.greater(part, bound, out=above)
    np.add(codes, above.view(np.uint8), out=codes)
  pairs = codes.view('<u2')
  return (pairs << 4 | pairs >> 8).astype(np.uint8)


@np.errstate(invalid='ignore')
def doubly(q: Quantised, offset: np.ndarray | None = None) -> Quantised:
  """The same with its float32 absmax quantised.

  Args:
    q: with a float32 absmax.
    offset: [] float32 to take off the absmax; None for its mean.
  """
  absmax = q.absmax
  if offset is None:
    offset = np.asarray(np.mean(absmax, dtype=np.float64), np.float32)
  left = absmax - offset
  starts = np.arange(0, left.size, BLOCK2)
  peaks = np.maximum.reduceat(np.abs(left), starts)
  some = np.where(peaks == 0, np.float32(1), peaks)
  at = np.arange(left.size) // BLOCK2
  x = np.clip(left * (np.float32(1) / some)[at], -1, 1).astype(np.float32)
  # bitsandbytes rounds to one of 65,536 levels first, of which each has its
  # byte. In float64, rounded once to float32: it is a fused product and sum.
  half = (x + np.float32(1)) * np.float32(0.5)
  level = (half.astype(np.float64) * (_LEVELS - 1) + 0.5).astype(np.float32)
  level = np.nan_to_num(level).astype(np.int32)
  codes = np.where(peaks[at] == 0, np.uint8(0), _bytes_of_levels()[level])
  return dataclasses.replace(
    q,
    absmax=codes.astype(np.uint8),
    absmax2=peaks,
    offset=np.asarray(offset, np.float32),
  )


@functools.cache
def _bytes_of_levels() -> np.ndarray:
  """The byte of each of the 65,536 levels from -1 to 1."""
  steps = np.float32(2) * np.arange(_LEVELS, dtype=np.float32)
  values = np.float32(-1) + steps / np.float32(_LEVELS - 1)
  middles = np.float32(0.5) * (DYNAMIC[:-1] + DYNAMIC[1:])
  return np.searchsorted(middles, values, 'left').astype(np.uint8)
