"""Rows from files, directories of them, or from the Hugging Face hub.

Every row remembers where it came from, so that whatever is found wrong with it
later can be told as `file:line`.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorax_train.data import arrow, folder, tables
from lorax_train.data.problems import Problem, one_line, shorten
from lorax_train.data.rows import (
  BOM,
  MAX_LINE_BYTES,
  File,
  Row,
  bad_byte,
  decode,
  refuse,
)
from lorax_train.errors import DataError

_TEXT = ('.json', '.jsonl', '.csv', '.tsv')
_BINARY = ('.parquet', '.arrow', '.feather')
_SUFFIXES = (*_TEXT, *(f'{suffix}.gz' for suffix in _TEXT), *_BINARY)
_BLANK = ' \t\r\n'  # what JSON calls white space
_SKIP_BLANK = re.compile(f'[{_BLANK}]*')

# Long enough for a slow link, short enough for somebody who waits: the hub's
# own retries on a closed network took 23 s.
_PROBE_SECONDS = 5.0


def read_rows(path: str, split: str = 'train') -> list[Row]:
  """Reads a local file or directory, or else a data set of the hub.

  Args:
    path: one of
      - a file: `.json` holding an array of objects, `.jsonl`, `.csv` or `.tsv`
        with a header, each also with `.gz`; `.parquet`; `.arrow`, `.feather`.
      - a directory of such files of one kind, read in the order of their
        names, or one that `save_to_disk` of `datasets` made.
      - a hub id such as `llm-wizard/alpaca-gpt4-data`.
      What exists on disk, ends like a file or starts with `.`, `/` or `~` is
      local.
    split: the split of a hub data set or of a saved DatasetDict. Files have
      none.

  Returns:
    The rows, in the order of the file. Never empty.

  Raises:
    DataError: with every bad line counted and the first five named.
  """
  local = Path(path).expanduser()
  looks_local = path.startswith(('.', '/', '~')) or path.endswith(_SUFFIXES)
  if looks_local or os.path.exists(local):
    rows = [
      row for file in _files(local, path, split) for row in _read_file(file)
    ]
  else:
    rows = _read_hub(path, split)
  if not rows:
    raise DataError(f'{path}: no rows; pass a file that has some')
  return rows


def _files(local: Path, path: str, split: str) -> list[File]:
  if not local.exists():
    raise DataError(f'{path}: no such file; check --config.data.path')
  if local.is_dir():
    return folder.files_of(local, path, split, (*_TEXT, *_BINARY))
  if not path.endswith(_SUFFIXES):
    raise DataError(
      f'{path}: not a kind of file that is read here; convert it to'
      f' {", ".join(_TEXT)} (these may be .gz), {" or ".join(_BINARY)}'
    )
  return [File(local, path)]


def _read_file(file: File) -> list[Row]:
  path = file.path
  if path.endswith('.parquet'):
    return arrow.read_parquet(file)
  if path.endswith(_BINARY):
    return arrow.read_arrow(file)
  data = file.local.read_bytes()
  if path.endswith('.gz'):
    try:
      data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise DataError(
        one_line(f'{path}: not a whole gzip file ({error}); fetch it again')
      ) from error
  kind = Path(path.removesuffix('.gz')).suffix
  if kind in ('.csv', '.tsv'):
    return tables.read_table(data, path, ',' if kind == '.csv' else '\t')
  return _read_json(data, path)


def _read_json(data: bytes, path: str) -> list[Row]:
  # A list in a .jsonl is an array under the wrong name: no line of a JSONL
  # file of objects starts so.
  starts = data.removeprefix(BOM).lstrip(_BLANK.encode())[:1]
  if starts != b'[' and path.removesuffix('.gz').endswith('.jsonl'):
    return _read_lines(data, path)
  text = decode(data, path)
  if starts == b'[':
    return _read_array(text, path)
  if _is_lines(text, path):
    return _read_lines(data, path)
  raise DataError(
    f'{path}: holds one JSON value, not an array of objects'
    f' [{{...}}, {{...}}]; rewrite it so, or one object a line as .jsonl'
  )


def _decoder() -> tuple[Callable[[str, int], tuple[Any, int]], list[str]]:
  """A `raw_decode` and the list it puts repeated keys on.

  JSON's own parser keeps the last of two equal keys: a column lost unseen.
  The keys are put aside rather than raised so that the row can be named.
  """
  repeated: list[str] = []

  def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
      counts = Counter(key for key, _ in pairs)
      repeated.extend(key for key, n in counts.items() if n > 1)
    return fields

  return json.JSONDecoder(object_pairs_hook=to_dict).raw_decode, repeated


def _problem(value: Any, repeated: list[str], where: str) -> Problem | None:
  if repeated:
    return Problem(where, 'duplicate key', shorten(repr(repeated[0])))
  if not isinstance(value, dict):
    return Problem(where, 'not an object', f'{type(value).__name__}')
  return None


def _is_lines(text: str, path: str) -> bool:
  """Whether a .json that holds no array holds one object a line."""
  decode, _ = _decoder()
  begin = _end_of_blank(text, 0)
  if begin == len(text):
    return True  # nothing at all: no rows
  try:
    value, end = decode(text, begin)
  except (ValueError, RecursionError) as error:
    raise _broken(error, path) from error
  after = _end_of_blank(text, end)
  return (
    isinstance(value, dict)
    and '\n' not in text[begin:end]
    and '\n' in text[end:after]
    and after < len(text)
  )


def _end_of_blank(text: str, begin: int) -> int:
  match = _SKIP_BLANK.match(text, begin)
  assert match is not None  # it matches the empty string
  return match.end()


def _broken(error: Exception, path: str) -> DataError:
  line = f':{error.lineno}' if isinstance(error, json.JSONDecodeError) else ''
  return DataError(
    f'{path}{line}: not JSON ({_cause(error)}); mend the file (it may be cut'
    ' off)'
  )


def _cause(error: Exception) -> str:
  if isinstance(error, json.JSONDecodeError):
    return f'{error.msg} at column {error.colno}'
  if isinstance(error, RecursionError):
    return 'nested too deep'
  return shorten(one_line(str(error)))


def _read_array(text: str, path: str) -> list[Row]:
  """Element by element, so that an element's number is known."""
  rows, problems = [], []
  try:
    for number, (value, repeated) in enumerate(_elements(text), start=1):
      where = f'{path}: row {number}'
      problem = _problem(value, repeated, where)
      if problem:
        problems.append(problem)
      else:
        rows.append(Row(value, where))
  except (ValueError, RecursionError) as error:
    raise _broken(error, path) from error
  refuse(problems, path)
  return rows


def _elements(text: str) -> Iterator[tuple[Any, list[str]]]:
  decode, repeated = _decoder()
  at = _end_of_blank(text, 0) + 1  # past the [
  at = _end_of_blank(text, at)
  if text[at : at + 1] != ']':
    while True:
      value, at = decode(text, at)
      yield value, list(repeated)
      repeated.clear()
      at = _end_of_blank(text, at)
      if text[at : at + 1] != ',':
        break
      at = _end_of_blank(text, at + 1)
  if text[at : at + 1] != ']':
    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
  at = _end_of_blank(text, at + 1)
  if at < len(text):
    raise json.JSONDecodeError('Extra data after the array', text, at)


def _read_lines(data: bytes, path: str) -> list[Row]:
  rows, problems = [], []
  decode, repeated = _decoder()
  start = len(BOM) if data.startswith(BOM) else 0
  stream = io.BytesIO(data)
  stream.seek(start)
  for number, line in enumerate(stream, start=1):
    where = f'{path}:{number}'
    begin, start = start, start + len(line)
    if len(line) > MAX_LINE_BYTES:
      problems.append(Problem(where, 'a line over 64 MiB'))
      continue
    try:
      text = line.decode('utf-8').strip(_BLANK)
      if not text:
        continue
      value, end = decode(text, 0)
      if end < len(text):
        raise json.JSONDecodeError('Extra data', text, end)
      problem = _problem(value, repeated, where)
    except UnicodeDecodeError as error:
      problem = Problem(where, 'not UTF-8', bad_byte(error, begin))
    except (ValueError, RecursionError) as error:
      # Only the last line can lack its newline.
      cut = not line.endswith(b'\n')
      reason = 'not JSON: the file is cut off here' if cut else 'not JSON'
      problem = Problem(where, reason, _cause(error))
    repeated.clear()
    if problem:
      problems.append(problem)
    else:
      rows.append(Row(value, where))
  refuse(problems, path)
  return rows


def _read_hub(name: str, split: str) -> list[Row]:
  """A data set of the hub, or its copy in the cache if the hub is out of reach.

  One request with a time limit asks whether the hub answers. If it does not,
  `datasets` is told for this call that it is offline: it then looks in its
  cache at once, where it would otherwise retry for 23 s first.
  """
  import datasets
  import huggingface_hub

  refusal = None
  try:
    huggingface_hub.HfApi().dataset_info(name, timeout=_PROBE_SECONDS)
  except Exception as error:  # network, HTTP, name: all end in the same way
    refusal = error
  offline = datasets.config.HF_HUB_OFFLINE
  datasets.config.HF_HUB_OFFLINE = offline or refusal is not None
  try:
    table = datasets.load_dataset(name, split=split)
    return [
      Row(dict(fields), f'{name}[{split}] row {number}')
      for number, fields in enumerate(table, start=1)
    ]
  except Exception as error:
    raise DataError(
      f'{name}[{split}]: not to be had from the Hugging Face hub'
      f' ({_hub_cause(refusal or error)}); pass a local file:'
      ' --config.data.path=FILE.json'
    ) from error
  finally:
    datasets.config.HF_HUB_OFFLINE = offline


def _hub_cause(error: Exception) -> str:
  from huggingface_hub import errors

  if isinstance(error, errors.OfflineModeIsEnabled):
    return 'HF_HUB_OFFLINE is set and the cache does not hold it'
  if isinstance(error, errors.GatedRepoError):
    return 'gated: accept its terms on the hub and log in with `hf auth login`'
  if isinstance(error, errors.RepositoryNotFoundError):
    return 'no such data set, or a private one: check its name'
  if isinstance(error, errors.HfHubHTTPError):
    return f'HTTP {error.response.status_code}'
  return shorten(one_line(f'{type(error).__name__}: {error}'), 160)
