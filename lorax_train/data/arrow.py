"""Rows of Parquet and Arrow files, a batch at a time."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lorax_train.data.problems import Problem, Problems, one_line, shorten
from lorax_train.data.rows import File, Row, refuse
from lorax_train.data.stream import check, unchanged, unreadable
from lorax_train.errors import DataError

_ROWS = 1024  # made into Python objects at once
_BUFFER = 2**20  # read at once of a Parquet column
_PARQUET = b'PAR1'
_IPC_FILE = b'ARROW1'
_STREAM = b'\xff\xff\xff\xff'
_STREAM_END = _STREAM + b'\0\0\0\0'
_FEATHER_1 = b'FEA1'
_POINTER = b'version https://git-lfs'


def read_parquet(file: File) -> Iterator[Row]:
  """Reads a Parquet file, a few pages of each column at a time.

  Raises:
    DataError: the file is no whole Parquet file, or rows are damaged.
  """
  with unchanged(file):
    start, _ = _ends(file)
    if start:
      _check_magic(file, start, 'Parquet', _PARQUET)
      yield from _rows(file, 'Parquet', _parquet_batches(file))


def read_arrow(file: File) -> Iterator[Row]:
  """Reads an Arrow IPC file (or Feather 2, the same), or an Arrow stream.

  It is mapped. A batch that was compressed is unpacked as a whole.

  Raises:
    DataError: the file is no whole Arrow file, or rows are damaged.
  """
  with unchanged(file):
    is_stream = _is_stream(file)
    if is_stream is not None:
      yield from _rows(file, 'Arrow', _ipc_batches(file, is_stream))


def count_rows(file: File) -> int:
  """Rows of an Arrow file, of which no column is read.

  Raises:
    DataError: it is no whole Arrow file.
  """
  import pyarrow as pa

  is_stream = _is_stream(file)
  if is_stream is None:
    return 0
  try:
    return sum(b.num_rows for b in _ipc_batches(file, is_stream))
  except (pa.ArrowException, OSError, ValueError) as error:
    raise _broken(file.path, 'Arrow', error) from error


def _is_stream(file: File) -> bool | None:
  """Which of the two kinds an Arrow file is; None if it is empty."""
  start, end = _ends(file)
  if not start:
    return None
  if start.startswith(_FEATHER_1):
    raise DataError(
      f'{file.path}: Feather version 1; write it again with a newer pyarrow'
    )
  _check_magic(file, start, 'Arrow', _IPC_FILE, _STREAM)
  is_stream = start.startswith(_STREAM)
  if is_stream and end != _STREAM_END:
    # Its reader takes whatever whole batches there are for all of them.
    raise DataError(
      f'{file.path}: not a whole Arrow file (a stream without its end); fetch'
      ' it again'
    )
  return is_stream


def _ends(file: File) -> tuple[bytes, bytes]:
  """The first bytes, and the last 8."""
  try:
    opened = file.local.open('rb')
  except OSError as error:
    raise unreadable(error, file.local, file.path) from error
  with opened:
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

  # With a buffer a column is read by its pages, without one by row groups,
  # and mapped memory that is cut off under a process kills it.
  with pyarrow.parquet.ParquetFile(
    file.local, buffer_size=_BUFFER, pre_buffer=False
  ) as opened:
    _check_names(file, opened.schema_arrow.names)
    yield from opened.iter_batches(_ROWS)


def _ipc_batches(file: File, stream: bool) -> Iterator[Any]:
  import pyarrow as pa

  with pa.memory_map(str(file.local)) as mapped:
    size = mapped.size()
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
        if check(file).size < size:
          raise pa.ArrowInvalid('it was cut off while it was read')
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


def _rows(file: File, kind: str, batches: Iterator[Any]) -> Iterator[Row]:
  import pyarrow as pa

  problems = Problems()
  row = file.row
  n_read = file.before
  try:
    for batch in batches:
      for number, fields in enumerate(_converted(batch), start=n_read + 1):
        where = f'{row}{number}'
        if isinstance(fields, Problem):
          problems.add(fields._replace(where=where))
        else:
          yield Row(fields, where)
      n_read += batch.num_rows
  # An OSError of Arrow's is about what is in the file: it can be read.
  except (pa.ArrowException, OSError, ValueError) as error:
    place = f'{file.path}: after row {n_read}' if n_read else file.path
    raise _broken(place, kind, error) from error
  refuse(problems, file.path)


def _broken(place: str, kind: str, error: Exception) -> DataError:
  if isinstance(error, DataError):
    return error
  cause = shorten(one_line(str(error)), 160)
  return DataError(
    f'{place}: not a whole {kind} file ({cause}); fetch it again'
  )


_DAMAGE = (ValueError, TypeError, ArithmeticError, RecursionError)


def _converted(batch: Any) -> Iterator[dict[str, Any] | Problem]:
  """What each row of a batch holds."""
  try:
    # Offsets and UTF-8 are taken on trust by everything but this.
    batch.validate(full=True)
    rows = batch.to_pylist()
    for name, parse in _parsers(batch.schema).items():
      for row in rows:
        row[name] = parse(row[name])
  except _DAMAGE:
    for index in range(batch.num_rows):
      yield _one_by_one(batch.slice(index, 1))
  else:
    yield from rows


def _one_by_one(row: Any) -> dict[str, Any] | Problem:
  fields: dict[str, Any] = {}
  parsers = _parsers(row.schema)
  for name, column in zip(row.schema.names, row.columns, strict=True):
    try:
      column.validate(full=True)
      fields[name] = parsers.get(name, _as_it_is)(column[0].as_py())
    except _DAMAGE as error:
      cause = shorten(one_line(str(error)), 160)
      return Problem('', f'column {name!r} ({column.type}) damaged', cause)
  return fields


def _parsers(schema: Any) -> dict[str, Callable[[Any], Any]]:
  """For each column in which there is JSON as text, what parses its values.

  `datasets` stores so what differs from row to row, such as the arguments of
  tool calls, and gives it back as objects.
  """
  found = ((field.name, _parser(field.type)) for field in schema)
  return {name: parse for name, parse in found if parse is not None}


def _parser(kind: Any) -> Callable[[Any], Any] | None:
  import pyarrow.types as types

  if getattr(kind, 'extension_name', '') == 'arrow.json':
    return lambda value: None if value is None else json.loads(value)
  if types.is_struct(kind):
    fields = _parsers(kind)
    return functools.partial(_parse_struct, fields) if fields else None
  if types.is_list(kind) or types.is_large_list(kind):
    parse = _parser(kind.value_type)
    return functools.partial(_parse_list, parse) if parse else None
  return None


def _parse_struct(
  fields: dict[str, Callable[[Any], Any]], value: dict[str, Any] | None
) -> dict[str, Any] | None:
  if value is None:
    return None
  return value | {name: parse(value[name]) for name, parse in fields.items()}


def _parse_list(
  parse: Callable[[Any], Any], value: list[Any] | None
) -> list[Any] | None:
  return None if value is None else [parse(item) for item in value]


def _as_it_is(value: Any) -> Any:
  return value
