"""Files as streams: opened, unpacked and decoded a chunk at a time."""

import codecs
import contextlib
import functools
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lorax_train.data.problems import one_line
from lorax_train.data.rows import MAX_LINE_BYTES, File, bad_byte
from lorax_train.errors import DataError

BOM = b'\xef\xbb\xbf'
CHUNK = 2**17

# How files begin that are no text, and what is to be done about each. Four
# letters alone could be the first column of a table.
_NO_TEXT = (
  (b'\x1f\x8b', 'gzip', 'give it a name that ends in .gz'),
  (b'PAR1\x15', 'Parquet', 'give it a name that ends in .parquet'),
  (b'ARROW1\0', 'Arrow', 'give it a name that ends in .arrow'),
  (b'PK\x03\x04', 'a zip archive', 'unpack it'),
  (b'\x28\xb5\x2f\xfd', 'packed with zstd', 'unpack it'),
  (b'\xfd7zXZ\0', 'packed with xz', 'unpack it'),
  (
    b'version https://git-lfs',
    'a Git LFS pointer',
    'run git lfs pull',
  ),
)


class State(NamedTuple):
  """What a file is told from a changed one by."""

  device: int
  inode: int
  size: int
  changed: int


def check(file: File) -> State:
  """How a file is now.

  Raises:
    DataError: it can't be looked at, or is no file but a pipe or the like.
  """
  try:
    found = os.stat(file.local)
  except (OSError, ValueError) as error:
    raise unreadable(error, file.local, file.path) from error
  if not stat.S_ISREG(found.st_mode):
    raise DataError(
      f'{file.path}: is {_kind(found.st_mode)}, and data is read more than'
      ' once; write it to a file'
    )
  return State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _kind(mode: int) -> str:
  for is_it, kind in (
    (stat.S_ISDIR, 'a directory'),
    (stat.S_ISFIFO, 'a pipe'),
    (stat.S_ISSOCK, 'a socket'),
  ):
    if is_it(mode):
      return kind
  return 'a device'


def unreadable(error: Exception, local: Path, path: str) -> DataError:
  """Why a path can't be looked at or opened, in one line."""
  if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
    if os.path.islink(local):
      return DataError(
        f'{path}: a link to {os.readlink(local)}, which is not there; mend it'
      )
    return DataError(f'{path}: no such file; check --config.data.path')
  cause = getattr(error, 'strerror', None) or error
  return DataError(
    one_line(f'{path}: cannot be opened ({cause}); check its permissions')
  )


@contextlib.contextmanager
def unchanged(file: File, before: State | None = None) -> Iterator[None]:
  """Refuses a file that is not, after the block, what it was before.

  Whatever is found wrong within the block is then no news.

  Args:
    file: the file.
    before: how it was; None for how it is when the block begins.
  """
  before = before or check(file)

  def compare() -> None:
    if before != check(file):
      raise DataError(
        f'{file.path}: was changed while it was read; wait until it is written'
      )

  try:
    yield
  except DataError:
    compare()
    raise
  compare()


@contextlib.contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
  """The content of a file of text, unpacked where its name ends in .gz.

  Raises:
    DataError: no file, not a whole gzip file, no text, or one that changes.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(unchanged(file))
    try:
      raw = stack.enter_context(file.local.open('rb'))
    except OSError as error:
      raise unreadable(error, file.local, file.path) from error
    if not file.local.name.endswith('.gz'):
      _check_start(raw, file.path)
      yield raw
      return
    unpacked = stack.enter_context(gzip.GzipFile(fileobj=raw, mode='rb'))
    stream = cast(
      BinaryIO, io.BufferedReader(cast(io.RawIOBase, unpacked), CHUNK)
    )
    try:
      try:
        _check_start(stream, file.path)
        yield stream
      except DataError:
        # A damaged file is garbage before its sum is wrong: to its end.
        while stream.read(CHUNK):
          pass
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise DataError(
        one_line(
          f'{file.path}: not a whole gzip file ({error}); fetch it again'
        )
      ) from error


def _check_start(stream: BinaryIO, path: str) -> None:
  """Refuses what is no UTF-8 text by its first bytes, and goes back to them."""
  start = stream.read(64)
  stream.seek(0)
  for magic, kind, remedy in _NO_TEXT:
    if start.startswith(magic):
      raise DataError(f'{path}: is {kind}, not text; {remedy}')
  if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _wide(
    start
  ):
    raise DataError(
      f'{path}:1: looks like UTF-16, not UTF-8; convert it with iconv -f UTF-16'
      ' -t UTF-8'
    )


def _wide(start: bytes) -> bool:
  """Whether every other byte, and no other one, is zero."""
  pairs = list(zip(start[::2], start[1::2], strict=False))
  return len(pairs) > 1 and (
    all(high and not low for high, low in pairs)
    or all(low and not high for high, low in pairs)
  )


def first_byte(stream: BinaryIO, blank: bytes) -> bytes:
  """The first byte that is not blank, BOM passed over; goes back to 0."""
  after_bom(stream)
  found = b''
  while not found and (chunk := stream.read(CHUNK)):
    found = chunk.lstrip(blank)[:1]
  stream.seek(0)
  return found


def after_bom(stream: BinaryIO) -> int:
  """Goes to where the text of a stream begins; returns that offset."""
  if stream.read(len(BOM)) == BOM:
    return len(BOM)
  return stream.seek(0)


def texts(stream: BinaryIO, path: str) -> Iterator[str]:
  """The text of a stream, from its start, in parts and less its BOM.

  Raises:
    DataError: it is not UTF-8; the line and the byte are named.
  """
  stream.seek(0)
  offset = 0
  rest = b''
  while True:
    chunk = stream.read(CHUNK)
    data = rest + chunk
    try:
      text, used = codecs.utf_8_decode(data, 'strict', not chunk)
    except UnicodeDecodeError as error:
      line = _newlines(stream, offset + error.start) + 1
      raise DataError(
        f'{path}:{line}: not UTF-8 ({bad_byte(error, offset)}); convert it,'
        ' e.g. with iconv'
      ) from error
    if not offset:
      text = text.removeprefix('\ufeff')
    if text:
      yield text
    if not chunk:
      return
    offset += used
    rest = data[used:]


def _newlines(stream: BinaryIO, n_bytes: int) -> int:
  # Counted as they are read, they would cost as much as all of the reading.
  stream.seek(0)
  found = 0
  while n_bytes:
    chunk = stream.read(min(CHUNK, n_bytes))
    if not chunk:
      break
    found += chunk.count(b'\n')
    n_bytes -= len(chunk)
  return found


def place(stream: BinaryIO, path: str, at: int) -> tuple[int, int]:
  """Line and column, from 1, of a character that `texts` gave."""
  line = column = 1
  for text in texts(stream, path):
    before = text[:at]
    newlines = before.count('\n')
    if newlines:
      line += newlines
      column = 1
    column += len(before) - before.rfind('\n') - 1
    at -= len(before)
    if not at:
      break
  return line, column


def lines(stream: BinaryIO) -> Iterator[bytes]:
  """Each line less the file's BOM, read as it is asked for.

  One over `MAX_LINE_BYTES` comes in parts of a byte more, see `end_line`.
  """
  after_bom(stream)
  return iter(functools.partial(stream.readline, MAX_LINE_BYTES + 1), b'')


def end_line(stream: BinaryIO, line: bytes) -> None:
  """Passes over what is left of a line of which `line` is the last part."""
  while line and not line.endswith(b'\n'):
    line = stream.readline(MAX_LINE_BYTES + 1)
