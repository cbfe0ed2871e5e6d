"""Rows of CSV and TSV: a header, then as many cells a row; all of it text."""

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from lorax_train.data import stream as streams
from lorax_train.data.problems import Problem, Problems, shorten
from lorax_train.data.rows import MAX_LINE_BYTES, File, Row, refuse
from lorax_train.errors import DataError


def read_table(stream: BinaryIO, file: File) -> Iterator[Row]:
  r"""Reads the text of a table, quoted with " as RFC 4180 has it.

  A quoted cell may hold delimiters, newlines and "" for a quote. Empty lines
  are passed over. A row's place is the line on which it begins.

  >>> from pathlib import Path
  >>> content = io.BytesIO(b'a,b\n1,"x\ny"\n2,\n')
  >>> list(read_table(content, File(Path('t.csv'), 't.csv')))[1]
  Row(fields={'a': '2', 'b': ''}, where='t.csv:4')

  Args:
    stream: its bytes, unpacked.
    file: cells are parted by tabs if it is named .tsv, or else by commas.

  Raises:
    DataError: the header, or at the end every ragged row counted.
  """
  path = file.path
  is_tsv = file.local.name.removesuffix('.gz').endswith('.tsv')
  header: list[str] = []
  width = 0
  problems = Problems()
  for line, cells in _records(stream, path, '\t' if is_tsv else ','):
    where = f'{path}:{line}'
    if isinstance(cells, csv.Error):
      problems.add(Problem(where, *_told(cells)))
    elif not width:
      header = _checked(cells, where)
      width = len(header)
    elif len(cells) != width:
      n = '1 cell' if len(cells) == 1 else f'{len(cells)} cells'
      problems.add(Problem(where, f'not the {width} cells of the header', n))
    else:
      yield Row(dict(zip(header, cells, strict=True)), where)
  refuse(problems, path)


def _records(
  stream: BinaryIO, path: str, delimiter: str
) -> Iterator[tuple[int, list[str] | csv.Error]]:
  """Each record and the line it begins on; after an error there are no more.

  What follows an open quote is one cell to its end, so that later errors would
  be about text that is none of their business.
  """
  lines = itertools.chain.from_iterable(
    io.StringIO(block, newline='') for block in _blocks(stream, path)
  )
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  limit = csv.field_size_limit
  while True:
    line = reader.line_num + 1
    # The module's own limit, for all of the process, is 128 KiB.
    before = limit(MAX_LINE_BYTES)
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield line, error
      return
    finally:
      limit(before)
    if cells:
      yield line, cells


def _blocks(stream: BinaryIO, path: str) -> Iterator[str]:
  """The text in parts that end where a line does; CR, LF and CRLF end one."""
  held: list[str] = []
  n_held = n_given = 0
  for text in streams.texts(stream, path):
    at = text.find('\0')
    if at >= 0:
      line, _ = streams.place(stream, path, n_given + n_held + at)
      raise DataError(
        f'{path}:{line}: holds a NUL byte, and so is no text; write it again as'
        ' UTF-8'
      )
    if held and held[-1].endswith('\r') and not text.startswith('\n'):
      yield ''.join(held)
      n_given += n_held
      held, n_held = [], 0
    # A CR at the very end may be half of a CRLF.
    end = max(text.rfind('\n'), text.rfind('\r', 0, -1)) + 1
    if end:
      yield ''.join([*held, text[:end]])
      n_given += n_held + end
      held, n_held = [], 0
    held.append(text[end:])
    n_held += len(text) - end
    if n_held > MAX_LINE_BYTES:
      # If it is one cell, the reader says so.
      yield ''.join(held)
      line, _ = streams.place(stream, path, n_given)
      raise DataError(
        f'{path}:{line}: a line over {MAX_LINE_BYTES // 2**20} MiB; is it a'
        ' table?'
      )
  if n_held:
    yield ''.join(held)


def _told(error: csv.Error) -> tuple[str, str]:
  """Reason and detail; the module's words where they say enough."""
  words = str(error)
  if 'unexpected end of data' in words:
    return 'a quote is opened and never closed', ''
  if 'field larger' in words:
    return f'a cell over {MAX_LINE_BYTES // 2**20} MiB', ''
  return 'wrongly quoted', shorten(words)


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
