"""Checkpoints that are whole or absent.

    checkpoints/<step>/state/          orbax: step, trainable, opt_state
    checkpoints/<step>/leaves.json     dtype and shape of every leaf of it
    checkpoints/<step>/MANIFEST.json   size and sha256 of every file

Orbax restores flipped bits without a word, and calls steps saved whose bytes
never reached the disk. So the manifest, written last and renamed into place,
is the commit marker: a step without a valid one does not exist. Orbax also
casts, and drops what a tree has no place for, without a word: hence the
leaves. Keys are not stored: they follow from the seed, which a resumed run
must share.

Of several processes each writes its part of the state, into a directory that
all see; process 0 does all else, and what it finds or fails at all are told.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lorax_train.errors import ResumeError, first_and_last, quiet
from lorax_train.together import first, lost, of_first, together

MANIFEST = 'MANIFEST.json'
LEAVES = 'leaves.json'
STATE = 'state'
_CORRUPT = '.corrupt'

Tree = Any


def save(root: Path, step: int, state: Tree, keep: int) -> None:
  """Writes a step, verifies it is on disk, then prunes to `keep` steps.

  Raises:
    OSError: disk full, no rights; earlier steps are untouched.
  """
  target = root / str(step)
  with together():
    if first():
      shutil.rmtree(target, ignore_errors=True)
      target.mkdir(parents=True)
  try:
    with _explained(target):
      _save_state(target / STATE, state)
    with together():
      if first():
        with _explained(target):
          _commit(target, step, _leaves(state))
  except BaseException:
    if first():
      shutil.rmtree(target, ignore_errors=True)
    raise
  with together():
    for old in _steps(root)[:-keep] if first() else ():
      shutil.rmtree(root / str(old))


def _commit(target: Path, step: int, leaves: dict[str, str]) -> None:
  """Writes what says that the step is whole."""
  write_atomically(target / LEAVES, json.dumps(leaves, indent=2))
  write_atomically(
    target / MANIFEST,
    json.dumps({'step': step, 'files': _digests(target)}, indent=2),
  )


def restore_latest(
  root: Path, like: Tree, note: Callable[[str], None]
) -> Tree | None:
  """The newest valid step as a tree like `like`, or None if there is none.

  Args:
    root: the directory of steps; may be absent.
    like: tree of ShapeDtypeStructs with shardings.
    note: told, a line each, of what was found damaged and set aside.

  Raises:
    ResumeError: steps exist but none is valid, or it holds another tree.
  """
  step = None
  with together():
    if first():
      step = _newest_valid(root, note)
  step = of_first(step)
  if step is None:
    return None
  with together():
    _check_leaves(root / str(step), like)
  # The processes wait for one another in it: who fails here, fails alone.
  return _restore(root / str(step), like)


def _newest_valid(root: Path, note: Callable[[str], None]) -> int | None:
  """The step to restore; sets aside what is damaged before it."""
  _clear_unfinished(root, note)
  steps = _steps(root)
  for step in reversed(steps):
    problem = _problem(root / str(step))
    if problem is None:
      return step
    aside = root / f'{step}{_CORRUPT}'
    shutil.rmtree(aside, ignore_errors=True)
    (root / str(step)).rename(aside)
    note(f'checkpoint {step} is damaged ({problem}); set aside as {aside.name}')
  if steps or any(root.glob(f'*{_CORRUPT}')):
    raise ResumeError(
      f'{root}: no valid checkpoint left: give another run_dir to start again,'
      ' or put a good step back'
    )
  return None


def latest_step(root: Path) -> int | None:
  """The newest step with a manifest; whether its bytes are good is not asked."""
  steps = _steps(root)
  return steps[-1] if steps else None


def describe(directory: Path) -> dict[str, Any]:
  """What a step on disk holds, and whether it is as it was written.

  Args:
    directory: of the step; one that was set aside or never finished will do.

  Returns:
    {'path', 'leaves': {name: 'float32[2, 3]'}, 'files', 'bytes', 'problem'}:
    the last is None where the step could be restored.
  """
  sizes = [p.stat().st_size for p in directory.rglob('*') if p.is_file()]
  try:
    leaves = dict(json.loads((directory / LEAVES).read_text('utf-8')))
  except (OSError, ValueError, TypeError):
    leaves = {}
  finished = (directory / MANIFEST).exists()
  return {
    'path': str(directory),
    'leaves': leaves,
    'files': len(sizes),
    'bytes': sum(sizes),
    'problem': _problem(directory) if finished else f'no {MANIFEST}',
  }


def write_atomically(path: Path, text: str) -> None:
  """Writes a text file so that it is there whole or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
  try:
    yield
  except (ValueError, OSError) as error:  # ValueErrors are tensorstore's
    if lost(error):
      raise
    raise OSError(
      f'{target}: checkpoint not written, earlier ones are untouched: make room'
      f' and run again: {first_and_last(error)[-300:]}'
    ) from error


def _save_state(directory: Path, state: Tree) -> None:
  with quiet(), ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory, state)


def _check_leaves(directory: Path, like: Tree) -> None:
  stored = json.loads((directory / LEAVES).read_text('utf-8'))
  wanted = _leaves(like)
  differ = [
    f'{name} is {stored.get(name, "absent")}, not {wanted.get(name, "absent")}'
    for name in {**stored, **wanted}
    if stored.get(name) != wanted.get(name)
  ]
  if differ:
    more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
    raise ResumeError(
      f'{directory}: holds another state than this configuration trains:'
      f' {"; ".join(differ[:3])}{more}: give another run_dir to start again'
    )


def _restore(directory: Path, like: Tree) -> Tree:
  try:
    with quiet(), ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(directory / STATE, like)
  except (ValueError, KeyError, TypeError) as error:
    if lost(error):
      raise
    raise ResumeError(
      f'{directory}: cannot be restored: give another run_dir to start again:'
      f' {first_and_last(error)[-300:]}'
    ) from error


def _leaves(tree: Tree) -> dict[str, str]:
  """{".trainable['w'].a": 'float32[2, 3]'}."""

  def kind(x):
    dtype = getattr(x, 'dtype', type(x).__name__)
    return f'{dtype}{list(getattr(x, "shape", ()))}'

  return {
    jax.tree_util.keystr(path): kind(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _steps(root: Path) -> list[int]:
  """Steps with a manifest, in order."""
  return sorted(
    int(path.parent.name)
    for path in root.glob(f'*/{MANIFEST}')
    if re.fullmatch(r'\d+', path.parent.name)
  )


def _clear_unfinished(root: Path, note: Callable[[str], None]) -> None:
  """Removes steps that were cut off before their manifest."""
  for path in root.glob('*'):
    unfinished = re.fullmatch(r'\d+', path.name) and path.is_dir()
    if unfinished and not (path / MANIFEST).exists():
      note(f'checkpoint {path.name} was not finished; removed')
      shutil.rmtree(path)


def _problem(directory: Path) -> str | None:
  """What is wrong with a step on disk, or None."""
  try:
    manifest = json.loads((directory / MANIFEST).read_text('utf-8'))
    listed, step = dict(manifest['files']), manifest['step']
    found = _digests(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f'{MANIFEST}: {type(error).__name__}'
  if str(step) != directory.name.removesuffix(_CORRUPT):
    return f'{MANIFEST} is that of step {step}'
  for name in sorted({*listed, *found}):
    if listed.get(name) != found.get(name):
      return f'{name} is not as it was written'
  return None


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
  """{relative name: size and sha256} of all files but the manifest."""
  digests = {}
  for path in sorted(directory.rglob('*')):
    name = path.relative_to(directory).as_posix()
    if path.is_file() and name != MANIFEST:
      with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      digests[name] = {'size': path.stat().st_size, 'sha256': digest}
  return digests
