"""Sets of tokenised rows as one, numbered one set after the other."""

import bisect
import functools
import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from lorax_train.data.tokenized import Report

T_co = TypeVar('T_co', covariant=True)


class Column(Protocol[T_co]):
  """What has a value for each row."""

  def __getitem__(self, i: int, /) -> T_co:
    """Of row i."""


class RowSet(Protocol):
  """Rows as ids and labels: a `TokenizedSet`, or several `Joined`."""

  @property
  def ids(self) -> Column[np.ndarray]:
    """Of each row, int32 [T]."""

  @property
  def labels(self) -> Column[np.ndarray]:
    """Of each row, int32 [T], -100 where there is no loss."""

  @property
  def where(self) -> Column[str]:
    """The place of each row in the data."""

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each row, int64 [rows]."""

  @property
  def report(self) -> Report:
    """What became of the rows that were read."""

  @property
  def fingerprint(self) -> str:
    """Sha256 over ids and labels."""


class Joined:
  """Several sets as one.

  Attributes:
    starts: number of each set's first row, int64 [sets].
    lengths: tokens of each row, int64 [rows].
    ids: of each row, int32 [T].
    labels: likewise.
    where: the place of each row in the data.
  """

  def __init__(self, sets: Sequence[RowSet]):
    """Copies nothing but lengths."""
    self._sets = sets
    of_sets = [rows.lengths for rows in sets]
    self.lengths = np.concatenate(of_sets)
    self.starts = starts_of(map(len, of_sets))
    begins = self.starts.tolist()
    self.ids: Column[np.ndarray] = _Chained([s.ids for s in sets], begins)
    self.labels: Column[np.ndarray] = _Chained([s.labels for s in sets], begins)
    self.where: Column[str] = _Chained([s.where for s in sets], begins)

  @property
  def report(self) -> Report:
    """Of all of them."""
    return functools.reduce(operator.add, (rows.report for rows in self._sets))

  @property
  def fingerprint(self) -> str:
    """Sha256 over the sets' own, in their order."""
    prints = '+'.join(rows.fingerprint for rows in self._sets)
    return hashlib.sha256(prints.encode()).hexdigest()


def starts_of(sizes: Iterable[int]) -> np.ndarray:
  """Where each of several begins, one after the other.

  >>> starts_of([3, 1, 2]).tolist()
  [0, 3, 4]
  """
  return np.cumsum([0, *sizes])[:-1]


class _Chained:
  """Columns one after the other."""

  def __init__(self, columns: Sequence[Column[Any]], starts: Sequence[int]):
    self._columns, self._starts = columns, starts

  def __getitem__(self, i: int, /) -> Any:
    at = bisect.bisect_right(self._starts, i) - 1
    return self._columns[at][i - self._starts[at]]
