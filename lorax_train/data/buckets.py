"""Batches of rows of about one length, so that little is padding.

An epoch's rows, in their order, are cut into full batches bucket by bucket, and
what is left of a bucket moves up into the next longer one. The last batch of
the longest bucket is filled up with nothing. Each row is thus in one batch of
the epoch, whose batches are then shuffled. There are always as many as rows /
batch, rounded up: which epoch a step is in follows from its number, and the
order stays a pure function of (seed, step, global batch).
"""

import functools
from collections.abc import Sequence

import numpy as np

from lorax_train.data.batches import BATCHES, EMPTY, Walk, shuffled


def bounds_for(
  lengths: np.ndarray, bounds: Sequence[int], room: int
) -> tuple[int, ...]:
  """The buckets that are of use, from short to long.

  Args:
    lengths: tokens of each row.
    bounds: buckets that are wanted.
    room: one more, where the longest row fits in none of them.

  >>> bounds_for(np.array([3, 30, 90]), [8, 16, 32, 64], room=128)
  (8, 32, 128)
  """
  every = sorted(bounds)
  if lengths.max() > every[-1]:
    every.append(room)
  return tuple(every[i] for i in np.unique(np.searchsorted(every, lengths)))


class Buckets:
  """The order of rows in batches of one bucket each.

  Attributes:
    bounds: tokens of a row in a batch of each bucket, from short to long.
    n_batches: batches of an epoch.
  """

  def __init__(
    self,
    walk: Walk,
    lengths: np.ndarray,
    bounds: Sequence[int],
    global_batch: int,
    seed: int,
  ):
    """Cuts the rows of a walk into batches.

    Args:
      walk: the order of the rows; an epoch is as many of it as there are rows.
      lengths: tokens of each row.
      bounds: see `bounds_for`; the last holds the longest row.
      global_batch: rows of a batch.
      seed: of the run.
    """
    self.bounds = tuple(bounds)
    self.n_batches = -(-len(lengths) // global_batch)
    self._walk, self._n_rows = walk, len(lengths)
    self._lengths = lengths
    self._bucket_of = np.searchsorted(self.bounds, lengths)
    self._global_batch, self._seed = global_batch, seed
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def at(self, step: int) -> tuple[np.ndarray, int]:
    """The batch at `step`, counted from 0.

    Returns:
      Numbers of rows, int64 [global_batch], EMPTY where there is none; and the
      length of the batch.
    """
    epoch, number = divmod(step, self.n_batches)
    rows, lengths = self._epoch(epoch)
    return rows[number], int(lengths[number])

  def summary(self) -> str:
    """One line for the log, of the first epoch."""
    bounds = ', '.join(map(str, self.bounds))
    return f'in buckets of {bounds} tokens, padding {100 * self.padding:.1f} %'

  @property
  def padding(self) -> float:
    """Share of the first epoch's batches that is padding."""
    rows, lengths = self._epoch(0)
    room = int(lengths.sum()) * self._global_batch
    return 1 - int(self._lengths[rows[rows >= 0]].sum()) / room

  def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rows = self._walk(epoch * self._n_rows, self._n_rows)
    bucket_of = self._bucket_of[rows]
    places, lengths = [], []
    left = np.zeros(0, np.int64)
    for bucket, bound in enumerate(self.bounds):
      own = np.flatnonzero(bucket_of == bucket)
      # In the walk's order, or what is left would always share a batch.
      both = np.sort(np.concatenate([left, own]))
      n_full = len(both) // self._global_batch
      full, left = np.split(both, [n_full * self._global_batch])
      places.append(rows[full])
      lengths += [bound] * n_full
    if len(left):
      fill = np.full(self._global_batch - len(left), EMPTY)
      places += [rows[left], fill]
      lengths.append(self.bounds[-1])
    order = shuffled(self.n_batches, self._seed, BATCHES, epoch)
    cut = np.concatenate(places).reshape(self.n_batches, self._global_batch)
    return cut[order], np.array(lengths)[order]
