"""From a path to tokenised rows: against `read_rows` and `tokenize_rows`, which
know of no cache; what was kept is found by looking at the directory."""

import dataclasses
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from lorax_train.data import prepare as room
from lorax_train.data.prepare import Options, Progress, cache_root, prepare
from lorax_train.data.source import read_rows
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import DataError, ModelError

from .toys import ABC_CONFIG, abc_tokenizer, lists, write_tokenizer

TEXTS = ['ab' * (n % 5 + 1) + 'c' for n in range(1500)]


@pytest.fixture
def caches(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
  return tmp_path / 'caches' / 'lorax_train' / 'rows'


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(json.dumps({'text': t}) for t in TEXTS))
  return path


@pytest.fixture
def made(monkeypatch):
  """How often rows were tokenised."""
  calls = []

  def counted(*args, **kwargs):
    calls.append(args)
    return tokenize_rows(*args, **kwargs)

  monkeypatch.setattr(room.tokenized, 'tokenize_rows', counted)
  return calls


def test_rows_are_made_once(caches, path, made, abc_dir, capsys):
  tokenizer = load_tokenizer(abc_dir)
  expected = tokenize_rows(read_rows(str(path)), 'text', tokenizer, 9)
  for _ in range(2):
    got = prepare(str(path), 'text', tokenizer, Options(9))
    assert lists(got) == lists(expected)
    assert list(got.where) == list(expected.where)
    assert got[3:] == expected[3:]
  assert len(made) == 1
  assert cache_root() == caches and len(list(caches.iterdir())) == 1
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(
  'change, times',
  [
    ('nothing', 1),
    ('touch', 1),
    ('one byte', 2),
    ('template', 2),
    ('length', 2),
    ('truncation', 2),
    ('on_bad_row', 2),
    ('tokenizer', 2),
    ('eos', 2),
    ('names', 2),
    ('no cache', 2),
  ],
)
def test_what_makes_them_anew(
  caches, path, made, abc_dir, tmp_path, change, times
):
  tokenizer, template, options = load_tokenizer(abc_dir), 'text', Options(9)
  prepare(str(path), template, tokenizer, options)
  if change == 'touch':
    os.utime(path, (1, 1))
  elif change == 'one byte':
    stat = path.stat()
    path.write_text(path.read_text().replace('c', 'b', 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  elif change == 'template':
    template = '{|}{text}'
  elif change == 'tokenizer':
    tokenizer = load_tokenizer(
      write_tokenizer(
        tmp_path / 't',
        abc_tokenizer(),
        tokenizer_config=ABC_CONFIG | {'add_bos_token': False},
      )
    )
  elif change == 'eos':  # out of the model's config.json, no tokenizer file
    tokenizer = dataclasses.replace(tokenizer, eos_id=0)
  elif change == 'names':  # likewise, and read by the chat template
    tokenizer = dataclasses.replace(tokenizer, names={'bos_token': 'a'})
  elif change != 'nothing':
    other = {
      'length': {'max_length': 8},
      'truncation': {'truncation': 'left'},
      'on_bad_row': {'on_bad_row': 'skip'},
      'no cache': {'cache': False},
    }
    options = dataclasses.replace(options, **other[change])
  prepare(str(path), template, tokenizer, options)
  assert len(made) == times


def test_a_function_is_never_kept(caches, path, made, abc_dir, monkeypatch):
  monkeypatch.chdir(path.parent)
  monkeypatch.delitem(sys.modules, 'mine', raising=False)
  (path.parent / 'mine.py').write_text(
    "def render(fields):\n  return '', fields['text']\n"
  )
  for _ in range(2):
    got = prepare(str(path), 'mine:render', load_tokenizer(abc_dir), Options(9))
  assert len(made) == 2 and not caches.exists()
  assert len(got.ids) == len(TEXTS)


@pytest.mark.parametrize('when', ['before', 'after'])
def test_nothing_is_kept_of_a_file_that_changes(
  caches, path, abc_dir, monkeypatch, when
):
  """Between the key and the rows, or when all of them are read."""
  tokenizer = load_tokenizer(abc_dir)
  step = {'before': 'iter_rows', 'after': None}[when]
  room_of = room.source if step else room.tokenized
  name = step or 'tokenize_rows'
  real = getattr(room_of, name)

  def changing(*args, **kwargs):
    done = None if step else real(*args, **kwargs)
    path.write_text('{"text": "c"}')
    return real(*args, **kwargs) if step else done

  monkeypatch.setattr(room_of, name, changing)
  with pytest.raises(DataError, match=r'rows\.jsonl: was changed while it was'):
    prepare(str(path), 'text', tokenizer, Options(9))
  assert not [p for p in caches.rglob('*') if p.is_file()]


def test_the_name_of_a_file_need_not_be_utf8(caches, tmp_path, abc_dir):
  name = os.fsdecode(os.fsencode(tmp_path) + b'/\xff.jsonl')
  with open(name, 'w') as file:
    file.write('{"text": "c"}')
  for _ in range(2):
    got = prepare(name, 'text', load_tokenizer(abc_dir), Options(9))
    assert list(got.where) == [f'{name}:1']


def test_bad_rows_are_told_and_nothing_is_kept(caches, path, abc_dir):
  with path.open('a') as file:
    file.write('\n{"text": ""}\n{"text": 1}\n')
  with pytest.raises(DataError, match=f'rows.jsonl:{len(TEXTS) + 1} empty'):
    prepare(str(path), 'text', load_tokenizer(abc_dir), Options(9))
  assert not [p for p in caches.rglob('*') if p.is_file()]


def test_no_rows(caches, tmp_path, abc_dir):
  (tmp_path / 'none.json').write_text('[]')
  with pytest.raises(DataError, match=r'none\.json: no rows; pass a file'):
    prepare(
      str(tmp_path / 'none.json'), 'text', load_tokenizer(abc_dir), Options(9)
    )


def test_files_of_a_tokenizer_that_disagree(
  caches, path, sentencepiece_dir, abc_dir, tmp_path
):
  both = tmp_path / 'both'
  both.mkdir()
  for source in (sentencepiece_dir, abc_dir):
    for file in source.iterdir():
      (both / file.name).write_bytes(file.read_bytes())
  with pytest.raises(ModelError, match='give different ids'):
    prepare(str(path), 'text', load_tokenizer(both), Options(9))


class Clock:
  """Seconds that a test lets pass."""

  now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize(
  'out, times, said',
  [
    (io.StringIO, [0.5, 1, 29], ''),
    (
      io.StringIO,
      [1, 30, 31, 60],
      'tokenising d: 10 rows, 3,000 tokens, 100 tokens/s\n'
      'tokenising d: 10 rows, 3,000 tokens, 50 tokens/s\n',
    ),
    (Terminal, [0.5, 0.9], ''),
    (
      Terminal,
      [1, 1.2, 30],
      '\rtokenising d: 10 rows, 3,000 tokens, 3,000 tokens/s'
      '\rtokenising d: 10 rows, 3,000 tokens, 100 tokens/s  '
      '\r                                                 \r',
    ),
  ],
)
def test_progress(out, times, said):
  clock, stream = Clock(), out()
  with Progress('d', stream, clock) as progress:
    for clock.now in times:
      progress(10, 3000)
  assert stream.getvalue() == said


@pytest.mark.parametrize(
  'columns, shown',
  [
    (99, 'tokenising d: 10 rows, 3,000 tokens, 100 tokens/s'),
    (50, 'tokenising d: 10 rows, 3,000 tokens, 100 tokens/s'),
    (49, '10 rows, 3,000 tokens, 100 tokens/s'),
    (20, '10 rows, 3,000 toke'),
  ],
)
def test_progress_on_a_narrow_terminal(monkeypatch, columns, shown):
  clock, stream = Clock(), Terminal()
  monkeypatch.setattr(room, '_columns', lambda terminal: columns)
  progress = Progress('d', stream, clock)
  clock.now = 30
  progress(10, 3000)
  assert stream.getvalue() == f'\r{shown}'


def test_the_columns_of_a_terminal():
  ours, theirs = pty.openpty()
  with os.fdopen(ours), os.fdopen(theirs, 'w') as terminal:
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 37, 0, 0))
    assert room._columns(terminal) == 37
  assert room._columns(io.StringIO()) == 80


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path, abc_dir):
  """15 times the rows: ids and labels lie on the disk."""
  program = (
    'import sys, tracemalloc\n'
    'from lorax_train.data.prepare import Options, prepare\n'
    'from lorax_train.data.tokenize import load_tokenizer\n'
    'tokenizer = load_tokenizer(sys.argv[1])\n'
    'for path in sys.argv[2:]:\n'
    '  tracemalloc.start()\n'
    "  rows = prepare(path, 'text', tokenizer, Options(999))\n"
    '  print(tracemalloc.get_traced_memory()[1], rows.report.tokens)\n'
    '  tracemalloc.stop()\n'
  )
  paths = []
  for n in (2_000, 30_000):
    paths.append(tmp_path / f'{n}.jsonl')
    row = json.dumps({'text': 'cab' * 30}) + '\n'
    paths[-1].write_text(row * n)
  done = subprocess.run(
    [sys.executable, '-c', program, abc_dir, *paths],
    env=os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'c')},
    check=True,
    capture_output=True,
    text=True,
  )
  (few, _), (many, tokens) = (
    map(int, line.split()) for line in done.stdout.splitlines()
  )
  assert tokens == 30_000 * 62
  assert many < few + 1_000_000 < 8 * tokens / 2
