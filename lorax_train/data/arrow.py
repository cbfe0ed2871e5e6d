"""Rows of Parquet and Arrow files, a batch at a time from mapped memory."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lorax_train.data.problems import Problem, one_line, shorten
from lorax_train.data.rows import File, Row, refuse
from lorax_train.errors import DataError

_ROWS = 1024  # made into Python objects at once
_PARQUET = b'PAR1'
_IPC_FILE = b'ARROW1'
_STREAM = b'\xff\xff\xff\xff'
_STREAM_END = _STREAM + b'\0\0\0\0'
_FEATHER_1 = b'FEA1'
_POINTER = b'version https://git-lfs'


def read_parquet(file: File) -> list[Row]:
  """Reads a Parquet file.

  Raises:
    DataError: the file is no whole Parquet file, or rows are damaged.
  """
  start, _ = _ends(file)
  if not start:
    return []
  _check_magic(file, start, 'Parquet', _PARQUET)
  return _rows(file, 'Parquet', _parquet_batches(file))


def read_arrow(file: File) -> list[Row]:
  """Reads an Arrow IPC file (or Feather 2, the same), or an Arrow stream.

  Raises:
    DataError: the file is no whole Arrow file, or rows are damaged.
  """
  start, end = _ends(file)
  if not start:
    return []
  if start.startswith(_FEATHER_1):
    raise DataError(
      f'{file.path}: Feather version 1; write it again with a newer pyarrow'
    )
  _check_magic(file, start, 'Arrow', _IPC_FILE, _STREAM)
  stream = start.startswith(_STREAM)
  if stream and end != _STREAM_END:
    # Its reader takes whatever whole batches there are for all of them.
    raise DataError(
      f'{file.path}: not a whole Arrow file (a stream without its end); fetch'
      ' it again'
    )
  return _rows(file, 'Arrow', _ipc_batches(file, stream))


def _ends(file: File) -> tuple[bytes, bytes]:
  """The first bytes, and the last 8."""
  with file.local.open('rb') as opened:
    start = opened.read(len(_POINTER))
    opened.seek(max(opened.seek(0, 2) - len(_STREAM_END), 0))
    return start, opened.read()


def _check_magic(file: File, start: bytes, kind: str, *magics: bytes) -> None:
  if start == _POINTER:
    raise DataError(
      f'{file.path}: a Git LFS pointer, not the file; run git lfs pull'
    )
  if not start.startswith(magics):
    raise DataError(
      f'{file.path}: not {kind} (it begins with {start[:6]!r}); give it the'
      ' name of what it is'
    )


def _parquet_batches(file: File) -> Iterator[Any]:
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(file.local, memory_map=True) as opened:
    _check_names(file, opened.schema_arrow.names)
    yield from opened.iter_batches(_ROWS)


def _ipc_batches(file: File, stream: bool) -> Iterator[Any]:
  import pyarrow as pa

  with pa.memory_map(str(file.local)) as mapped:
    if stream:
      reader = pa.ipc.open_stream(mapped)
      _check_names(file, reader.schema.names)
      batches = iter(reader)
    else:
      reader = pa.ipc.open_file(mapped)
      _check_names(file, reader.schema.names)
      batches = map(reader.get_batch, range(reader.num_record_batches))
    for batch in batches:
      for begin in range(0, batch.num_rows, _ROWS):
        yield batch.slice(begin, _ROWS)
    if stream and mapped.tell() < mapped.size():
      raise pa.ArrowInvalid('something follows the end of its stream')


def _check_names(file: File, names: list[str]) -> None:
  repeated = [name for name, n in Counter(names).items() if n > 1]
  if repeated:
    raise DataError(
      f'{file.path}: has {shorten(repr(repeated[0]))} as two columns; rename'
      ' one'
    )


def _rows(file: File, kind: str, batches: Iterator[Any]) -> list[Row]:
  import pyarrow as pa

  rows: list[Row] = []
  problems: list[Problem] = []
  n_read = 0
  try:
    for batch in batches:
      for number, fields in _converted(batch):
        where = f'{file.path}: row {n_read + number}'
        if isinstance(fields, Problem):
          problems.append(fields._replace(where=where))
        else:
          rows.append(Row(fields, where))
      n_read += batch.num_rows
  # An OSError of Arrow's is about what is in the file: it can be read.
  except (pa.ArrowException, OSError, ValueError) as error:
    if isinstance(error, DataError):
      raise
    place = f'{file.path}: after row {n_read}' if n_read else file.path
    cause = shorten(one_line(str(error)), 160)
    raise DataError(
      f'{place}: not a whole {kind} file ({cause}); fetch it again'
    ) from error
  refuse(problems, file.path)
  return rows


def _converted(batch: Any) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
  """Each row's number in the batch, from 1, and what it holds."""
  try:
    # Offsets and UTF-8 are taken on trust by everything but this.
    batch.validate(full=True)
    yield from enumerate(batch.to_pylist(), start=1)
    return
  except (ValueError, TypeError, OverflowError, ArithmeticError):
    pass  # one by one, then
  for index in range(batch.num_rows):
    yield index + 1, _one_by_one(batch.slice(index, 1))


def _one_by_one(row: Any) -> dict[str, Any] | Problem:
  fields: dict[str, Any] = {}
  for name, column in zip(row.schema.names, row.columns, strict=True):
    try:
      column.validate(full=True)
      fields[name] = column[0].as_py()
    except (ValueError, TypeError, OverflowError, ArithmeticError) as error:
      cause = shorten(one_line(str(error)), 160)
      return Problem('', f'column {name!r} ({column.type}) damaged', cause)
  return fields
