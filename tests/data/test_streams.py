"""Files read as streams: borders of chunks, memory, files that are none.

References: the same bytes read with a chunk longer than they are, the stdlib's
json and csv, sha256 sums of hashlib, and tables of what is wrong, each with its
one line. Memory is what tracemalloc and Arrow's pool count.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import time
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from lorax_train.data import arrow, stream
from lorax_train.data.problems import Problem, Problems, describe
from lorax_train.data.rows import MAX_LINE_BYTES, File
from lorax_train.data.source import (
  files_of,
  fingerprint,
  iter_rows,
  read_rows,
)
from lorax_train.errors import DataError


@contextlib.contextmanager
def chunks_of(size):
  before = stream.CHUNK
  stream.CHUNK = size
  try:
    yield
  finally:
    stream.CHUNK = before


def write(folder, name, content):
  path = folder / name
  if name.endswith('.gz'):
    content = gzip.compress(content, 1, mtime=0)
  path.write_bytes(content)
  return str(path)


def told(path, size):
  """What is read of a file in chunks of a size: its rows, or the error."""
  with chunks_of(size):
    try:
      return repr(read_rows(path))
    except DataError as error:
      return str(error)


LONG = b'9' * 5000
BORDERS = [
  ('a.json', b'[{"a": 12.5e-3, "b": [true, null, -1.0E+2]}, {"a": "\\ud83d\\ude00"}]'),
  ('a.json', b'\xef\xbb\xbf \n\t[ \r\n {"a": 1} \n , \n\n{"b": 2}\r\n ]  \n\n'),
  ('a.json', b'[12.5, -Infinity, NaN, 1e5, -0.25, true, null, "s", [], 7]'),
  ('a.json', b'[{"a": 1, "a": 2}, {"b": {"c": 1, "c": 1}}]'),
  ('a.json', b'[[1], [2]]'),
  ('a.json', b'[{"a": 1}\n {"a": 2}]'),
  ('a.json', b'[{"a": 1},\n {"a" 2}]'),
  ('a.json', b'[{"a": 1},\n {"a": 2},]'),
  ('a.json', b'[{"a": 1},\n {"a": 2}'),
  ('a.json', b'[{"a": 1},\n {"a": "x'),
  ('a.json', b'[{"a": 1},\n {"a": nul'),
  ('a.json', b'[{"a": 1},\n {"a": "\\ud8'),
  ('a.json', b'[{"a": 1},\n {"a": "\\q"}]'),
  ('a.json', b'[1.2.3]'),
  ('a.json', b'[{"a": ' + LONG + b'.5}, {"a": 1}]'),
  ('a.json', b'[{"a": ' + LONG + b'}, {"a": 1}]'),
  ('a.json', '[{"ä": "→"},\n "é" x]'.encode()),
  ('a.json', b'[{"a": 1},\n\n {"a": "\xff"}]'),
  ('a.json', b'[{"a": "\xe2\x82"}]'),
  ('a.json', b'[{"a": 1}]\n\n x'),
  ('a.json', b'  {"a": 1}\n{"a": 2}\n'),
  ('a.json', b'{"a": [\n1, 2]}'),
  ('a.json', b'{"a": \n'),
  ('a.jsonl', b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc3\xa9"}\n{"b": \n"'),
  ('a.jsonl', b'{"a": 1}\n{"a": "\xff"}\n'),
  ('a.csv', b'\xef\xbb\xbfa,b\r\n1,"x\r\ny"\r\n\r2,3\r4,5\n'),
  ('a.csv', b'a\r\n1\r\n\r\n\r2\r\r\n'),
  ('a.csv', 'ä,→\n"é""",1\n2\n'.encode()),
  ('a.csv', b'a\n1\n2\n\x00\n'),
  ('a.csv', b'a\n1\n2\n\xff\n'),
  ('a.csv', b'a\n1\n2\n\xe2\x82'),
  ('a.csv', b'a,b\n1,"2'),
]  # fmt: skip


@pytest.mark.parametrize('packed', ['', '.gz'])
@pytest.mark.parametrize(('name', 'content'), BORDERS)
def test_chunks_leave_no_trace(tmp_path, name, content, packed):
  path = write(tmp_path, name + packed, content)
  expected = told(path, 2**20)
  for size in (*range(1, min(len(content), 40)), 1000, 4999, 5003):
    assert told(path, size) == expected, size


@settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  values=st.lists(
    st.recursive(
      st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
      lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
      ),
      max_leaves=6,
    ),
    max_size=6,
  ),
  indent=st.sampled_from([None, 0, 3]),
  ascii_only=st.booleans(),
  size=st.integers(1, 30),
)
def test_arrays_are_what_json_reads(tmp_path, values, indent, ascii_only, size):
  rows = [{'v': value} for value in [*values, 1]]
  text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
  path = write(tmp_path, 'a.json', text.encode('utf-8', 'replace'))
  with chunks_of(size):
    read = [row.fields for row in read_rows(path)]
  assert repr(read) == repr(json.loads(Path(path).read_bytes()))


def many(n):
  return ({'a': f'row {i} ' + 'x' * 200, 'b': f'{i}'} for i in range(n))


def json_lines(n):
  return ''.join(json.dumps(row) + '\n' for row in many(n)).encode()


def table_of(n):
  out = io.StringIO(newline='')
  writer = csv.DictWriter(out, ['a', 'b'])
  writer.writeheader()
  writer.writerows(many(n))
  return out.getvalue().encode()


def parquet_of(n):
  out = io.BytesIO()
  table = pa.Table.from_pylist(list(many(n)))
  # As it is, in one row group: the least favourable of files.
  parquet.write_table(table, out, n, compression='none', use_dictionary=False)
  return out.getvalue()


def arrow_of(n):
  out = io.BytesIO()
  table = pa.Table.from_pylist(list(many(n)))
  with ipc.new_file(out, table.schema) as writer:
    writer.write_table(table)
  return out.getvalue()


@pytest.mark.parametrize(
  'name, of',
  [
    ('a.jsonl', json_lines),
    ('a.jsonl.gz', json_lines),
    ('a.json', lambda n: json.dumps(list(many(n)), indent=1).encode()),
    ('a.csv', table_of),
    ('a.csv.gz', table_of),
    ('a.parquet', parquet_of),
    ('a.arrow', arrow_of),
  ],
)
def test_memory_is_that_of_a_part(tmp_path, name, of):
  n = 40_000
  content = of(n)
  assert len(content) > 8e6
  path = write(tmp_path, name, content)
  del content
  next(iter_rows(files_of(path)))  # whatever is imported or made once
  pooled = pa.total_allocated_bytes()
  tracemalloc.start()
  try:
    of_arrow = count = 0
    for row in iter_rows(files_of(path)):
      assert row.fields['b'] == str(count)
      count += 1
      if count % 500 == 0:
        of_arrow = max(of_arrow, pa.total_allocated_bytes() - pooled)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert count == n
  assert peak < 2e6
  assert of_arrow < 5e6


def test_a_million_bad_rows_take_no_memory(tmp_path):
  path = write(tmp_path, 'a.jsonl', b'x\n' * 50_000 + b'7\n' * 50_000)
  tracemalloc.start()
  try:
    with pytest.raises(DataError) as caught:
      list(iter_rows(files_of(path)))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert str(caught.value) == (
    f'{path}: unreadable: 100000 rows (50000 x not JSON, 50000 x not an'
    f' object), first: {path}:1 not JSON (Expecting value at column 1),'
    f' {path}:2 not JSON, {path}:3 not JSON, {path}:4 not JSON, {path}:5 not'
    ' JSON; mend or remove them'
  )
  assert peak < 2e6


def test_problems_are_told_as_their_list_is():
  rows = [Problem(f'a:{i}', f'reason {i % 3}', f'd{i % 2}') for i in range(9)]
  for cut in range(10):
    both = Problems(rows[:cut]) + Problems(rows[cut:])
    assert describe(both) == describe(rows)
    assert len(both) == 9
  bad = Problems(Problem(f'a:{i}', f'reason {i}') for i in range(5000))
  assert len(bad) == bad.counts.total() == 5000
  assert len(bad.counts) == 1001
  assert not Problems()


def test_bad_utf8_far_in_a_file_is_found_at_once(tmp_path):
  line = b'{"a": "' + b'x' * 90 + b'"}\n'
  for name, start, between in (('a.jsonl', b'', b''), ('a.json', b'[', b',')):
    path = tmp_path / name
    part = line.replace(b'\n', between + b'\n') * 100_000
    with path.open('wb') as out:
      out.write(start)
      out.write(part * 2)
      out.write(b'{"a": "\xff"}' + between + b'\n')
      out.write(part)
    begin = time.process_time()
    with pytest.raises(DataError, match=rf'{name}:200001.*byte 0xff at offset'):
      read_rows(str(path))
    assert time.process_time() - begin < 10


LIKE_16 = (
  'a.{0}:1: looks like UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t'
  ' UTF-8'
)
NO_ROWS = 'a.{0}: no rows; pass a file that has some'
WRONG = [
  ('jsonl', '{"a": 1}\n'.encode('utf-16'), LIKE_16),
  ('jsonl', '{"a": 1}\n'.encode('utf-16-le'), LIKE_16),
  ('json', '[{"a": 1}]\n'.encode('utf-16-be'), LIKE_16),
  ('csv', 'ä,→\n1,2\n'.encode('utf-16'), LIKE_16),
  ('jsonl', b'\x1f\x8b\x08\0', 'a.jsonl: is gzip, not text; give it a name that ends in .gz'),
  ('json', b'PAR1\x15\x04', 'a.json: is Parquet, not text; give it a name that ends in .parquet'),
  ('csv', b'ARROW1\0\0', 'a.csv: is Arrow, not text; give it a name that ends in .arrow'),
  ('csv', b'PK\x03\x04', 'a.csv: is a zip archive, not text; unpack it'),
  ('jsonl', b'version https://git-lfs.github.com/spec/v1\n', 'a.jsonl: is a Git LFS pointer, not text; run git lfs pull'),
  ('jsonl', b'\xef\xbb\xbf', NO_ROWS),
  ('json', b'\xef\xbb\xbf', NO_ROWS),
  ('jsonl.gz', b'', NO_ROWS),
  ('jsonl', b'{"a": 1}\n{"a": "\0"}\n', 'a.jsonl: unreadable: 1 row (1 x not JSON), first: a.jsonl:2 (Invalid control character at column 8); mend or remove them'),
  ('json', b'[[1], [2]]', 'a.json: unreadable: 2 rows (2 x not an object), first: a.json: row 1 (list), a.json: row 2; mend or remove them'),
  ('json', b'[{"a": 1}\n {"a": 2}]', "a.json:2: not JSON (Expecting ',' or ']' at column 2); mend the file (it may be cut off)"),
  ('json', b'[{}, ' + b'[' * 200_000, 'a.json: row 2: not JSON (nested too deep); mend the file (it may be cut off)'),
  ('json', b'{"a": "\n', 'a.json:1: not JSON (Invalid control character at column 8); mend the file (it may be cut off)'),
]  # fmt: skip


@pytest.mark.parametrize(('suffix', 'content', 'message'), WRONG)
def test_files_that_are_wrong(tmp_path, monkeypatch, suffix, content, message):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, f'a.{suffix}', content)
  with pytest.raises(DataError) as caught:
    read_rows(f'a.{suffix}')
  assert str(caught.value) == message.format(suffix)


def test_gzip_members_follow_each_other_and_sums_are_checked(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  members = [gzip.compress(b'{"a": %d}\n' % n, mtime=0) for n in (1, 2)]
  path.write_bytes(b''.join(members))
  assert [row.fields['a'] for row in read_rows(str(path))] == [1, 2]
  damaged = bytearray(gzip.compress(b'[{"a": 1}]', 0, mtime=0))
  damaged[damaged.index(b'[')] ^= 1
  (tmp_path / 'a.json.gz').write_bytes(damaged)
  # It is no JSON either, but that is not what is wrong with it.
  with pytest.raises(DataError, match=r'not a whole gzip file .CRC check'):
    read_rows(str(tmp_path / 'a.json.gz'))


def test_a_long_line_is_a_row(tmp_path):
  text = 'x' * (10 * 2**20)
  for name, content in (
    ('a.jsonl', json.dumps({'a': text}).encode()),
    ('a.json', json.dumps([{'a': text}, {'a': 1}]).encode()),
    ('a.csv', b'a\n"' + text.encode() + b'"\n'),
  ):
    rows = read_rows(write(tmp_path, name, content))
    assert rows[0].fields == {'a': text}


def test_lines_go_on_after_one_too_long(tmp_path):
  path = tmp_path / 'a.jsonl'
  with path.open('wb') as out:
    out.write(b'{"a": 1}\n')
    out.seek(2 * MAX_LINE_BYTES + 100)
    out.write(b'\n{"a": 2}\nx\n')
  rows = iter_rows(files_of(str(path)))
  assert next(rows).where.endswith(':1')
  assert next(rows).where.endswith(':3')
  with pytest.raises(DataError, match=r'64 MiB, \S+:4 not JSON .Expecting'):
    next(rows)


def paths_of(folder):
  """What a path can be besides a file."""
  os.mkfifo(folder / 'pipe.jsonl')
  (folder / 'broken.jsonl').symlink_to('gone.jsonl')
  (folder / 'loop.jsonl').symlink_to('loop.jsonl')
  (folder / 'device.csv').symlink_to('/dev/null')
  (folder / 'folder').mkdir()
  (folder / 'folder' / 'a.csv').symlink_to('gone.csv')
  (folder / 'real.jsonl').write_text('{"a": 1}\n')
  (folder / 'link.jsonl').symlink_to('real.jsonl')


@pytest.mark.parametrize(
  'path, message',
  [
    ('pipe.jsonl', 'pipe.jsonl: is a pipe, and data is read more than once; write it to a file'),
    ('device.csv', 'device.csv: is a device, and data is read more than once; write it to a file'),
    ('broken.jsonl', 'broken.jsonl: a link to gone.jsonl, which is not there; mend it'),
    ('loop.jsonl', 'loop.jsonl: cannot be opened (Too many levels of symbolic links); check its permissions'),
    ('folder', 'folder/a.csv: a link to gone.csv, which is not there; mend it'),
    ('real.jsonl/a.csv', 'real.jsonl/a.csv: no such file; check --config.data.path'),
    ('~no-such-user-here/a.csv', '~no-such-user-here/a.csv: no such file; check --config.data.path'),
    ('./a\0.csv', './a\0.csv: no such file; check --config.data.path'),
  ],
)  # fmt: skip
def test_paths_that_are_no_files(tmp_path, monkeypatch, path, message):
  monkeypatch.chdir(tmp_path)
  paths_of(tmp_path)
  with pytest.raises(DataError) as caught:
    files_of(path)
  assert str(caught.value) == message
  assert read_rows('link.jsonl') == [({'a': 1}, 'link.jsonl:1')]


@pytest.fixture
def powerless():
  """Somebody whom permissions hold for, which root is not."""
  if os.geteuid() != 0:
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


@pytest.mark.parametrize('name', ['d', 'd/a.jsonl'])
def test_no_permission(tmp_path, name, powerless):
  mine = os.geteuid() == os.getuid()
  folder = tmp_path
  if mine:
    (folder / 'd').mkdir(mode=0)
  path = str(folder / name)
  with pytest.raises(DataError) as caught:
    files_of(path)
  assert str(caught.value) == (
    f'{path}: cannot be opened (Permission denied); check its permissions'
  )


@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv', 'a.parquet', 'a.arrow'])
@pytest.mark.parametrize('what', ['grown', 'cut', 'gone'])
def test_a_file_that_is_changed_while_it_is_read(tmp_path, name, what):
  of = {
    'a.jsonl': json_lines,
    'a.csv': table_of,
    'a.parquet': parquet_of,
    'a.arrow': arrow_of,
  }[name]
  path = write(tmp_path, name, of(5000))
  rows = iter_rows(files_of(path))
  next(rows)
  if what == 'gone':
    os.unlink(path)
  else:
    with open(path, 'r+b') as file:
      file.truncate(100 if what == 'cut' else os.path.getsize(path) + 1000)
  with pytest.raises(DataError) as caught:
    list(rows)
  assert str(caught.value) == (
    f'{path}: no such file; check --config.data.path'
    if what == 'gone'
    else f'{path}: was changed while it was read; wait until it is written'
  )


def test_a_fingerprint_is_of_contents_and_names(tmp_path):
  one = write(tmp_path, 'a.jsonl', b'{"a": 1}\n')
  (file,) = files_of(one)
  sha = hashlib.sha256(b'{"a": 1}\n').hexdigest()
  line = json.dumps([one, 0, False, '.jsonl', sha]) + '\n'
  assert fingerprint([file]) == hashlib.sha256(line.encode()).hexdigest()
  both = [file, File(file.local, 'other.jsonl')]
  others = [
    fingerprint(files)
    for files in (both, both[::-1], both[1:], [file._replace(before=1)], [])
  ]
  assert len({fingerprint([file]), *others}) == 6
  Path(one).write_bytes(b'{"a": 2}\n')
  assert fingerprint([file]) != hashlib.sha256(line.encode()).hexdigest()


def test_json_that_datasets_keeps_as_text(tmp_path):
  """And nested features; the reference is what `datasets` gives back."""
  calls = [[{'x': 1}, {'y': [2, None]}], None, []]
  features = datasets.Features(
    {
      'calls': datasets.List(datasets.Json()),
      'inner': {'j': datasets.Json(), 's': datasets.Value('string')},
      'grid': datasets.Array2D((2, 2), 'int32'),
      'label': datasets.ClassLabel(names=['no', 'yes']),
    }
  )
  saved = datasets.Dataset.from_dict(
    {
      'calls': calls,
      'inner': [{'j': {'a': 1.5}, 's': None}, None, {'j': [1], 's': 'x'}],
      'grid': [[[1, 2], [3, 4]]] * 3,
      'label': [0, 1, 0],
    },
    features=features,
  )
  saved.save_to_disk(str(tmp_path / 'set'))
  read = [row.fields for row in read_rows(str(tmp_path / 'set'))]
  assert read == list(saved)
  assert [row['calls'] for row in read] == calls
  (file,) = files_of(str(tmp_path / 'set'))
  assert arrow.count_rows(file) == 3
