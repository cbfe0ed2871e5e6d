"""Rows of JSON: an array of objects, or an object a line."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from lorax_train.data import stream as streams
from lorax_train.data.problems import Problem, Problems, one_line, shorten
from lorax_train.data.rows import (
  MAX_LINE_BYTES,
  File,
  Row,
  bad_byte,
  refuse,
)
from lorax_train.errors import DataError

_BLANK = ' \t\r\n'  # what JSON calls white space
_BYTES = _BLANK.encode()
_SKIP_BLANK = re.compile(f'[{_BLANK}]*')
_COMMA = re.compile(f'[{_BLANK}]*,[{_BLANK}]*')

# What may hang on the end of a text that is cut within a number, a literal or
# an escape: -Infinity, \ud83d\ude00. What the decoder says of a place with that
# much text behind it stands, whatever follows.
_LONGEST_WORD = 16


def read_json(stream: BinaryIO, file: File) -> Iterator[Row]:
  """Reads JSON of either kind: which it is says its first byte.

  Raises:
    DataError: it is neither, or at the end every bad row counted.
  """
  # A list in a .jsonl is an array under the wrong name: no line of a JSONL
  # file of objects starts so.
  starts = streams.first_byte(stream, _BYTES)
  if starts == b'[':
    return _read_array(stream, file)
  if not file.local.name.removesuffix('.gz').endswith('.jsonl'):
    _check_lines(stream, file.path)
  return _read_lines(stream, file)


_Decode = Callable[[str, int], tuple[Any, int]]


def _decoder() -> tuple[_Decode, list[str]]:
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


def _problem(value: Any, repeated: list[str], where: str) -> Problem:
  if repeated:
    return Problem(where, 'duplicate key', shorten(repr(repeated[0])))
  return Problem(where, 'not an object', f'{type(value).__name__}')


def _cause(error: Exception) -> str:
  if isinstance(error, json.JSONDecodeError):
    return f'{_words(error)} at column {error.colno}'
  if isinstance(error, RecursionError):
    return 'nested too deep'
  return shorten(one_line(str(error)))


def _words(error: json.JSONDecodeError) -> str:
  # "Unterminated string starting at", and then comes the place.
  return error.msg.removesuffix(' at')


def _check_lines(stream: BinaryIO, path: str) -> None:
  """Refuses a .json that holds no array unless it holds one object a line.

  Its first line settles that, and that there are others.
  """
  filled = filter(lambda line: line.strip(_BYTES), streams.lines(stream))
  first, second = next(filled, b''), next(filled, b'')
  stream.seek(0)
  if not first or (second and _is_object(first)):
    return
  text = ''
  for part in streams.texts(stream, path):
    text += part
    if len(text) > MAX_LINE_BYTES:
      break
  try:
    _decoder()[0](text, _end_of_blank(text, 0))
  except json.JSONDecodeError as error:
    if not _may_be_cut(error, len(text)) or len(text) <= MAX_LINE_BYTES:
      raise _broken(f'{path}:{error.lineno}', error) from error
  except (ValueError, RecursionError) as error:
    raise _broken(path, error) from error
  raise DataError(
    f'{path}: holds one JSON value, not an array of objects'
    ' [{...}, {...}]; rewrite it so, or one object a line as .jsonl'
  )


def _is_object(line: bytes) -> bool:
  try:
    text = line.decode('utf-8').strip(_BLANK)
    value, end = _decoder()[0](text, 0)
  except (ValueError, RecursionError):
    return False
  return isinstance(value, dict) and end == len(text)


def _end_of_blank(text: str, begin: int) -> int:
  match = _SKIP_BLANK.match(text, begin)
  assert match is not None  # it matches the empty string
  return match.end()


def _broken(place: str, error: Exception) -> DataError:
  return DataError(
    f'{place}: not JSON ({_cause(error)}); mend the file (it may be cut off)'
  )


def _may_be_cut(error: json.JSONDecodeError, length: int) -> bool:
  """Whether more text could turn an error into a value.

  A string without its end is complained of where it begins.
  """
  return error.msg.startswith('Unterminated') or (
    error.pos + _LONGEST_WORD > length
  )


class _Text:
  """A window on the text of a stream, which is read as far as it is needed."""

  def __init__(self, stream: BinaryIO, path: str):
    self.text = ''
    self.ended = False
    self._begin = 0
    self._stream = stream
    self._path = path
    self._parts = streams.texts(stream, path)

  def more(self, at: int) -> None:
    """Forgets what is before `at` and at least doubles the rest."""
    self._begin += at
    rest = [self.text[at:]]
    wanted = len(rest[0])
    got = 0
    while got <= wanted and not self.ended:
      part = next(self._parts, '')
      self.ended = not part
      got += len(part)
      rest.append(part)
    self.text = ''.join(rest)

  def skip_blank(self, at: int) -> int:
    """Where the next character is that is not blank, in a window moved on."""
    end = _end_of_blank(self.text, at)
    while end == len(self.text) and not self.ended:
      self.more(end)
      end = _end_of_blank(self.text, 0)
    return end

  def broken(self, message: str, at: int) -> DataError:
    """An error of a character of the window."""
    line, column = streams.place(self._stream, self._path, self._begin + at)
    return DataError(
      f'{self._path}:{line}: not JSON ({message} at column {column}); mend the'
      ' file (it may be cut off)'
    )


def _read_array(stream: BinaryIO, file: File) -> Iterator[Row]:
  """Element by element, so that an element's number is known."""
  problems = Problems()
  decode, repeated = _decoder()
  row = file.row
  source = _Text(stream, file.path)
  at = source.skip_blank(source.skip_blank(0) + 1)  # past the [
  number = 0
  while number or source.text[at : at + 1] != ']':
    number += 1
    where = f'{row}{number}'
    text = source.text
    try:
      value, end = decode(text, at)
    except (ValueError, RecursionError):
      end = len(text)
    if end + _LONGEST_WORD > len(text):
      value, end = _at_border(source, at, where, decode)
      text = source.text
    if repeated or not isinstance(value, dict):
      problems.add(_problem(value, repeated, where))
      repeated.clear()
    else:
      yield Row(value, where)
    comma = _COMMA.match(text, end)
    at = comma.end() if comma else end
    if not comma or at == len(text):
      at = source.skip_blank(end)
      if source.text[at : at + 1] != ',':
        break
      at = source.skip_blank(at + 1)
  if source.text[at : at + 1] != ']':
    raise source.broken("Expecting ',' or ']'", at)
  at = source.skip_blank(at + 1)
  if at < len(source.text):
    raise source.broken('Extra data after the array', at)
  refuse(problems, file.path)


def _at_border(
  source: _Text, at: int, place: str, decode: _Decode
) -> tuple[Any, int]:
  """An element that may be cut off: reads on until it can't be."""
  while True:
    try:
      value, end = decode(source.text, at)
      # Of 12.5 cut after 1, 12 or 12. there is a number, and another one.
      if (
        source.ended
        or isinstance(value, (dict, list, str))
        or end + _LONGEST_WORD <= len(source.text)
      ):
        return value, end
    except json.JSONDecodeError as error:
      if source.ended or not _may_be_cut(error, len(source.text)):
        raise source.broken(_words(error), error.pos) from error
    except ValueError as error:  # too many digits, unless a point follows
      if source.ended or len(source.text) - at > MAX_LINE_BYTES:
        raise _broken(place, error) from error
    except RecursionError as error:
      raise _broken(place, error) from error
    if len(source.text) - at > MAX_LINE_BYTES:
      raise DataError(
        f'{place}: has no end within {MAX_LINE_BYTES // 2**20} MiB; is a quote'
        ' missing?'
      )
    source.more(at)
    at = 0


def _read_lines(stream: BinaryIO, file: File) -> Iterator[Row]:
  problems = Problems()
  decode, repeated = _decoder()
  path = file.path
  for number, line in enumerate(streams.lines(stream), start=1):
    where = f'{path}:{number}'
    if len(line) > MAX_LINE_BYTES:
      problems.add(Problem(where, 'a line over 64 MiB'))
      streams.end_line(stream, line)
      continue
    try:
      text = line.decode('utf-8').strip(_BLANK)
      if not text:
        continue
      value, end = decode(text, 0)
      if end < len(text):
        raise json.JSONDecodeError('Extra data', text, end)
      if not repeated and isinstance(value, dict):
        yield Row(value, where)
        continue
      problem = _problem(value, repeated, where)
    except UnicodeDecodeError as error:
      start = stream.tell() - len(line)
      problem = Problem(where, 'not UTF-8', bad_byte(error, start))
    except (ValueError, RecursionError) as error:
      # Only the last line can lack its newline.
      cut = not line.endswith(b'\n')
      reason = 'not JSON: the file is cut off here' if cut else 'not JSON'
      problem = Problem(where, reason, _cause(error))
    problems.add(problem)
    repeated.clear()
  refuse(problems, path)
