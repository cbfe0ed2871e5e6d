"""CSV, TSV, Parquet, Arrow and directories of them.

References: the stdlib's csv, pyarrow's tables and `datasets` reading the same
bytes; and tables of what is wrong, each with its one line.
"""

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from lorax_train.data.source import read_rows
from lorax_train.data.template import template_named
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import DataError

BOM = b'\xef\xbb\xbf'
AB = pa.table({'a': ['x', 'y'], 'b': ['1', None]})
DAMAGED = pa.table(
  {
    'a': pa.Array.from_buffers(
      pa.string(),
      3,
      [
        None,
        pa.array([0, 1, 2, 3], pa.int32()).buffers()[1],
        pa.py_buffer(b'a\xffb'),
      ],
    )
  }
)


def parquet_of(table, **options):
  out = io.BytesIO()
  parquet.write_table(table, out, **options)
  return out.getvalue()


def arrow_of(table, new=ipc.new_file, **options):
  out = io.BytesIO()
  with new(out, table.schema) as writer:
    writer.write_table(table, **options)
  return out.getvalue()


def stream_of(table, **options):
  return arrow_of(table, ipc.new_stream, **options)


def feather_of(table):
  out = io.BytesIO()
  feather.write_feather(table, out)
  return out.getvalue()


def csv_of(rows, **options):
  out = io.StringIO(newline='')
  writer = csv.DictWriter(out, list(rows[0]), **options)
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue().encode()


def write(folder, name, content):
  path = folder / name
  path.parent.mkdir(exist_ok=True, parents=True)
  path.write_bytes(content)
  return str(path)


def packed(content):
  return gzip.compress(content, mtime=0)


AS_ROWS = [{'a': 'x', 'b': '1'}, {'a': 'y', 'b': None}]
NUMBERED = [': row 1', ': row 2']


@pytest.mark.parametrize(
  'name, content, fields, places',
  [
    ('a.csv', b'a,b\n1,2\n', [{'a': '1', 'b': '2'}], [':2']),
    ('a.csv', b'a,b\n1,', [{'a': '1', 'b': ''}], [':2']),
    ('a.csv', BOM + b'a,b\r\n1,2\r\n', [{'a': '1', 'b': '2'}], [':2']),
    ('a.csv', b'a\n1\n\n\r\n2\n', [{'a': '1'}, {'a': '2'}], [':2', ':5']),
    ('a.csv', b'a\r1\r2\r', [{'a': '1'}, {'a': '2'}], [':2', ':3']),
    ('a.csv', b'a\n"x\n\ny"\n2\n', [{'a': 'x\n\ny'}, {'a': '2'}], [':2', ':5']),
    ('a.csv', b'a\n"x\r\ny"\n', [{'a': 'x\r\ny'}], [':2']),
    ('a.csv', b'a\n"say ""hi"""\n', [{'a': 'say "hi"'}], [':2']),
    ('a.csv', b'a\n a "b" \n', [{'a': ' a "b" '}], [':2']),
    ('a.csv', 'ä\n→\n'.encode(), [{'ä': '→'}], [':2']),
    ('a.csv', b'a\nNone\nnull\n', [{'a': 'None'}, {'a': 'null'}], [':2', ':3']),
    ('a.csv', b'a\n' + b'x' * 200_000, [{'a': 'x' * 200_000}], [':2']),
    ('a.csv.gz', packed(b'a\n1\n'), [{'a': '1'}], [':2']),
    ('a.tsv', b'a\tb\n1,5\t 2\n', [{'a': '1,5', 'b': ' 2'}], [':2']),
    ('a.tsv', b'a\tb\n"\t"\t\n', [{'a': '\t', 'b': ''}], [':2']),
    ('a.tsv.gz', packed(b'a\tb\n1\t2'), [{'a': '1', 'b': '2'}], [':2']),
    ('a.parquet', parquet_of(AB), AS_ROWS, NUMBERED),
    ('a.parquet', parquet_of(AB, row_group_size=1), AS_ROWS, NUMBERED),
    ('a.parquet', parquet_of(AB, compression='zstd'), AS_ROWS, NUMBERED),
    ('a.arrow', arrow_of(AB), AS_ROWS, NUMBERED),
    ('a.arrow', arrow_of(AB, max_chunksize=1), AS_ROWS, NUMBERED),
    ('a.arrow', stream_of(AB), AS_ROWS, NUMBERED),
    ('a.arrow', stream_of(AB, max_chunksize=1), AS_ROWS, NUMBERED),
    ('a.feather', feather_of(AB), AS_ROWS, NUMBERED),
  ],
)  # fmt: skip
def test_rows_and_their_places(tmp_path, name, content, fields, places):
  path = write(tmp_path, name, content)
  rows = read_rows(path)
  assert [row.fields for row in rows] == fields
  assert [row.where for row in rows] == [path + place for place in places]
  assert csv.field_size_limit() == 131072


TYPED = pa.table(
  {
    'list': pa.array([[1, None], None, []]),
    'struct': pa.array([{'x': 'y'}, None, {'x': None}]),
    'large': pa.array(['a', None, ''], pa.large_string()),
    'dictionary': pa.array(['a', 'b', 'a']).dictionary_encode(),
    'int': pa.array([1, None, 3], pa.int8()),
    'bytes': pa.array([b'\xff', None, b'']),
    'time': pa.array([0, 1, None], pa.timestamp('us')),
  }
)


@pytest.mark.parametrize('of', [parquet_of, arrow_of, stream_of])
def test_values_are_those_of_pyarrow(tmp_path, of):
  path = write(
    tmp_path, 'a.parquet' if of is parquet_of else 'a.arrow', of(TYPED)
  )
  assert [row.fields for row in read_rows(path)] == TYPED.to_pylist()


def test_numbers_go_on_through_the_batches(tmp_path):
  table = pa.table({'a': list(range(3000))})
  for name, content in (
    ('a.parquet', parquet_of(table, row_group_size=700)),
    ('a.arrow', arrow_of(table)),
  ):
    path = write(tmp_path, name, content)
    rows = read_rows(path)
    assert [row.fields['a'] for row in rows] == list(range(3000))
    assert [r.where for r in rows] == [
      f'{path}: row {n + 1}' for n in range(3000)
    ]


def corrupted(content):
  return content[:4] + b'\xff' * 36 + content[40:]


# (name, content, message), `...` for words of other libraries
WRONG = [
  # CSV and TSV
  ('a.csv', b'', 'a.csv: no rows; pass a file that has some'),
  ('a.csv', BOM, 'a.csv: no rows; pass a file that has some'),
  ('a.csv', b'a,b\n', 'a.csv: no rows; pass a file that has some'),
  ('a.tsv', b'\n\n', 'a.tsv: no rows; pass a file that has some'),
  (
    'a.csv',
    b'a,b\n1\n"x\ny",2\n1,2,3\n',
    'a.csv: unreadable: 2 rows (2 x not the 2 cells of the header), first:'
    ' a.csv:2 (1 cell), a.csv:5 (3 cells); mend or remove them',
  ),
  (
    'a.csv',
    b'a,b\n1,2\n3',
    'a.csv: unreadable: 1 row (1 x not the 2 cells of the header), first:'
    ' a.csv:3 (1 cell); mend or remove them',
  ),
  (
    'a.csv',
    b'a,b,a\n1,2,3\n',
    "a.csv:1: the header has 'a' twice; rename one",
  ),
  (
    'a.csv',
    b'\na,,b\n1,2,3\n',
    'a.csv:2: column 2 of the header has no name; the first line names all'
    ' columns',
  ),
  (
    'a.csv',
    b'a,b\n1,2\n3,"4\n5,6\n7,8\n',
    'a.csv: unreadable: 1 row (1 x a quote is opened and never closed), first:'
    ' a.csv:3; mend or remove them',
  ),
  (
    'a.csv',
    b'a,b\n"1"x,2\n',
    'a.csv: unreadable: 1 row (1 x wrongly quoted), first: a.csv:2'
    " (',' expected after '\"'); mend or remove them",
  ),
  (
    'a.csv',
    b'a\nx\n\xe4\n',
    'a.csv:3: not UTF-8 (byte 0xe4 at offset 4); convert it, e.g. with iconv',
  ),
  (
    'a.csv',
    'a\nx\n'.encode('utf-16'),
    'a.csv:1: looks like UTF-16, not UTF-8; convert it with iconv -f UTF-16'
    ' -t UTF-8',
  ),
  (
    'a.csv',
    b'a\nx\ny\0\n',
    'a.csv:3: holds a NUL byte, and so is no text; write it again as UTF-8',
  ),
  (
    'a.csv',
    b'a,b\n' + b'x' * (10 * 2**20) + b'\n',
    'a.csv: unreadable: 1 row (1 x not the 2 cells of the header), first:'
    ' a.csv:2 (1 cell); mend or remove them',
  ),
  (
    'a.csv',
    b'a\n' + b'x' * (64 * 2**20 + 1) + b'\n',
    'a.csv: unreadable: 1 row (1 x a cell over 64 MiB), first: a.csv:2; mend'
    ' or remove them',
  ),
  (
    'a.csv.gz',
    packed(b'a\n1\n')[:-9],
    'a.csv.gz: not a whole gzip file (...); fetch it again',
  ),
  ('a.tsv.gz', b'a\tb\n', 'a.tsv.gz: not a whole gzip file (...); fetch it again'),
  (
    'a.tsv',
    b'a\tb\n1,2\n',
    'a.tsv: unreadable: 1 row (1 x not the 2 cells of the header), first:'
    ' a.tsv:2 (1 cell); mend or remove them',
  ),
  # JSONL
  (
    'a.jsonl',
    b'{}\n' + b'x' * (10 * 2**20) + b'\n',
    'a.jsonl: unreadable: 1 row (1 x not JSON), first: a.jsonl:2 (Expecting'
    ' value at column 1); mend or remove them',
  ),
  # Parquet
  ('a.parquet', b'', 'a.parquet: no rows; pass a file that has some'),
  (
    'a.parquet',
    parquet_of(AB.slice(0, 0)),
    'a.parquet: no rows; pass a file that has some',
  ),
  (
    'a.parquet',
    parquet_of(AB)[:-20],
    'a.parquet: not a whole Parquet file (...); fetch it again',
  ),
  (
    'a.parquet',
    parquet_of(AB)[:3],
    "a.parquet: not Parquet (it begins with b'PAR'); give it the name of what"
    ' it is',
  ),
  (
    'a.parquet',
    corrupted(parquet_of(AB)),
    'a.parquet: not a whole Parquet file (...); fetch it again',
  ),
  (
    'a.parquet',
    b'a,b\n1,2\n',
    "a.parquet: not Parquet (it begins with b'a,b\\n1,'); give it the name of"
    ' what it is',
  ),
  (
    'a.parquet',
    b'version https://git-lfs.github.com/spec/v1\n',
    'a.parquet: a Git LFS pointer, not the file; run git lfs pull',
  ),
  (
    'a.parquet',
    parquet_of(AB.rename_columns(['a', 'a'])),
    "a.parquet: has 'a' as two columns; rename one",
  ),
  (
    'a.parquet',
    parquet_of(DAMAGED),
    "a.parquet: unreadable: 1 row (1 x column 'a' (string) damaged), first:"
    ' a.parquet: row 2 (...); mend or remove them',
  ),
  # Arrow
  ('a.arrow', b'', 'a.arrow: no rows; pass a file that has some'),
  (
    'a.arrow',
    arrow_of(AB)[:-30],
    'a.arrow: not a whole Arrow file (...); fetch it again',
  ),
  (
    'a.arrow',
    stream_of(AB, max_chunksize=1)[:-8],
    'a.arrow: not a whole Arrow file (a stream without its end); fetch it'
    ' again',
  ),
  (
    'a.arrow',
    stream_of(AB) + stream_of(AB),
    'a.arrow: after row 2: not a whole Arrow file (something follows the end'
    ' of its stream); fetch it again',
  ),
  (
    'a.arrow',
    parquet_of(AB),
    "a.arrow: not Arrow (it begins with b'PAR1...'); give it the name of what"
    ' it is',
  ),
  (
    'a.arrow',
    arrow_of(DAMAGED),
    "a.arrow: unreadable: 1 row (1 x column 'a' (string) damaged), first:"
    ' a.arrow: row 2 (...); mend or remove them',
  ),
  (
    'a.arrow',
    stream_of(AB.rename_columns(['a', 'a'])),
    "a.arrow: has 'a' as two columns; rename one",
  ),
  (
    'a.feather',
    b'FEA1 and so on',
    'a.feather: Feather version 1; write it again with a newer pyarrow',
  ),
]  # fmt: skip


def says(error, message):
  """Whether an error is this one line, `...` standing for anything."""
  text = str(error)
  begin, _, end = message.partition('...')
  assert len(text.splitlines()) == 1
  assert error.exit_code == 3
  if '...' not in message:
    assert text == message
  assert text.startswith(begin) and text.endswith(end)
  assert len(text) < 500
  return True


@pytest.mark.parametrize(('name', 'content', 'message'), WRONG)
def test_files_that_are_wrong(tmp_path, monkeypatch, name, content, message):
  write(tmp_path, name, content)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError) as caught:
    read_rows(name)
  assert says(caught.value, message)


@pytest.mark.parametrize(
  'name, content, line',
  [
    ('a.csv', b'instruction,reply\nx,y\n', "(1 x no column 'output'), first: {}:2 (columns: 'instruction', 'reply')"),
    ('a.csv', b'instruction;output\nx;y\n', "(1 x no column 'instruction'), first: {}:2 (columns: 'instruction;output')"),
    ('a.parquet', parquet_of(pa.table({'instruction': ['x'], 'output': [['y']]})), "(1 x column 'output' is list, not a string), first: {}: row 1"),
    ('a.parquet', parquet_of(pa.table({'instruction': ['x'], 'output': [3]})), "(1 x column 'output' is int, not a string), first: {}: row 1"),
    ('a.parquet', parquet_of(pa.table({'instruction': ['x'], 'output': [b'y']})), "(1 x column 'output' is bytes, not a string), first: {}: row 1"),
    ('a.arrow', arrow_of(pa.table({'instruction': ['x', 'z'], 'output': ['y', None]})), "(1 x column 'output' is null, not a string), first: {}: row 2"),
    ('a.arrow', stream_of(pa.table({'instruction': ['x'], 'output': [{'a': None}]})), "(1 x column 'output' is dict, not a string), first: {}: row 1"),
    ('a.csv', b'instruction,output\nx,y\nz,\n', '(1 x empty completion), first: {}:3'),
  ],
)  # fmt: skip
def test_rows_that_do_not_fit(tmp_path, bytes_dir, name, content, line):
  path = write(tmp_path, name, content)
  with pytest.raises(DataError) as caught:
    tokenize_rows(read_rows(path), 'alpaca', load_tokenizer(bytes_dir), 512)
  assert f'bad rows: 1 row {line.format(path)}; mend them' in str(caught.value)


def test_every_cut_of_a_file_is_told(tmp_path):
  """No prefix of a binary file gives fewer rows: it gives an error."""
  for name, content in (
    ('a.parquet', parquet_of(AB)),
    ('a.arrow', arrow_of(AB)),
    ('b.arrow', stream_of(AB, max_chunksize=1)),
  ):
    for length in range(0, len(content), 7):
      path = write(tmp_path, name, content[:length])
      with pytest.raises(DataError) as caught:
        read_rows(path)
      assert str(caught.value).startswith(path)


@settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  text=st.text(st.sampled_from('a,"\n\r\t b\ufeff\0é'), max_size=30)
  | st.text(max_size=30),
  suffix=st.sampled_from(['csv', 'tsv']),
)
def test_any_text_is_what_csv_reads_or_one_line(tmp_path, text, suffix):
  content = text.encode('utf-8', 'replace')
  path = write(tmp_path, f'a.{suffix}', content)
  try:
    rows = read_rows(path)
  except DataError as error:
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith(path)
    return
  with open(path, encoding='utf-8-sig', newline='') as file:
    dialect = 'excel' if suffix == 'csv' else 'excel-tab'
    header, *cells = filter(None, csv.reader(file, dialect, strict=True))
  assert [list(row.fields) for row in rows] == [header] * len(cells)
  assert [list(row.fields.values()) for row in rows] == cells


@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  changes=st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4
  ),
  kind=st.sampled_from(['parquet', 'arrow', 'stream']),
)
def test_any_bytes_changed_give_rows_or_one_line(tmp_path, changes, kind):
  of = {'parquet': parquet_of, 'arrow': arrow_of, 'stream': stream_of}[kind]
  content = bytearray(of(AB))
  for at, value in changes:
    content[at % len(content)] = value
  name = 'a.parquet' if kind == 'parquet' else 'a.arrow'
  path = write(tmp_path, name, bytes(content))
  try:
    read_rows(path)
  except DataError as error:
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith(path)


# Directories.


def test_a_directory_of_files_is_read_by_name(tmp_path):
  for name, content in {
    'b.csv.gz': packed(b'a\n3\n'),
    'a.csv': b'a\n1\n2\n',
    'README.md': b'words',
    '.hidden': b'x',
    '_SUCCESS': b'',
    'c.csv': b'a\n',
  }.items():
    write(tmp_path, name, content)
  for path in (str(tmp_path), f'{tmp_path}/'):
    assert read_rows(path) == [
      ({'a': '1'}, f'{tmp_path}/a.csv:2'),
      ({'a': '2'}, f'{tmp_path}/a.csv:3'),
      ({'a': '3'}, f'{tmp_path}/b.csv.gz:2'),
    ]


ROWS = [{'a': f'row {n}', 'n': n, 'l': [n, None]} for n in range(7)]


def test_what_datasets_saved(tmp_path):
  saved = datasets.Dataset.from_list(ROWS)
  folder = str(tmp_path / 'set')
  saved.save_to_disk(folder, num_shards=3)
  rows = read_rows(folder)
  assert [row.fields for row in rows] == list(datasets.load_from_disk(folder))
  assert [row.fields for row in rows] == ROWS
  assert rows[0].where == f'{folder}/data-00000-of-00003.arrow: row 1'
  # Chosen and shuffled rows are saved as they are seen.
  chosen = str(tmp_path / 'chosen')
  saved.shuffle(seed=1).select(range(4)).save_to_disk(chosen)
  expected = list(datasets.load_from_disk(chosen))
  assert [row.fields for row in read_rows(chosen)] == expected


def test_splits_that_datasets_saved(tmp_path):
  folder = str(tmp_path / 'splits')
  datasets.DatasetDict(
    train=datasets.Dataset.from_list(ROWS),
    test=datasets.Dataset.from_list(ROWS[:2]),
  ).save_to_disk(folder)
  assert [row.fields for row in read_rows(folder)] == ROWS
  assert [row.fields for row in read_rows(folder, 'test')] == ROWS[:2]
  assert [r.fields for r in read_rows(f'{folder}/test')] == ROWS[:2]
  with pytest.raises(DataError, match="no split 'dev', but train, test; pass"):
    read_rows(folder, 'dev')


@pytest.mark.parametrize(
  'files, message',
  [
    ({}, 'd: a directory without data; pass one of .json, ... files, or what save_to_disk made'),
    ({'README.md': b''}, 'd: a directory without data; pass one of .json, ... files, or what save_to_disk made'),
    ({'a.csv': b'a\n1', 'b.tsv': b'a\n1', 'c.csv': b'a\n1'}, 'd: a directory of files of several kinds (a.csv, b.tsv); pass one kind'),
    ({'a.csv': b'a\n1', 'a.csv.gz': packed(b'a\n1')}, 'd: holds a.csv and a.csv.gz; take one of them away'),
    ({'a.csv': b'a\n1', 'more/b.csv': b'a\n1'}, 'd: holds a directory, more; pass one whose files are all in it'),
    ({'a.csv': b'a\n', 'b.csv': b''}, 'd: no rows; pass a file that has some'),
    ({'a.csv': b'a\n1', 'b.csv': b'a\n"1'}, 'd/b.csv: unreadable: 1 row (1 x a quote is opened and never closed), first: d/b.csv:2; mend or remove them'),
    ({'state.json': b'{'}, 'd/state.json: not JSON; save the data set again with save_to_disk'),
    ({'state.json': b'[]'}, 'd/state.json: does not list data files; save the data set again with save_to_disk'),
    ({'state.json': b'{"_data_files": [{"filename": "../a.arrow"}]}'}, 'd/state.json: does not list data files; save the data set again with save_to_disk'),
    ({'state.json': b'{"_data_files": [{"filename": ".."}]}'}, 'd: .., which ... lists, is not there; fetch it again'),
    ({'state.json': b'{"_data_files": [{"filename": "a.arrow"}]}'}, 'd: a.arrow, which state.json lists, is not there; fetch it again'),
    ({'state.json': b'{"_data_files": [{"filename": "a.arrow"}]}', 'a.arrow': stream_of(AB)[:-9]}, 'd/a.arrow: not a whole Arrow file (a stream without its end); fetch it again'),
    ({'dataset_dict.json': b'{"splits": 3}'}, "d: has no split 'train', but none; pass the directory of one"),
    ({'dataset_dict.json': b'\xff'}, 'd/dataset_dict.json: not JSON; save the data set again with save_to_disk'),
    ({'dataset_dict.json': b'{"splits": ["train"]}'}, 'd/train: no such directory; fetch the data set again'),
  ],
)  # fmt: skip
def test_directories_that_are_wrong(tmp_path, monkeypatch, files, message):
  (tmp_path / 'd').mkdir()
  for name, content in files.items():
    write(tmp_path / 'd', name, content)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError) as caught:
    read_rows('d')
  assert says(caught.value, message)


def test_the_same_rows_in_every_kind_of_file(tmp_path, shared, bytes_dir):
  rows = json.loads((shared / 'data' / 'alpaca_gpt4_999.json').read_text())
  table = pa.Table.from_pylist(rows)
  lines = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  files = {
    'a.csv': csv_of(rows),
    'bom.csv': BOM + csv_of(rows, lineterminator='\n'),
    'a.csv.gz': packed(csv_of(rows)),
    'a.tsv': csv_of(rows, delimiter='\t'),
    'a.parquet': parquet_of(table, row_group_size=100),
    'a.arrow': arrow_of(table),
    'stream.arrow': stream_of(table),
    'a.feather': feather_of(table),
    'a.jsonl': lines,
    'd/1.parquet': parquet_of(table.slice(0, 100)),
    'd/2.parquet': parquet_of(table.slice(100)),
  }
  render = template_named('alpaca')
  examples = [render(row) for row in rows]
  tokenizer = load_tokenizer(bytes_dir)
  original = read_rows(str(shared / 'data' / 'alpaca_gpt4_999.json'))

  def fingerprint(rows):
    # Their fields are compared in full; encoding all takes its time.
    return tokenize_rows(rows[:200], 'alpaca', tokenizer, 4096).fingerprint

  expected = fingerprint(original)
  for name, content in files.items():
    path = write(tmp_path, name, content)
    if name.startswith('d/'):
      continue
    read = read_rows(path)
    assert [row.fields for row in read] == rows, name
    assert [render(row.fields) for row in read] == examples, name
    assert fingerprint(read) == expected, name
  datasets.Dataset(table).save_to_disk(str(tmp_path / 'saved'))
  for folder in ('d', 'saved'):
    read = read_rows(str(tmp_path / folder))
    assert [row.fields for row in read] == rows, folder
    assert fingerprint(read) == expected, folder
