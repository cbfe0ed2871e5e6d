"""Readers of files: tables of bytes, and `json` as the reference."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax_train.data.rows import MAX_LINE_BYTES
from lorax_train.data.source import read_rows
from lorax_train.errors import DataError

BOM = b'\xef\xbb\xbf'


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content)
  return str(path)


@pytest.mark.parametrize(
  'name, content, fields, places',
  [
    ('a.jsonl', b'{"a": 1}\n{"b": "x"}\n', [{'a': 1}, {'b': 'x'}], [':1', ':2']),
    ('a.jsonl', b'{"a": 1}\n{"a": 2}', [{'a': 1}, {'a': 2}], [':1', ':2']),
    ('a.jsonl', b'{"a": 1}\r\n\r\n \t\n{"a": 2}\r\n', [{'a': 1}, {'a': 2}], [':1', ':4']),
    ('a.jsonl', BOM + '{"ä": "→"}\n'.encode(), [{'ä': '→'}], [':1']),
    ('a.jsonl', b'{"a": {"b": [1, null]}}', [{'a': {'b': [1, None]}}], [':1']),
    ('a.jsonl.gz', gzip.compress(b'{"a": 1}\n', mtime=0), [{'a': 1}], [':1']),
    ('a.json', b'[{"a": 1}, {"a": 2}]', [{'a': 1}, {'a': 2}], [': row 1', ': row 2']),
    ('a.json', BOM + b'\n[\n {"a": 1}\r\n]\n', [{'a': 1}], [': row 1']),
    ('a.json.gz', gzip.compress(b'[{"a": 1}]', mtime=0), [{'a': 1}], [': row 1']),
    # plain text
    ('a.txt', b'a\nb\n<|endoftext|>\n\nc\n', [{'text': 'a\nb'}, {'text': 'c'}], [':1', ':5']),
    ('a.txt', b'one\n\ndocument', [{'text': 'one\n\ndocument'}], [':1']),
    ('a.txt', BOM + b'\r\na<|endoftext|>b<|endoftext|> \n<|endoftext|>', [{'text': 'a'}, {'text': 'b'}], [':2', ':2']),
    ('a.txt.gz', gzip.compress(b'a<|endoftext|>\nb', mtime=0), [{'text': 'a'}, {'text': 'b'}], [':1', ':2']),
    # content under the name of the other kind
    ('a.json', b'{"a": 1}\n{"a": 2}\n', [{'a': 1}, {'a': 2}], [':1', ':2']),
    ('a.json', b'\n{"a": 1}\n\n{"a": 2}', [{'a': 1}, {'a': 2}], [':2', ':4']),
    ('a.jsonl', b'[\n{"a": 1},\n{"a": 2}\n]', [{'a': 1}, {'a': 2}], [': row 1', ': row 2']),
  ],
)  # fmt: skip
def test_rows_and_their_places(tmp_path, name, content, fields, places):
  path = write(tmp_path, name, content)
  rows = read_rows(path)
  assert [row.fields for row in rows] == fields
  assert [row.where for row in rows] == [path + place for place in places]


def test_nan_is_a_number(tmp_path):
  (row,) = read_rows(write(tmp_path, 'a.jsonl', b'{"a": NaN}\n'))
  assert row.fields['a'] != row.fields['a']


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.jsonl', b'', 'a.jsonl: no rows; pass a file that has some'),
    ('a.jsonl', b'\n \n', 'a.jsonl: no rows; pass a file that has some'),
    ('a.json', b'', 'a.json: no rows; pass a file that has some'),
    (
      'a.txt',
      b'\n<|endoftext|>\n',
      'a.txt: no rows; pass a file that has some',
    ),
    (
      'a.txt',
      b'a\n\xff',
      'a.txt:2: not UTF-8 (byte 0xff at offset 2); convert it, e.g. with iconv',
    ),
    ('a.json', b'[ ]', 'a.json: no rows; pass a file that has some'),
    (
      'a.jsonl',
      b'{"a": 1}\n{"a": ',
      'a.jsonl: unreadable: 1 row (1 x not JSON: the file is cut off here),'
      ' first: a.jsonl:2 (Expecting value at column 6); mend or remove them',
    ),
    (
      'a.jsonl',
      b'{"a": 1, "a": 2}\n{"b": {"c\\n": 1, "c\\n": 2}}\n{"a": 3}\n',
      'a.jsonl: unreadable: 2 rows (2 x duplicate key), first: a.jsonl:1'
      " ('a'), a.jsonl:2 ('c\\n'); mend or remove them",
    ),
    (
      'a.jsonl',
      b'{"a": 1}\n[1]\n{}x\n"s"\n',
      'a.jsonl: unreadable: 3 rows (2 x not an object, 1 x not JSON), first:'
      ' a.jsonl:2 not an object (list), a.jsonl:3 not JSON (Extra data at'
      ' column 3), a.jsonl:4 not an object (str); mend or remove them',
    ),
    (
      'a.jsonl',
      b'x\n' * 7,
      'a.jsonl: unreadable: 7 rows (7 x not JSON), first: a.jsonl:1 (Expecting'
      ' value at column 1), a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5; mend'
      ' or remove them',
    ),
    (
      'a.jsonl',
      BOM + b'{}\n{"a": "\xff"}\n',
      'a.jsonl: unreadable: 1 row (1 x not UTF-8), first: a.jsonl:2 (byte 0xff'
      ' at offset 13); mend or remove them',
    ),
    (
      'a.jsonl',
      b'{"a": ' + b'[' * 100_000 + b'\n',
      'a.jsonl: unreadable: 1 row (1 x not JSON), first: a.jsonl:1 (nested too'
      ' deep); mend or remove them',
    ),
    (
      'a.json',
      BOM + b'[{},\n{"a": "\xe4"}]',
      'a.json:2: not UTF-8 (byte 0xe4 at offset 15); convert it, e.g. with'
      ' iconv',
    ),
    (
      'a.json',
      b'[{"a": 1},\n{"a": 2}',
      "a.json:2: not JSON (Expecting ',' or ']' at column 9); mend the file"
      ' (it may be cut off)',
    ),
    (
      'a.json',
      b'[{"a": 1}]\n[]',
      'a.json:2: not JSON (Extra data after the array at column 1); mend the'
      ' file (it may be cut off)',
    ),
    (
      'a.json',
      b'[{"a": 1}, 5, {"a": 1, "a": 1}, {"a": 2}]',
      'a.json: unreadable: 2 rows (1 x not an object, 1 x duplicate key),'
      ' first: a.json: row 2 not an object (int), a.json: row 3 duplicate key'
      " ('a'); mend or remove them",
    ),
    (
      'a.json',
      b'{"a": [1, 2], "b": [3, 4]}\n',
      'a.json: holds one JSON value, not an array of objects [{...}, {...}];'
      ' rewrite it so, or one object a line as .jsonl',
    ),
    (
      'a.json',
      b'5',
      'a.json: holds one JSON value, not an array of objects [{...}, {...}];'
      ' rewrite it so, or one object a line as .jsonl',
    ),
    (
      'a.json.gz',
      gzip.compress(b'[{"a": 1}]', mtime=0)[:-9],
      'a.json.gz: not a whole gzip file (Compressed file ended before the'
      ' end-of-stream marker was reached); fetch it again',
    ),
    (
      'a.json.gz',
      b'[{}]',
      "a.json.gz: not a whole gzip file (Not a gzipped file (b'[{')); fetch it"
      ' again',
    ),
    (
      'a.doc',
      b'a,b\n1,2\n',
      'a.doc: not a kind of file that is read here; convert it to .json,'
      ' .jsonl, .csv, .tsv, .txt (these may be .gz), .parquet or .arrow or .feather',
    ),
  ],
)
def test_refusals(tmp_path, monkeypatch, name, content, message):
  write(tmp_path, name, content)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError) as caught:
    read_rows(name)
  assert str(caught.value) == message


def test_a_line_too_long_to_be_a_row(tmp_path):
  path = tmp_path / 'a.jsonl'
  with path.open('wb') as file:
    file.write(b'{"a": 1}\n')
    file.truncate(9 + MAX_LINE_BYTES + 1)
  with pytest.raises(DataError, match=r'1 x a line over 64 MiB.*a\.jsonl:2;'):
    read_rows(str(path))


@pytest.mark.parametrize(
  'path', ['no.json', 'no/no.jsonl.gz', './no', '/no/such', '~/no-such-file']
)
def test_a_missing_file_is_not_asked_of_the_hub(tmp_path, monkeypatch, path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError) as caught:
    read_rows(path)
  assert str(caught.value) == (
    f'{path}: no such file; check --config.data.path'
  )


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path, 'a.json', b'[{"a": 1}]')
  assert read_rows('~/a.json') == [({'a': 1}, '~/a.json: row 1')]


FRAGMENTS = st.sampled_from(
  [
    *(b'{"a": 1}', b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}', b'{}', b'null'),
    *(b'\n', b'\r\n', b' ', b'\x00', b'\x0c', BOM, b'\xe2\x80\xa8'),
    *(b'[', b']', b',', b'{', b'"', b'\\', b'NaN', b'9' * 5000),
    *(b'\xff', b'\xc3'),
  ]
)


@settings(
  max_examples=400,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  content=st.binary(max_size=60)
  | st.lists(FRAGMENTS, max_size=12).map(b''.join),
  suffix=st.sampled_from(['json', 'jsonl', 'jsonl.gz', 'json.gz']),
)
def test_any_bytes_give_rows_or_one_line(tmp_path, content, suffix):
  packed = (
    gzip.compress(content, 1, mtime=0) if suffix.endswith('gz') else content
  )
  path = write(tmp_path, f'a.{suffix}', packed)
  try:
    rows = read_rows(path)
  except DataError as error:
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith(path)
    return
  # What was read is what json reads, of the whole or of the lines.
  text = content.decode().removeprefix('\ufeff')
  if text.lstrip(' \t\r\n').startswith('['):
    expected = json.loads(text)
  else:
    lines = [line.strip(' \t\r') for line in text.split('\n')]
    expected = [json.loads(line) for line in lines if line]
  assert repr([row.fields for row in rows]) == repr(expected)


def test_real_files(shared):
  data = shared / 'data'
  alpaca = read_rows(str(data / 'alpaca_gpt4_999.json'))
  expected = json.loads((data / 'alpaca_gpt4_999.json').read_text())
  assert [row.fields for row in alpaca] == expected
  assert alpaca[-1].where == f'{data}/alpaca_gpt4_999.json: row 999'
  assert len(read_rows(str(data / 'wikisql_train.jsonl'))) == 1000
