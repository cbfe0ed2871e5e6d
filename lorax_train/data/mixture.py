"""Several sources in fixed proportions: what is drawn at which position.

Positions come in blocks of 1,024. At the end of each block every source has had
its share of all positions so far, to less than one draw; within a block the
sources are shuffled. The n-th draw of a source is the n-th of its own walk,
epoch after epoch, each in an order of its own. So all of it is a pure function
of (seed, position), as with a single source.

What a block takes of each source is apportioned as in Tijdeman's chairman
assignment (Discrete Mathematics 32, 1980): a source has at least the whole
draws that it is due, and what is left goes to those whose next draw is due
first. The method of largest remainders can't do it: from one block to the next
it may take a draw back.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lorax_train.data.batches import BLOCK, shuffled, walk_of
from lorax_train.data.joined import starts_of

BLOCK_SIZE = 1024


def shares(weights: Sequence[float]) -> tuple[int, ...]:
  """Weights as whole numbers in the same proportions, exactly as written.

  >>> shares([0.7, 0.3])
  (7, 3)
  >>> shares([2, 1e-3, 0.5])
  (2000, 1, 500)
  """
  exact = [Fraction(repr(float(weight))) for weight in weights]
  whole = math.lcm(*(f.denominator for f in exact))
  parts = [int(f * whole) for f in exact]
  return tuple(part // math.gcd(*parts) for part in parts)


def apportion(
  total: int, parts: Sequence[int], before: Sequence[int]
) -> tuple[int, ...]:
  """How many of the first `total` draws are each source's.

  Args:
    total: draws.
    parts: shares of the sources.
    before: what was each one's of fewer draws; nobody loses any.

  Returns:
    Numbers that sum to `total`, each less than 1 from total * its share.

  >>> apportion(10, (1, 1, 1), (0, 0, 0))
  (4, 3, 3)
  """
  whole = sum(parts)
  due = [total * part // whole for part in parts]
  drawn = [max(d, b) for d, b in zip(due, before, strict=True)]
  open_to = [
    s
    for s, part in enumerate(parts)
    if drawn[s] == due[s] and total * part % whole
  ]
  open_to.sort(key=lambda s: (Fraction(due[s] + 1, parts[s]), s))
  for s in open_to[: total - sum(drawn)]:
    drawn[s] += 1
  return tuple(drawn)


class Mixture:
  """The order of what is drawn from several sources.

  What is numbered are the rows, or packs, of all sources, one source after the
  other.
  """

  def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
    """Sources of so many rows or packs, drawn in proportion to `weights`."""
    self._parts, self._seed = shares(weights), seed
    self._starts = starts_of(sizes)
    self._walks = [walk_of(size, seed, s) for s, size in enumerate(sizes)]
    # After so many blocks every share is a whole number: it begins anew.
    whole = sum(self._parts)
    self._period = whole // math.gcd(whole, BLOCK_SIZE)
    self._last = 0, (0,) * len(sizes)
    self._block = functools.lru_cache(maxsize=64)(self._make_block)

  def between(self, begin: int, count: int) -> np.ndarray:
    """`count` draws from position `begin` on: int64 [count]."""
    first, offset = divmod(begin, BLOCK_SIZE)
    last = (begin + count - 1) // BLOCK_SIZE
    blocks = [self._block(block) for block in range(first, last + 1)]
    return np.concatenate(blocks)[offset : offset + count]

  def drawn(self, blocks: int) -> tuple[int, ...]:
    """How many draws of so many blocks are each source's."""
    rounds, rest = divmod(blocks, self._period)
    of_round = self._period * BLOCK_SIZE // sum(self._parts)
    return tuple(
      rounds * of_round * part + drawn
      for part, drawn in zip(
        self._parts, self._drawn_in_round(rest), strict=True
      )
    )

  def _drawn_in_round(self, blocks: int) -> tuple[int, ...]:
    nothing = (0,) * len(self._parts)
    if min(self._parts) * BLOCK_SIZE >= sum(self._parts):
      # All are due a draw a block: none is still ahead from an earlier one.
      return apportion(blocks * BLOCK_SIZE, self._parts, nothing)
    at, drawn = self._last
    if at > blocks:
      at, drawn = 0, nothing
    for block in range(at + 1, blocks + 1):
      drawn = apportion(block * BLOCK_SIZE, self._parts, drawn)
    self._last = blocks, drawn
    return drawn

  def _make_block(self, block: int) -> np.ndarray:
    before, after = self.drawn(block), self.drawn(block + 1)
    counts = np.subtract(after, before)
    source_of = np.repeat(np.arange(len(counts)), counts)
    source_of = source_of[shuffled(BLOCK_SIZE, self._seed, BLOCK, block)]
    draws = np.zeros(BLOCK_SIZE, np.int64)
    for s, walk in enumerate(self._walks):
      own = walk(before[s], int(counts[s]))
      draws[source_of == s] = self._starts[s] + own
    draws.setflags(write=False)
    return draws
