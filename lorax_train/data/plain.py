"""Rows of plain text: a document a row, parted by a separator."""

from collections.abc import Iterator
from typing import BinaryIO

from lorax_train.data import stream as streams
from lorax_train.data.rows import MAX_LINE_BYTES, File, Row
from lorax_train.errors import DataError

COLUMN = 'text'
SEPARATOR = '<|endoftext|>'
# In characters: what is longer and has no separator was hardly meant as one.
_ONE = 20_000


def read_text(
  stream: BinaryIO, file: File, separator: str = SEPARATOR
) -> Iterator[Row]:
  r"""Reads documents, each without the empty lines around it.

  What is blank between two separators is passed over. A row's place is the
  line on which its document begins.

  >>> import io
  >>> from pathlib import Path
  >>> content = io.BytesIO(b'a\nb\n<|endoftext|>\n\nc\n')
  >>> for row in read_text(content, File(Path('t.txt'), 't.txt')):
  ...   print(row)
  Row(fields={'text': 'a\nb'}, where='t.txt:1')
  Row(fields={'text': 'c'}, where='t.txt:5')

  Args:
    stream: its bytes, unpacked.
    file: what it is called.
    separator: what parts documents; '' where the file is one.

  Raises:
    DataError: not UTF-8, or a document that is none: endless, or a long file
      without the separator.
  """
  held, line, searched, parted = '', 1, 0, False
  for part in streams.texts(stream, file.path):
    held += part
    while (at := held.find(separator, searched) if separator else -1) >= 0:
      yield from _row(held[:at], line, file)
      parted, end = True, at + len(separator)
      line += held.count('\n', 0, end)
      held, searched = held[end:], 0
    # The separator may be cut here.
    searched = max(0, len(held) - len(separator) + 1)
    if len(held) > MAX_LINE_BYTES:
      raise DataError(
        f'{file.path}:{line}: a document over {MAX_LINE_BYTES // 2**20} MiB: cut'
        ' it, or say what stands between two: data.separator'
      )
  if separator and not parted and len(held) > _ONE:
    raise DataError(
      f'{file.path}: no {separator!r} in {len(held):,} characters: say what stands'
      " between two documents, data.separator, or '' if it is one"
    )
  yield from _row(held, line, file)


def _row(text: str, line: int, file: File) -> Iterator[Row]:
  document = text.lstrip('\r\n')
  line += text.count('\n', 0, len(text) - len(document))
  document = document.rstrip('\r\n')
  if document.strip():
    yield Row({COLUMN: document}, f'{file.path}:{line}')
