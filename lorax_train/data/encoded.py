"""What a row becomes, and what can be wrong with it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from lorax_train.data.problems import RowError
from lorax_train.data.rows import Row

NO_LOSS = -100  # the label transformers and torch leave out of the loss

_PART = 1024  # rows encoded at once: keeps all cores busy, and memory small
_CHARACTERS = 2**22  # in that many the rows of a part are fewer
_T = TypeVar('_T')


class Drop(RowError):
  """A sound row that the run has no use for: dropped and counted."""


class TooLong(Drop):
  """A row that `truncation` does not cut."""


class Sizes(NamedTuple):
  """The most there is in rows of choices.

  Attributes:
    choices: how many a row has.
    length: tokens of one with its prompt.
    choice: tokens of one alone.
  """

  choices: int = 0
  length: int = 0
  choice: int = 0

  def most(self, other: 'Sizes') -> 'Sizes':
    """Of both."""
    return Sizes(*map(max, self, other))


class Encoded(NamedTuple):
  """ids = `bos` ids, then `prompt` ids that may be cut, then the rest.

  Of choices it is all their sequences, see sequences.py, and has their sizes.
  """

  ids: list[int]
  labels: list[int]
  bos: int
  prompt: int
  truncated: bool = False
  cut_off: bool = False
  merged: bool = False
  sizes: Sizes = Sizes()


def in_parts(rows: Iterable[Row], most: int = _PART) -> Iterator[list[Row]]:
  """Rows some at a time, to be encoded together.

  No more than `most`, and no further one once there is much text.
  """
  part: list[Row] = []
  size = 0
  for row in rows:
    part.append(row)
    size += _characters(row.fields)
    if len(part) == most or size >= _CHARACTERS:
      yield part
      part, size = [], 0
  if part:
    yield part


def _characters(fields: dict[str, Any]) -> int:
  """Of all strings in a row, however deep."""
  found = 0
  waiting: list[Any] = [fields]
  while waiting:
    value = waiting.pop()
    if isinstance(value, str):
      found += len(value)
    elif isinstance(value, dict):
      waiting += value.values()
    elif isinstance(value, list):
      waiting += value
  return found


def caught(function: Callable[..., _T], *args: Any) -> _T | RowError:
  """What a function gives, or the RowError that it raises."""
  try:
    return function(*args)
  except RowError as error:
    return error
  except RecursionError:  # of a row that JSON's own parser just managed
    return RowError('nested too deep')
