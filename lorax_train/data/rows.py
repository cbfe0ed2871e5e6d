"""A row and its place, and what the readers of all kinds of files share."""

from pathlib import Path
from typing import Any, NamedTuple

from lorax_train.data.problems import Problems, describe
from lorax_train.errors import DataError

# A longer line is a file of another kind (or one that lost its newlines):
# parsing it would only take the memory of the machine.
MAX_LINE_BYTES = 64 * 2**20


class Row(NamedTuple):
  """One object of the data and its place: `rows.jsonl:17`."""

  fields: dict[str, Any]
  where: str


class File(NamedTuple):
  """A file on this disk, and what it is called in messages.

  Attributes:
    local: where it lies; what kind it is says its suffix.
    path: its name in messages.
    before: rows of the set in the files before this one.
    of_set: whether `path` is the name of a set of several files; its rows are
      then numbered through them.
  """

  local: Path
  path: str
  before: int = 0
  of_set: bool = False

  @property
  def row(self) -> str:
    """What stands before a row's number in its place.

    >>> File(Path('a.json'), 'a.json').row
    'a.json: row '
    >>> File(Path('x.arrow'), 'own/set[train]', 1000, True).row
    'own/set[train] row '
    """
    return f'{self.path} row ' if self.of_set else f'{self.path}: row '


def bad_byte(error: UnicodeDecodeError, start: int = 0) -> str:
  """`byte 0xff at offset 13`, of what began at `start`."""
  byte = error.object[error.start]
  return f'byte 0x{byte:02x} at offset {start + error.start}'


def refuse(problems: Problems, path: str) -> None:
  """Tells of all problems of a file at once.

  Raises:
    DataError: where there are any.
  """
  if problems:
    raise DataError(
      f'{path}: unreadable: {describe(problems)}; mend or remove them'
    )
