"""The cache against rows that are tokenised afresh; what is in it is found by
looking at the directory."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil

import numpy as np
import pytest

from lorax_train.data import cache
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import DataError

from .toys import lists, rows_of

ROWS_OF_A_PAGE = [{'text': 'c' * 90}] * 50
ROWS = rows_of(*({'text': 'ab' * n + 'c'} for n in range(1, 40)))


class Cache:
  """A cache of ROWS, and what happened to it."""

  def __init__(self, root, tokenizer):
    self.root, self.tokenizer = root, tokenizer
    self.made, self.said = 0, []

  def __call__(self, rows=ROWS, **made_of):
    def make(folder):
      self.made += 1
      return tokenize_rows(rows, 'text', self.tokenizer, 99, folder=folder)

    return cache.tokenized_once(self.root, made_of, make, self.said.append)

  def files(self):
    """All that lies there, by name."""
    return {p.name: p for p in self.root.rglob('*') if p.is_file()}


@pytest.fixture
def kept(tmp_path, abc_dir):
  return Cache(tmp_path / 'cache', load_tokenizer(abc_dir))


def as_told(tokenized):
  return (
    lists(tokenized),
    list(tokenized.where),
    tokenized.report,
    tokenized.fingerprint,
    tokenized.lengths.tolist(),
  )


def test_the_same_rows_again(kept):
  fresh = as_told(tokenize_rows(ROWS, 'text', kept.tokenizer, 99))
  assert as_told(kept()) == as_told(kept()) == fresh
  assert (kept.made, kept.said) == (1, [])
  assert sorted(kept.files()) == [
    'ends.i8',
    'ids.i4',
    'labels.i4',
    'meta.json',
    'places.i8',
    'where.txt',
  ]
  # The files' format, read without our reader.
  ids = np.fromfile(kept.files()['ids.i4'], '<i4')
  assert ids.tolist() == [i for row, _ in fresh[0] for i in row]


def test_rows_are_read_where_they_lie(kept):
  kept()
  first = kept().ids[0]
  while isinstance(first.base, np.ndarray):
    first = first.base
  assert isinstance(first, np.memmap) and not first.flags.writeable


def test_the_key_is_all_that_rows_are_made_of(kept, monkeypatch):
  kept(template='a')
  kept(template='b')
  kept(template='a')
  assert kept.made == 2
  monkeypatch.setattr(cache.importlib.metadata, 'version', lambda name: '0')
  kept(template='a')
  assert kept.made == 3


@pytest.mark.parametrize(
  'name', ['ids.i4', 'labels.i4', 'ends.i8', 'where.txt', 'places.i8']
)
@pytest.mark.parametrize('how', ['bit', 'cut', 'empty', 'gone'])
def test_damage_is_seen_and_mended(kept, name, how):
  before = as_told(kept())
  path = kept.files()[name]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  if how == 'gone':
    path.unlink()
  else:
    path.write_bytes({'bit': data, 'cut': data[:-1], 'empty': b''}[how])
  assert as_told(kept()) == before
  assert kept.made == 2
  # A file that is gone is taken for rows that were never made.
  assert [s.partition(':')[0] for s in kept.said] == (
    [] if how == 'gone' else ['damaged, made again']
  )
  assert as_told(kept()) == before and kept.made == 2


@pytest.mark.parametrize(
  'text', ['', '{}', '[]', '{"sha256": 1}', 'x', '[' * 100_000]
)
def test_damaged_meta(kept, text):
  before = as_told(kept())
  kept.files()['meta.json'].write_text(text)
  assert as_told(kept()) == before
  assert kept.made == 2


@pytest.mark.parametrize('digit', ['"rows_kept": 39', '"fingerprint": "'])
def test_a_digit_of_meta_is_damage_too(kept, digit):
  before = as_told(kept())
  path = kept.files()['meta.json']
  text = path.read_text()
  assert text.count(digit) == 1
  path.write_text(text.replace(digit, digit.replace('39', '38') + '0'))
  assert as_told(kept()) == before and kept.made == 2


def test_what_a_killed_run_left_is_cleared(kept):
  kept()
  (entry,) = kept.root.iterdir()
  (entry / 'rows').rename(entry / 'tmp_left')
  kept()
  assert [p.name for p in entry.iterdir()] == ['rows']


def test_bad_rows_leave_nothing(kept):
  with pytest.raises(DataError, match='empty completion'):
    kept(rows_of({'text': 'a'}, {'text': ''}))
  assert not kept.files() and not list(kept.root.iterdir())


def test_a_full_disk(kept):
  """Files that may hold a page each, cached or not."""
  rows = rows_of(*ROWS_OF_A_PAGE)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(OSError, match=r'rows not written .* XDG_CACHE_HOME'):
      kept(rows)
    with pytest.raises(OSError, match=r'rows not written .* TMPDIR to another'):
      cache.make_unkept(
        lambda folder: tokenize_rows(
          rows, 'text', kept.tokenizer, 10_000, folder=folder
        )
      )
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(kept.root.iterdir())


def test_no_directory_for_it(kept):
  kept.root.write_text('a file')
  assert lists(kept()) == lists(kept())
  assert kept.made == 2
  assert len(kept.said) == 2
  assert kept.said[0].startswith('tokenised rows are not kept: ')


def test_unkept_rows_outlive_their_files(kept, monkeypatch, tmp_path):
  monkeypatch.setattr(cache.tempfile, 'tempdir', str(tmp_path))
  made = cache.make_unkept(
    lambda folder: tokenize_rows(
      ROWS, 'text', kept.tokenizer, 99, folder=folder
    )
  )
  assert not list(tmp_path.iterdir())
  assert lists(made) == lists(kept())


def _make(root, folder, ready, answers):
  """Another process that wants the rows, at the same moment."""
  one = Cache(root, load_tokenizer(folder))
  ready.wait()
  told = as_told(one())
  answers.put((one.made, told[-2], told[0]))


def test_two_processes_at_once(kept, abc_dir):
  context = multiprocessing.get_context('spawn')
  ready, answers = context.Barrier(3), context.Queue()
  args = kept.root, abc_dir, ready, answers
  processes = [context.Process(target=_make, args=args) for _ in range(3)]
  for process in processes:
    process.start()
  got = [answers.get(timeout=60) for _ in processes]
  for process in processes:
    process.join()
  fresh = tokenize_rows(ROWS, 'text', kept.tokenizer, 99)
  assert sorted(made for made, *_ in got) == [0, 0, 1]
  assert [print_ for _, print_, _ in got] == [fresh.fingerprint] * 3
  assert [rows for *_, rows in got] == [lists(fresh)] * 3
  (entry,) = kept.root.iterdir()
  assert [p.name for p in entry.iterdir()] == ['rows']


def test_who_waits_says_so(kept):
  kept()
  (entry,) = kept.root.iterdir()
  shutil.rmtree(entry / 'rows')
  said = []

  def make(folder):
    # Within the lock: who comes now can't have it.
    with pytest.raises(InterruptedError), cache._locked(entry, stop):
      pass
    return tokenize_rows(ROWS, 'text', kept.tokenizer, 99, folder=folder)

  def stop():
    raise InterruptedError

  cache.tokenized_once(kept.root, {}, make, said.append)
  meta = json.loads(kept.files()['meta.json'].read_text())
  assert meta['report']['rows_kept'] == len(ROWS) and said == []


def test_a_lock_that_was_taken_away_is_none(tmp_path, monkeypatch):
  """Who held it took its file away while the next one waited for it."""
  entry = tmp_path / 'entry'
  path = tmp_path / 'entry.lock'
  real, files = fcntl.flock, []

  def flock(file, how):
    if not files:
      path.unlink()
    files.append(os.fstat(file.fileno()).st_ino)
    real(file, how)

  monkeypatch.setattr(cache.fcntl, 'flock', flock)
  with cache._locked(entry, lambda: None) as held:
    assert held and len(files) == 2 and path.stat().st_ino == files[1]
  assert [p.name for p in tmp_path.iterdir()] == ['entry']


@pytest.mark.parametrize('when', ['before', 'after'])
def test_two_at_once_without_locks(kept, monkeypatch, when):
  """The other begins and ends while the first makes its rows."""

  def no_locks(*args):
    raise OSError(errno.EBADF, 'Bad file descriptor')

  monkeypatch.setattr(cache.fcntl, 'flock', no_locks)
  others = []

  def make(folder):
    if when == 'before':
      others.append(kept())
    made = tokenize_rows(ROWS, 'text', kept.tokenizer, 99, folder=folder)
    if when == 'after':
      others.append(kept())
    return made

  first = cache.tokenized_once(kept.root, {}, make, kept.said.append)
  fresh = as_told(tokenize_rows(ROWS, 'text', kept.tokenizer, 99))
  assert as_told(first) == as_told(*others) == as_told(kept()) == fresh
  assert kept.made == 1 and not kept.said
  (entry,) = kept.root.iterdir()
  assert [p.name for p in entry.iterdir()] == ['rows']
