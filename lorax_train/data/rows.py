"""A row and its place, and what the readers of all kinds of files share."""

from pathlib import Path
from typing import Any, NamedTuple

from lorax_train.data.problems import Problem, describe
from lorax_train.errors import DataError

BOM = b'\xef\xbb\xbf'

# A longer line is a file of another kind (or one that lost its newlines):
# parsing it would only take the memory of the machine.
MAX_LINE_BYTES = 64 * 2**20


class Row(NamedTuple):
  """One object of the data and its place: `rows.jsonl:17`."""

  fields: dict[str, Any]
  where: str


class File(NamedTuple):
  """A file on this disk, and what it is called in messages."""

  local: Path
  path: str


def decode(data: bytes, path: str) -> str:
  """The text of a whole file, less its BOM.

  Raises:
    DataError: it is not UTF-8; the line and the byte are named.
  """
  try:
    return data.decode('utf-8').removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise DataError(
      f'{path}:{line}: not UTF-8 ({bad_byte(error)}); convert it, e.g. with'
      ' iconv'
    ) from error


def bad_byte(error: UnicodeDecodeError, start: int = 0) -> str:
  """`byte 0xff at offset 13`, of what began at `start`."""
  byte = error.object[error.start]
  return f'byte 0x{byte:02x} at offset {start + error.start}'


def refuse(problems: list[Problem], path: str) -> None:
  """Tells of all problems of a file at once.

  Raises:
    DataError: where there are any.
  """
  if problems:
    raise DataError(
      f'{path}: unreadable: {describe(problems)}; mend or remove them'
    )
