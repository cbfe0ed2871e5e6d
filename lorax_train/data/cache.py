"""Tokenised rows on disk, so that the next run need not make them again.

    root/<key>/            its lock is on the directory itself (flock)
      rows/                appears in one move, when it is whole
        ids.i4 ...         see columns.py
        meta.json          report, fingerprint, a sha256 of each other file

What is there is believed only as far as the sums go. Two processes that want
the same rows: one makes them, the other waits and reads them.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lorax_train.data import columns
from lorax_train.data.tokenized import Report, TokenizedSet

_ROWS, _META = 'rows', 'meta.json'
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LIBRARIES = ('tokenizers', 'sentencepiece', 'jinja2')


def tokenized_once(
  root: Path,
  made_of: Mapping[str, object],
  make: Callable[[Path], TokenizedSet],
  say: Callable[[str], None],
) -> TokenizedSet:
  """Tokenised rows out of the cache, or made and put there.

  Args:
    root: directory of the cache; made where absent.
    made_of: all that the rows depend on but the code, ready for JSON: this and
      the code are the key.
    make: makes the rows in an empty directory, as `tokenize_rows` does.
    say: told in one line what a user should know.

  Raises:
    OSError: disk full. A cache that can't be written at all is done without.
    Exception: whatever `make` raises; the cache is then as it was.
  """
  entry = root / _key(made_of)
  try:
    entry.mkdir(parents=True, exist_ok=True)
    opened = os.open(entry, os.O_RDONLY)
  except OSError as error:
    say(f'tokenised rows are not kept: {entry}: {error.strerror}')
    return make_unkept(make)
  with _locked(opened, lambda: say(f'waiting for another run at {entry}')):
    try:
      return _read(entry / _ROWS)
    except FileNotFoundError:
      pass
    except (OSError, ValueError, KeyError, TypeError):
      say(f'damaged, made again: {entry}')
    try:
      building = _empty(entry)
    except OSError as error:
      say(f'tokenised rows are not kept: {entry}: {error.strerror}')
      return make_unkept(make)
    try:
      _write_meta(building, make(building))
      # Another's, where there are no locks, is as good.
      with contextlib.suppress(FileExistsError):
        building.rename(entry / _ROWS)
      return _read(entry / _ROWS)
    except OSError as error:
      if error.errno not in _FULL:
        raise
      raise OSError(
        f'{entry}: tokenised rows not written ({error.strerror}); make room, or'
        ' set XDG_CACHE_HOME to another disk'
      ) from error
    finally:
      shutil.rmtree(building, ignore_errors=True)
      with contextlib.suppress(OSError):
        entry.rmdir()  # where nothing came of it


def make_unkept(make: Callable[[Path], TokenizedSet]) -> TokenizedSet:
  """Rows in files without a name: on the disk, and gone with the process."""
  with tempfile.TemporaryDirectory(prefix='lorax_train') as folder:
    return make(Path(folder))


def _key(made_of: Mapping[str, object]) -> str:
  digest = hashlib.sha256()
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  text = json.dumps([made_of, versions], sort_keys=True)
  digest.update(text.encode())
  for path in sorted(Path(__file__).parent.glob('*.py')):
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(directory: int, waiting: Callable[[], None]) -> Iterator[None]:
  """Holds an open directory's lock, and closes it.

  Where the file system has no locks none is held: rows still appear in one
  move, and are at worst made twice.
  """
  try:
    try:
      fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      waiting()
      fcntl.flock(directory, fcntl.LOCK_EX)
    except OSError:
      pass
    yield
  finally:
    os.close(directory)


def _empty(entry: Path) -> Path:
  """A new directory in `entry`, which loses what is damaged or was left."""
  entry.mkdir(exist_ok=True)  # who held the lock may have taken it away
  for path in entry.iterdir():
    shutil.rmtree(path)
  return Path(tempfile.mkdtemp(dir=entry))


def _read(rows: Path) -> TokenizedSet:
  meta = json.loads((rows / _META).read_text('utf-8'))
  if columns.sums(rows) != meta['sha256']:
    raise ValueError('not what was written')
  return TokenizedSet(
    *columns.mapped(rows), Report(**meta['report']), meta['fingerprint']
  )


def _write_meta(folder: Path, tokenized: TokenizedSet) -> None:
  meta = {
    'report': dataclasses.asdict(tokenized.report),
    'fingerprint': tokenized.fingerprint,
    'sha256': columns.sums(folder),
  }
  (folder / _META).write_text(json.dumps(meta, indent=2) + '\n', 'utf-8')
