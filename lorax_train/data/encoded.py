"""What a row becomes, and what can be wrong with it."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from lorax_train.data.problems import RowError
from lorax_train.data.rows import Row

NO_LOSS = -100  # the label transformers and torch leave out of the loss

_PART = 1024  # rows encoded at once: keeps all cores busy, and memory small
_T = TypeVar('_T')


class Drop(RowError):
  """A sound row that the run has no use for: dropped and counted."""


class Encoded(NamedTuple):
  """ids = `bos` ids, then `prompt` ids that may be cut, then the rest."""

  ids: list[int]
  labels: list[int]
  bos: int
  prompt: int
  truncated: bool = False
  cut_off: bool = False
  merged: bool = False


def in_parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
  """Rows some at a time, to be encoded together."""
  rows = iter(rows)
  while part := list(itertools.islice(rows, _PART)):
    yield part


def caught(function: Callable[..., _T], *args: Any) -> _T | RowError:
  """What a function gives, or the RowError that it raises."""
  try:
    return function(*args)
  except RowError as error:
    return error
