"""Tokenised rows on disk, so that the next run need not make them again.

    root/<key>.lock        held (flock) and taken away by who makes the rows
    root/<key>/rows/       appears in one move, when it is whole
        ids.i4 ...         see columns.py
        meta.json          report, fingerprint, a sha256 of all of it

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
from typing import Any

from lorax_train.data import columns
from lorax_train.data.tokenized import Report, TokenizedSet

_ROWS, _META = 'rows', 'meta.json'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_THERE = (errno.EEXIST, errno.ENOTEMPTY)
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
  kept = _kept(entry, lambda text: None)  # which needs no lock
  if kept is not None:
    return kept
  with contextlib.ExitStack() as stack:
    try:
      held = stack.enter_context(
        _locked(entry, lambda: say(f'waiting for another run at {entry}'))
      )
      kept = _kept(entry, say)
      if kept is not None:
        return kept
      building = _empty(entry, held)
    except OSError as error:
      say(f'tokenised rows are not kept: {entry}: {error.strerror}')
      return make_unkept(make)
    try:
      with _told_if_full(entry, 'XDG_CACHE_HOME'):
        made = make(building)
        _write_meta(building, made)
        try:
          building.rename(entry / _ROWS)
        except OSError as error:
          # Another's, where there are no locks, is as good.
          if error.errno not in _THERE:
            raise
      return made  # mapped, whatever becomes of the names
    finally:
      shutil.rmtree(building, ignore_errors=True)
      with contextlib.suppress(OSError):
        entry.rmdir()  # where nothing came of it


def make_unkept(make: Callable[[Path], TokenizedSet]) -> TokenizedSet:
  """Rows in files without a name: on the disk, and gone with the process.

  Raises:
    OSError: disk full.
  """
  with (
    _told_if_full(Path(tempfile.gettempdir()), 'TMPDIR'),
    tempfile.TemporaryDirectory(
      prefix='lorax_train', ignore_cleanup_errors=True
    ) as folder,
  ):
    return make(Path(folder))


@contextlib.contextmanager
def _told_if_full(place: Path, variable: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise OSError(
      f'{place}: tokenised rows not written ({error.strerror}); make room, or'
      f' set {variable} to another disk'
    ) from error


def _key(made_of: Mapping[str, object]) -> str:
  digest = hashlib.sha256()
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  text = json.dumps([made_of, versions], sort_keys=True)
  digest.update(text.encode())
  for path in sorted(Path(__file__).parent.glob('*.py')):
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(entry: Path, waiting: Callable[[], None]) -> Iterator[bool]:
  """Makes a directory and holds its lock; tells whether it does.

  Where the file system has no locks none is held: rows still appear in one
  move, and are at worst made twice. The lock is on a file that is open for
  writing: on a directory, NFS has it for this host alone.

  Raises:
    OSError: the directory or the lock can't be made.
  """
  path = entry.with_name(f'{entry.name}.lock')
  entry.parent.mkdir(parents=True, exist_ok=True)
  while True:
    with path.open('ab') as file:
      held = True
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
      except OSError:
        held = False
      # Who held it has taken the file away: another's is the lock by now.
      if held and not _is_at(path, file.fileno()):
        continue
      try:
        entry.mkdir(exist_ok=True)
        yield held
      finally:
        path.unlink(missing_ok=True)
      return


def _is_at(path: Path, opened: int) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(opened))
  except FileNotFoundError:
    return False


def _empty(entry: Path, held: bool) -> Path:
  """A new directory in `entry`, which loses what is damaged or was left.

  Without the lock, what was left may be what another run is making.
  """
  for path in entry.iterdir() if held else (entry / _ROWS,):
    if path.exists():
      shutil.rmtree(path)
  return Path(tempfile.mkdtemp(dir=entry))


def _kept(entry: Path, say: Callable[[str], None]) -> TokenizedSet | None:
  """The rows of an entry; None where there are none, or damaged ones."""
  try:
    return _read(entry / _ROWS)
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    say(f'damaged, made again: {entry}')
  return None


def _read(rows: Path) -> TokenizedSet:
  meta = json.loads((rows / _META).read_text('utf-8'))
  wanted = meta.pop('sha256')
  if _sums(rows, meta) != wanted:
    raise ValueError('not what was written')
  return TokenizedSet(
    *columns.mapped(rows), Report(**meta['report']), meta['fingerprint']
  )


def _write_meta(folder: Path, tokenized: TokenizedSet) -> None:
  meta: dict[str, Any] = {
    'report': dataclasses.asdict(tokenized.report),
    'fingerprint': tokenized.fingerprint,
  }
  meta['sha256'] = _sums(folder, meta)
  (folder / _META).write_text(json.dumps(meta, indent=2) + '\n', 'utf-8')


def _sums(folder: Path, meta: Mapping[str, Any]) -> dict[str, str]:
  """Sha256 of each file, and of what else meta.json holds."""
  content = json.dumps(meta, sort_keys=True).encode()
  return {**columns.sums(folder), _META: hashlib.sha256(content).hexdigest()}
