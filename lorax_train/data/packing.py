"""Rows into packs: several rows side by side, so that little is padding.

Best-fit decreasing: from the longest row to the shortest, each goes into the
fullest pack that still has room for it. Which rows share a pack is a function
of their lengths alone, and stays so through a run: the order of the data is an
order of packs, a function of (seed, step, global batch) as that of rows is.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packs(NamedTuple):
  """Rows that share a pack.

  Attributes:
    rows: the numbers of each pack's rows, from low to high.
    length: room of a pack in tokens.
    tokens: all tokens of the rows.
  """

  rows: list[list[int]]
  length: int
  tokens: int

  def summary(self) -> str:
    """One line for the log."""
    n_rows = sum(map(len, self.rows))
    room = len(self.rows) * self.length
    padding = 100 * (1 - self.tokens / room)
    return (
      f'packed {n_rows:,} rows into {len(self.rows):,} of {self.length:,}'
      f' tokens, padding {padding:.1f} %'
    )


def pack_rows(
  lengths: Sequence[int] | np.ndarray, capacity: int, numbers: np.ndarray
) -> Packs:
  """Packs of the rows `numbers`, whose tokens are `lengths`, none of them cut.

  Raises:
    ValueError: a row is longer than a pack.
  """
  rows = [
    [int(numbers[i]) for i in pack] for pack in best_fit(lengths, capacity)
  ]
  return Packs(rows, capacity, int(np.sum(lengths)))


def best_fit(
  lengths: Sequence[int] | np.ndarray, capacity: int
) -> list[list[int]]:
  """Which items share a bin: best-fit decreasing, O(n log n).

  Of items of one length the first comes first, of bins equally full the one
  that was opened first.

  Returns:
    The items of each bin from low to high, bins as they were opened.

  Raises:
    ValueError: an item is longer than a bin.
  """
  sizes = np.asarray(lengths, np.int64)
  if sizes.size and sizes.max() > capacity:
    i = int(sizes.argmax())
    raise ValueError(f'row {i} has {sizes[i]} tokens, a pack {capacity}')
  bins: list[list[int]] = []
  # Bins by their room, and that as a bit set: the least room of n or more is
  # its lowest bit from n on.
  of_room: dict[int, list[int]] = {}
  rooms = 0
  for item in np.argsort(-sizes, kind='stable').tolist():
    size = int(sizes[item])
    enough = rooms >> size
    if enough:
      room = size + (enough & -enough).bit_length() - 1
      chosen = heapq.heappop(of_room[room])
      if not of_room[room]:
        rooms ^= 1 << room
    else:
      room, chosen = capacity, len(bins)
      bins.append([])
    bins[chosen].append(item)
    left = room - size
    heapq.heappush(of_room.setdefault(left, []), chosen)
    rooms |= 1 << left
  return [sorted(items) for items in bins]
