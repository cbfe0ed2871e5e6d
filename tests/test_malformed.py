"""Malformed data, file by file, through the whole of `validate` and `train`.

Reference: what each file was broken with, and where: the one line that fails
must name that place. CRLF, a BOM, blank lines and long lines are not broken.
"""

import gzip
import json
from pathlib import Path

import pytest

from lorax_train import __main__ as verbs
from tests.test_main import check_nothing_half_written, command

ROW = {'prompt': 'a', 'completion': 'b'}
LINE = json.dumps(ROW).encode()
TWO = LINE + b'\n' + LINE + b'\n'


def jsonl(*values):
  return b''.join(
    (v if isinstance(v, bytes) else json.dumps(v).encode()) + b'\n'
    for v in values
  )


def ids(*rows):
  return jsonl(*({'input_ids': r} if isinstance(r, list) else r for r in rows))


def deep(n):
  return b'{"prompt": ' + b'[' * n + b']' * n + b', "completion": "b"}'


# (name of the file, its bytes, template, words of the line that fails)
_PC, _T = 'prompt_completion', 'tokens'
BROKEN = {
  # files
  'empty': ('rows.jsonl', b'', _PC, ['rows.jsonl', 'no rows']),
  'empty array': ('rows.json', b'[]', _PC, ['rows.json', 'no rows']),
  'a BOM and nothing else': ('rows.json', b'\xef\xbb\xbf', _PC, ['no rows']),
  'blank lines': ('rows.jsonl', b'\n \n\t\n', _PC, ['rows.jsonl', 'no rows']),
  'half a last line': (
    'rows.jsonl', TWO + LINE[:20], _PC, ['rows.jsonl:3', 'cut off here']
  ),
  'half an array': (
    'rows.json', b'[' + LINE + b',\n' + LINE[:9], _PC, ['rows.json:2', 'cut off']
  ),
  'an object': ('rows.json', LINE, _PC, ['rows.json', 'one JSON value']),
  'a number': ('rows.json', b'17', _PC, ['rows.json', 'one JSON value']),
  'bad UTF-8 in a line': (
    'rows.jsonl', TWO + b'{"prompt": "\xff"}\n', _PC, ['rows.jsonl:3', '0xff']
  ),
  'bad UTF-8 in an array': (
    'rows.json', b'[\n\n{"a": "\xe2\x82"}]', _PC, ['rows.json:3', '0xe2']
  ),
  'UTF-16': (
    'rows.jsonl', LINE.decode().encode('utf-16'), _PC, ['rows.jsonl', 'UTF-16']
  ),
  'a NUL in CSV': (
    'rows.csv', b'prompt,completion\na,b\na,\0\n', _PC, ['rows.csv:3', 'NUL']
  ),
  'gz that is none': ('rows.jsonl.gz', TWO, _PC, ['rows.jsonl.gz', 'gzip']),
  'half a gz': (
    'rows.jsonl.gz', gzip.compress(TWO * 99)[:40], _PC, ['rows.jsonl.gz', 'gzip']
  ),
  'a flipped bit in a gz': (
    'rows.jsonl.gz',
    gzip.compress(TWO)[:-6] + b'\0' * 6,
    _PC,
    ['rows.jsonl.gz', 'gzip'],
  ),
  'a kind that is not read': ('rows.xml', TWO, _PC, ['rows.xml', '.jsonl']),
  'Parquet in name': ('rows.parquet', TWO, _PC, ['rows.parquet', 'Parquet']),
  'half a Parquet file': (
    'rows.parquet', b'PAR1' + b'x' * 99, _PC, ['rows.parquet', 'Parquet']
  ),
  'Arrow in name': ('rows.arrow', TWO, _PC, ['rows.arrow', 'Arrow']),
  'a Git LFS pointer': (
    'rows.parquet',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
    _PC,
    ['rows.parquet', 'git lfs pull'],
  ),
  # tables
  'ragged CSV': (
    'rows.csv', b'prompt,completion\na,b\na\n', _PC, ['rows.csv:3', '1 cell']
  ),
  'a quote that is open': (
    'rows.csv', b'prompt,completion\na,"b\nc\n', _PC, ['rows.csv:2', 'quote']
  ),
  'a header with a name twice': (
    'rows.tsv', b'prompt\tprompt\na\tb\n', _PC, ['rows.tsv:1', 'twice']
  ),
  'a header alone': ('rows.csv', b'prompt,completion\n', _PC, ['no rows']),
  # rows
  'an array a line': (
    'rows.jsonl', TWO + b'[1, 2]\n', _PC, ['rows.jsonl:3', 'list']
  ),
  'an array of arrays': ('rows.json', b'[[1], [2]]', _PC, ['row 1', 'list']),
  'a key that is there twice': (
    'rows.jsonl',
    TWO + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
    _PC,
    ['rows.jsonl:3', "'prompt'"],
  ),
  'two objects on a line': (
    'rows.jsonl', LINE + LINE + b'\n' + TWO, _PC, ['rows.jsonl:1', 'Extra data']
  ),
  'single quotes': (
    'rows.jsonl', TWO + b"{'prompt': 'a'}\n", _PC, ['rows.jsonl:3', 'not JSON']
  ),
  'nesting without end': (
    'rows.jsonl', jsonl(ROW, deep(100_000)), _PC, ['rows.jsonl:2', 'too deep']
  ),
  'a null': (
    'rows.jsonl', jsonl(ROW, {**ROW, 'prompt': None}), _PC, ['jsonl:2', 'null']
  ),
  'a nested null': (
    'rows.jsonl',
    jsonl(ROW, {**ROW, 'prompt': {'text': None}}),
    _PC,
    ['rows.jsonl:2', 'dict'],
  ),
  'a number for a text': (
    'rows.jsonl', jsonl(ROW, {**ROW, 'completion': 5}), _PC, ['jsonl:2', 'int']
  ),
  'a list for a text': (
    'rows.jsonl', jsonl(ROW, {**ROW, 'prompt': ['a']}), _PC, ['jsonl:2', 'list']
  ),
  'a lone surrogate': (
    'rows.jsonl',
    TWO + b'{"prompt": "\\ud800", "completion": "b"}\n',
    _PC,
    ['rows.jsonl:3', 'lone surrogate'],
  ),
  'a missing column': (
    'rows.jsonl', jsonl(ROW, {'prompt': 'a'}), _PC, ['jsonl:2', "'completion'"]
  ),
  'an empty completion': (
    'rows.jsonl', jsonl(ROW, {**ROW, 'completion': ' '}), _PC, ['jsonl:2', 'empty']
  ),
  'no row short enough': (
    'rows.jsonl', jsonl({**ROW, 'completion': 'b' * 99}), _PC, ['jsonl:1', 'longer']
  ),
  'a template that is none': ('rows.jsonl', TWO, 'a{|b', ['a{|b']),
  'a template without columns': ('rows.jsonl', TWO, 'a{|}b', ['no column']),
  'a function that is nowhere': ('rows.jsonl', TWO, 'no.such:f', ['no.such']),
  # ids
  'no ids': ('rows.jsonl', TWO, _T, ['rows.jsonl:1', "'input_ids'"]),
  'NaN for an id': (
    'rows.jsonl', b'{"input_ids": [65, NaN, 257]}\n', _T, ['jsonl:1', 'integers']
  ),
  'fractions': ('rows.jsonl', ids([65.0, 257]), _T, ['jsonl:1', 'integers']),
  'true for an id': ('rows.jsonl', ids([True, 257]), _T, ['jsonl:1', 'integers']),
  'ids in a text': (
    'rows.jsonl', ids({'input_ids': '1 2'}), _T, ['jsonl:1', 'integers']
  ),
  'ids within ids': ('rows.jsonl', ids([[65], [66]]), _T, ['jsonl:1', 'integers']),
  'a negative id': ('rows.jsonl', ids([65, -1, 257]), _T, ['jsonl:1', 'negative']),
  'an id past 32 bits': (
    'rows.jsonl', ids([65, 2**40, 257]), _T, ['jsonl:1', '32 bits']
  ),
  'an id past the embedding': (
    'rows.jsonl', ids([65, 66, 257], [65, 260, 257]), _T, ['jsonl:2 (id 260)']
  ),
  'no id in a row': ('rows.jsonl', ids([65, 257], []), _T, ['jsonl:2', 'empty']),
  'labels of another length': (
    'rows.jsonl',
    ids({'input_ids': [65, 257], 'labels': [65]}),
    _T,
    ['rows.jsonl:1', '2, 1'],
  ),
  'a label below -100': (
    'rows.jsonl',
    ids({'input_ids': [65, 257], 'labels': [-101, 257]}),
    _T,
    ['rows.jsonl:1', 'negative'],
  ),
  'labels that are all masked': (
    'rows.jsonl',
    ids({'input_ids': [65, 257], 'labels': [-100, -100]}),
    _T,
    ['rows.jsonl:1', 'nothing to learn'],
  ),
}  # fmt: skip

SOUND = {
  'CRLF': ('rows.jsonl', TWO.replace(b'\n', b'\r\n'), _PC),
  'a BOM before rows': ('rows.jsonl', b'\xef\xbb\xbf' + TWO, _PC),
  'blank lines between': ('rows.jsonl', LINE + b'\n\n\n' + LINE, _PC),
  'no last newline': ('rows.jsonl', TWO + LINE, _PC),
  'CSV of Windows': ('rows.csv', b'prompt,completion\r\na,"b\r\nc"\r\n', _PC),
  'lines in a .json': ('rows.json', TWO, _PC),
  'a line of 10 MB': (
    'rows.jsonl', jsonl({**ROW, 'other': 'x' * 10_000_000}), _PC
  ),
}  # fmt: skip


def write(folder, name, content):
  folder.mkdir()
  path = folder / name
  path.write_bytes(content)
  return path


def tree(folder):
  return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


def validate(model, data, template, run_dir, capfd):
  """(exit code, lines that fail) of the verb."""
  changes = {'data.template': template}
  argv = command(model, data, run_dir, **changes)[1:]
  capfd.readouterr()
  code = verbs.cli(['validate', *argv])
  out, err = capfd.readouterr()
  assert not err
  assert 'Traceback' not in out
  return code, [line for line in out.splitlines() if line.startswith('FAIL')]


@pytest.mark.parametrize('case', BROKEN)
def test_a_malformed_file_fails_in_one_line(case, tiny_model, tmp_path, capfd):
  name, content, template, words = BROKEN[case]
  data = write(tmp_path / 'data', name, content)
  before = tree(tmp_path)
  code, failed = validate(tiny_model, data, template, tmp_path / 'run', capfd)
  assert code == 3
  assert len(failed) == 1
  for word in words:
    assert word in failed[0]
  assert tree(tmp_path) == before


def said(role, content):
  return {'role': role, 'content': content}


HI, HELLO = said('user', 'Hi'), said('assistant', 'Hello.')

# Conversations: (messages of the second row, words of the line that fails)
TALK = {
  'an unknown role': ([HI, said('robot', 'x')], ['message 2', "'robot'"]),
  'a content that is null': ([HI, said('assistant', None)], ['message 2']),
  'a content that is a list': ([said('user', [{}]), HELLO], ['message 1']),
  'an answer that is empty': ([HI, said('assistant', ' ')], ['message 2']),
  'no answer': ([HI], ['no assistant message']),
  'no messages': ([], ['no messages']),
  'a message that is text': (['Hi', HELLO], ['not an object', 'message 1']),
  'messages that are text': ('Hi', ['not a list of messages']),
  'a role that is missing': ([{'content': 'Hi'}, HELLO], ['message 1']),
  'half a surrogate': ([said('user', '\ud800'), HELLO], ['lone surrogate']),
}


@pytest.mark.parametrize('case', TALK)
def test_a_malformed_conversation_fails_in_one_line(
  case, tiny_model, tmp_path, capfd
):
  messages, words = TALK[case]
  path = tiny_model / 'tokenizer_config.json'
  own = json.loads(path.read_text()) if path.exists() else {}
  own['chat_template'] = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}"
    '{% endfor %}'
  )
  path.write_text(json.dumps(own))
  rows = jsonl({'messages': [HI, HELLO]}, {'messages': messages})
  data = write(tmp_path / 'data', 'rows.jsonl', rows)
  before = tree(tmp_path)
  code, failed = validate(tiny_model, data, 'chat', tmp_path / 'run', capfd)
  assert code == 3
  assert len(failed) == 1
  for word in ('rows.jsonl:2', *words):
    assert word in failed[0]
  assert tree(tmp_path) == before


@pytest.mark.parametrize('case', SOUND)
def test_a_file_that_only_looks_odd_is_sound(case, tiny_model, tmp_path, capfd):
  data = write(tmp_path / 'data', SOUND[case][0], SOUND[case][1])
  before = tree(tmp_path)
  result = validate(tiny_model, data, SOUND[case][2], tmp_path / 'run', capfd)
  assert result == (0, [])
  assert tree(tmp_path) == before


# A directory in place of the file: (what is in it, words)
FOLDERS = [
  ({}, ['a directory without data']),
  ({'README.md': b'#'}, ['a directory without data']),
  ({'a.jsonl': TWO, 'b.csv': b'prompt\n'}, ['several kinds']),
  ({'a.jsonl': TWO, 'b.jsonl': TWO + b'{'}, ['b.jsonl:3', 'cut off']),
  ({'state.json': b'{'}, ['state.json', 'not JSON']),
]


@pytest.mark.parametrize(('files', 'words'), FOLDERS)
def test_a_malformed_directory_fails_in_one_line(
  files, words, tiny_model, tmp_path, capfd
):
  folder = tmp_path / 'data'
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  code, failed = validate(tiny_model, folder, _PC, tmp_path / 'run', capfd)
  assert code == 3
  assert len(failed) == 1
  for word in words:
    assert word in failed[0]
  assert not (tmp_path / 'run').exists()


TRAINED = [
  'empty',
  'half a last line',
  'half a gz',
  'ragged CSV',
  'a nested null',
  'an id past the embedding',
  'labels of another length',
]


@pytest.mark.parametrize('case', TRAINED)
def test_train_refuses_it_in_the_same_words(case, tiny_model, tmp_path, capfd):
  name, content, template, words = BROKEN[case]
  data = write(tmp_path / 'data', name, content)
  before = tree(tmp_path)
  changes = {'data.template': template}
  argv = command(tiny_model, data, tmp_path / 'run', **changes)[1:]
  capfd.readouterr()
  assert verbs.cli(['train', *argv]) == 3
  _, err = capfd.readouterr()
  (line,) = err.splitlines()
  for word in words:
    assert word in line
  check_nothing_half_written(tmp_path / 'run')
  assert {p.name for p in Path(tmp_path / 'run').iterdir()} == {'LOCK'}
  assert before.items() <= tree(tmp_path).items()
