"""Rows of CSV and TSV: a header, then as many cells a row; all of it text."""

import contextlib
import csv
import io
from collections import Counter
from collections.abc import Iterator

from lorax_train.data.problems import Problem, shorten
from lorax_train.data.rows import MAX_LINE_BYTES, Row, decode, refuse
from lorax_train.errors import DataError


def read_table(data: bytes, path: str, delimiter: str) -> list[Row]:
  r"""Reads the text of a table, quoted with " as RFC 4180 has it.

  A quoted cell may hold delimiters, newlines and "" for a quote. Empty lines
  are passed over. A row's place is the line on which it begins.

  >>> read_table(b'a,b\n1,"x\ny"\n2,\n', 't.csv', ',')[1]
  Row(fields={'a': '2', 'b': ''}, where='t.csv:4')

  Raises:
    DataError: the header, or every ragged row counted and the first named.
  """
  text = decode(data, path)
  _check_text(text, path)
  header: list[str] = []
  rows, problems = [], []
  for line, cells in _records(text, delimiter):
    where = f'{path}:{line}'
    if isinstance(cells, csv.Error):
      problems.append(Problem(where, *_told(cells)))
    elif not header:
      header = _checked(cells, where)
    elif len(cells) != len(header):
      n = '1 cell' if len(cells) == 1 else f'{len(cells)} cells'
      reason = f'not the {len(header)} cells of the header'
      problems.append(Problem(where, reason, n))
    else:
      rows.append(Row(dict(zip(header, cells, strict=True)), where))
  refuse(problems, path)
  return rows


def _records(
  text: str, delimiter: str
) -> Iterator[tuple[int, list[str] | csv.Error]]:
  """Each record and the line it begins on; after an error there are no more.

  What follows an open quote is one cell to its end, so that later errors would
  be about text that is none of their business.
  """
  lines = io.StringIO(text, newline='')
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  with _long_cells():
    while True:
      line = reader.line_num + 1
      try:
        cells = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        yield line, error
        return
      if cells:
        yield line, cells


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
  # The module's own limit, for all of the process, is 128 KiB.
  before = csv.field_size_limit(MAX_LINE_BYTES)
  try:
    yield
  finally:
    csv.field_size_limit(before)


def _told(error: csv.Error) -> tuple[str, str]:
  """Reason and detail; the module's words where they say enough."""
  words = str(error)
  if 'unexpected end of data' in words:
    return 'a quote is opened and never closed', ''
  if 'field larger' in words:
    return f'a cell over {MAX_LINE_BYTES // 2**20} MiB', ''
  return 'wrongly quoted', shorten(words)


def _check_text(text: str, path: str) -> None:
  at = text.find('\0')
  if at >= 0:
    line = text.count('\n', 0, at) + 1
    raise DataError(
      f'{path}:{line}: holds a NUL byte, and so is no text; write it again as'
      ' UTF-8'
    )


def _checked(header: list[str], where: str) -> list[str]:
  if not all(header):
    raise DataError(
      f'{where}: column {header.index("") + 1} of the header has no name; the'
      ' first line names all columns'
    )
  repeated = [name for name, n in Counter(header).items() if n > 1]
  if repeated:
    raise DataError(
      f'{where}: the header has {shorten(repr(repeated[0]))} twice; rename one'
    )
  return header
