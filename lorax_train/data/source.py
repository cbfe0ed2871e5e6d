"""Rows from a JSON or JSONL file, or from the Hugging Face hub.

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
from typing import Any, NamedTuple

from lorax_train.data.problems import Problem, describe, one_line, shorten
from lorax_train.errors import DataError

# A longer line is a file that is not JSONL (or lost its newlines): parsing it
# would only take the memory of the machine.
MAX_LINE_BYTES = 64 * 2**20

_SUFFIXES = ('.json', '.jsonl', '.json.gz', '.jsonl.gz')
_BOM = b'\xef\xbb\xbf'
_BLANK = ' \t\r\n'  # what JSON calls white space
_SKIP_BLANK = re.compile(f'[{_BLANK}]*')

# Long enough for a slow link, short enough for somebody who waits: the hub's
# own retries on a closed network took 23 s.
_PROBE_SECONDS = 5.0


class Row(NamedTuple):
  """One object of the data and its place: `rows.jsonl:17`."""

  fields: dict[str, Any]
  where: str


def read_rows(path: str, split: str = 'train') -> list[Row]:
  """Reads a local file, or else a data set of the hub.

  Args:
    path: a file (`.json` holding an array of objects, `.jsonl`, either also
      with `.gz`) or a hub id such as `llm-wizard/alpaca-gpt4-data`. What exists
      on disk, ends like a file or starts with `.`, `/` or `~` is local.
    split: the split of a hub data set. Local files have none.

  Returns:
    The rows, in the order of the file. Never empty.

  Raises:
    DataError: with every bad line counted and the first five named.
  """
  local = Path(path).expanduser()
  looks_local = path.startswith(('.', '/', '~')) or path.endswith(_SUFFIXES)
  if looks_local or os.path.exists(local):
    rows = _read_file(local, path)
  else:
    rows = _read_hub(path, split)
  if not rows:
    raise DataError(f'{path}: no rows; pass a file that has some')
  return rows


def _read_file(local: Path, path: str) -> list[Row]:
  if not local.exists():
    raise DataError(f'{path}: no such file; check --config.data.path')
  if local.is_dir():
    raise DataError(f'{path}: a directory; pass a .json or .jsonl file')
  if not path.endswith(_SUFFIXES):
    raise DataError(
      f'{path}: not a kind of file that is read here; convert it to'
      f' {" or ".join(_SUFFIXES[:2])} (either may be .gz)'
    )
  data = local.read_bytes()
  if path.endswith('.gz'):
    try:
      data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise DataError(
        one_line(f'{path}: not a whole gzip file ({error}); fetch it again')
      ) from error
  # A list in a .jsonl is an array under the wrong name: no line of a JSONL
  # file of objects starts so.
  starts = data.removeprefix(_BOM).lstrip(_BLANK.encode())[:1]
  if starts != b'[' and path.removesuffix('.gz').endswith('.jsonl'):
    return _read_lines(data, path)
  text = _decode(data, path)
  if starts == b'[':
    return _read_array(text, path)
  if _is_lines(text, path):
    return _read_lines(data, path)
  raise DataError(
    f'{path}: holds one JSON value, not an array of objects'
    f' [{{...}}, {{...}}]; rewrite it so, or one object a line as .jsonl'
  )


def _decode(data: bytes, path: str) -> str:
  try:
    return data.decode('utf-8').removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise DataError(
      f'{path}:{line}: not UTF-8 ({_bad_byte(error)}); convert it, e.g. with'
      ' iconv'
    ) from error


def _bad_byte(error: UnicodeDecodeError, start: int = 0) -> str:
  byte = error.object[error.start]
  return f'byte 0x{byte:02x} at offset {start + error.start}'


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
  _refuse(problems, path)
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
  start = len(_BOM) if data.startswith(_BOM) else 0
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
      problem = Problem(where, 'not UTF-8', _bad_byte(error, begin))
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
  _refuse(problems, path)
  return rows


def _refuse(problems: list[Problem], path: str) -> None:
  if problems:
    raise DataError(
      f'{path}: unreadable: {describe(problems)}; mend or remove them'
    )


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
