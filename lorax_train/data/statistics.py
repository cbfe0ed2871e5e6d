"""What rows of tokens are like: lengths, padding, ends, repeats.

Rows are looked at a chunk at a time, so that nothing but a few numbers a row is
in memory besides the set itself.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.joined import RowSet

_CHUNK = 4096  # rows
_TOKENS = 2**20  # of a chunk, unless a single row has more
_BINS = 10
_ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)  # widths of bins, times 10^k
QUANTILES = (1, 5, 25, 50, 75, 95, 99)


class Chunk(NamedTuple):
  """Some rows of a set, one behind the other.

  Attributes:
    rows: their numbers in the set.
    begins: where each begins.
    ids: of all of them.
    labels: likewise; the first of each row, which nothing predicts, is -100.
  """

  rows: np.ndarray
  begins: np.ndarray
  ids: np.ndarray
  labels: np.ndarray

  @property
  def ends(self) -> np.ndarray:
    """The last place of each row."""
    return np.append(self.begins[1:], len(self.ids)) - 1

  def per_row(self, flags: np.ndarray) -> np.ndarray:
    """How many of each row's places are flagged, int64 [rows]."""
    return np.add.reduceat(flags.astype(np.int64), self.begins)

  def last_label(self) -> np.ndarray:
    """The last label of each row that is learned; -100 where none is."""
    learned = self.labels != NO_LOSS
    places = np.where(learned, np.arange(len(learned)), -1)
    last = np.maximum.reduceat(places, self.begins)
    return np.where(last < 0, NO_LOSS, self.labels[last])


def chunks(
  tokenized: RowSet, rows: np.ndarray, size: int = _CHUNK
) -> Iterator[Chunk]:
  """The rows of a set in their order, `size` at a time, or fewer long ones."""
  totals = np.cumsum(tokenized.lengths[rows])
  begin = 0
  while begin < len(rows):
    before = totals[begin - 1] if begin else 0
    fit = int(np.searchsorted(totals, before + _TOKENS, 'right'))
    end = min(max(fit, begin + 1), begin + size)
    part = rows[begin:end]
    begin = end
    ids = [np.asarray(tokenized.ids[i]) for i in part]
    lengths = np.array([len(row) for row in ids], np.int64)
    labels = np.concatenate([tokenized.labels[i] for i in part])
    begins = np.cumsum(lengths) - lengths
    labels[begins] = NO_LOSS
    yield Chunk(np.asarray(part), begins, np.concatenate(ids), labels)


def learned(tokenized: RowSet, rows: np.ndarray) -> np.ndarray:
  """How many tokens of each row are learned, int64 [rows]."""
  counts = [c.per_row(c.labels != NO_LOSS) for c in chunks(tokenized, rows)]
  return np.concatenate(counts) if counts else np.zeros(0, np.int64)


def without_end(
  tokenized: RowSet, rows: np.ndarray, ends: Sequence[int]
) -> np.ndarray:
  """Those of the rows whose last learned token is none of `ends`."""
  found = [
    c.rows[~np.isin(c.last_label(), ends)] for c in chunks(tokenized, rows)
  ]
  return np.concatenate(found) if found else np.zeros(0, np.int64)


def majority(tokenized: RowSet, rows: np.ndarray) -> float:
  """The share of the rows that learn what most learn: an accuracy to beat."""
  learned: Counter[bytes] = Counter()
  for i in rows:
    labels = tokenized.labels[i]
    learned[labels[labels != NO_LOSS].tobytes()] += 1
  return max(learned.values()) / len(rows)


class Repeats(NamedTuple):
  """Rows whose ids are those of another row.

  Attributes:
    rows: numbers of the rows, in their order.
    earlier: for each, the number of the first row that has the same ids.
  """

  rows: np.ndarray
  earlier: np.ndarray


def duplicates(tokenized: RowSet, rows: np.ndarray) -> Repeats:
  """Those of the rows that repeat an earlier one of them."""
  first = _first_alike(_digests(tokenized, rows))
  again = np.flatnonzero(first != np.arange(len(rows)))
  return Repeats(rows[again], rows[first[again]])


def leaks(
  train_set: RowSet,
  train_rows: np.ndarray,
  eval_set: RowSet,
  eval_rows: np.ndarray,
) -> Repeats:
  """Those of `eval_rows` that are among `train_rows` as well."""
  if not len(eval_rows):
    return Repeats(eval_rows, train_rows[:0])
  n = len(train_rows)
  both = [_digests(train_set, train_rows), _digests(eval_set, eval_rows)]
  first = _first_alike(np.concatenate(both))[n:]
  seen = np.flatnonzero(first < n)
  return Repeats(eval_rows[seen], train_rows[first[seen]])


def _digests(tokenized: RowSet, rows: np.ndarray) -> np.ndarray:
  """128 bits of each row's ids, uint64 [rows, 2]."""
  digests = np.zeros((len(rows), 2), np.uint64)
  for n, i in enumerate(rows):
    content = np.asarray(tokenized.ids[i]).astype('<i4').tobytes()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    digests[n] = np.frombuffer(digest, np.uint64)
  return digests


def _first_alike(digests: np.ndarray) -> np.ndarray:
  """For each row of digests the first row that equals it, int64 [rows]."""
  n = len(digests)
  # stable: of equal rows the first comes first
  order = np.lexsort((digests[:, 1], digests[:, 0]))
  ranked = digests[order]
  new = np.ones(n, bool)
  new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
  leader = np.maximum.accumulate(np.where(new, np.arange(n), 0))
  first = np.zeros(n, np.int64)
  first[order] = order[leader]
  return first


def padding(tokens: int, n_rows: int, length: int) -> float:
  """The share of batches of `n_rows` rows of `length` that is padding.

  >>> padding(75, 10, 10)
  0.25
  """
  return 1 - tokens / (n_rows * length) if n_rows else 0.0


def quantiles(lengths: np.ndarray) -> dict[int, int]:
  """The least length that so many per cent of the rows don't surpass."""
  values = np.percentile(lengths, QUANTILES, method='inverted_cdf')
  return {q: int(v) for q, v in zip(QUANTILES, values, strict=True)}


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
  """Rows by length in at most 10 bins of one round width.

  >>> histogram(np.array([1, 2, 2, 15]))
  [(1, 2, 3), (3, 4, 0), (5, 6, 0), (7, 8, 0), (9, 10, 0), (11, 12, 0), (13, 14, 0), (15, 16, 1)]

  Returns:
    (first length, last length, rows) of each bin, from length 1 on.
  """
  width = _round_width(int(lengths.max()))
  counts = np.bincount((np.asarray(lengths) - 1) // width)
  return [
    (b * width + 1, (b + 1) * width, int(n)) for b, n in enumerate(counts)
  ]


def _round_width(longest: int) -> int:
  least = longest / _BINS
  decade = 10 ** math.floor(math.log10(max(least, 1)))
  widths = (factor * decade for factor in _ROUND)
  return next(int(w) for w in widths if w >= least and w == int(w))
