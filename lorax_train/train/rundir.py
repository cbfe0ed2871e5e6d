"""The run directory: one writer, one configuration.

LOCK is held (flock) while a run writes, so that two runs never share a
directory; the kernel drops it when a process dies, however it dies.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorax_train import config as config_lib
from lorax_train.errors import ConfigError, LockedError, ResumeError
from lorax_train.together import first, of_first, several, together
from lorax_train.train.checkpoint import write_atomically

CONFIG = 'config.json'
RUN = 'run.json'

_INPUTS = {
  'data': 'the rows of data.path or data.mixture',
  'weights': 'the weights of model.path',
}

# What may change between two starts of a run: it touches neither the weights
# nor which rows are trained on, and when.
_FREE = (
  'checkpoint.',
  'data.cache',
  'eval.every',
  'eval.samples',
  'mesh.',
  'model.attention',
  'model.remat',
  'run_dir',
  'train.log_every',
  'train.loss_chunk',
)


# How long what one host wrote may take to be seen by another.
_SEEN_WITHIN_S = 15


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
  """`locked` by process 0, in a directory that all processes of a run share.

  Raises:
    ConfigError: some process sees another directory under that name.
    LockedError: see `locked`, as for OSError.
  """
  with contextlib.ExitStack() as stack:
    with together():
      if first():
        stack.enter_context(locked(run_dir))
    if several():
      _check_shared(run_dir)
    yield


def _check_shared(run_dir: Path) -> None:
  # A name that nobody has asked for before: what is not there is cached too.
  token = run_dir / of_first(f'.seen-{secrets.token_hex(8)}')
  try:
    with together():
      if first():
        token.touch()
    with together():
      if not _appears(token):
        raise ConfigError(
          f'run_dir {run_dir}: another directory here than for process 0: give'
          ' one on a file system that all hosts share'
        )
  finally:
    if first():
      token.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
  """Whether a file is there, or comes in time."""
  patience = time.monotonic() + _SEEN_WITHIN_S
  while not path.exists():
    if time.monotonic() > patience:
      return False
    time.sleep(0.5)
  return True


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
  """Makes the directory, and holds its lock.

  Raises:
    LockedError: another process holds it.
    OSError: can't be written to.
  """
  try:
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / 'LOCK', 'a+', encoding='utf-8')  # noqa: SIM115
  except OSError as error:
    raise _unwritable(run_dir, error.strerror) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise _in_use(run_dir, file.read()) from None
    file.truncate(0)
    file.write(f'pid {os.getpid()}\n')
    file.flush()
    yield


def check_usable(run_dir: Path) -> None:
  """Refuses a directory that `locked` would refuse; makes and writes nothing.

  Raises:
    LockedError: another process holds it.
    OSError: can't be written to.
  """
  there = next(p for p in (run_dir, *run_dir.parents) if p.exists())
  mistake = 0
  if not there.is_dir():
    mistake = errno.ENOTDIR
  elif not os.access(there, os.W_OK | os.X_OK):
    mistake = errno.EACCES
  if mistake:
    raise _unwritable(run_dir, f'{os.strerror(mistake)}: {there}')
  try:
    file = open(run_dir / 'LOCK', encoding='utf-8')  # noqa: SIM115
  except FileNotFoundError:
    return
  with file:
    try:
      # Shared, and let go at once: no run that starts now is in its way.
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _in_use(run_dir, file.read()) from None


def _unwritable(run_dir: Path, cause: str | None) -> OSError:
  return OSError(
    f'run_dir {run_dir}: cannot be written to ({cause}): give another run_dir'
  )


def _in_use(run_dir: Path, holder: str) -> LockedError:
  return LockedError(
    f'run_dir {run_dir}: in use by {holder.strip() or "another run"}; wait for'
    ' it or give another run_dir'
  )


def check_same_run(
  run_dir: Path, mapping: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
  """Refuses to continue a run under another configuration or other data.

  A run that never got to a checkpoint has nothing to continue: a corrected
  configuration may start in its place.

  Args:
    run_dir: where config.json may be.
    mapping: the configuration, nested.
    inputs: fingerprints of what the run reads, by the names in _INPUTS.

  Raises:
    ResumeError: shows each key with its old and new value.
  """
  begun = any(run_dir.glob('checkpoints/*')) or any(
    (run_dir / name).exists() for name in ('adapter', 'model')
  )
  if not begun and not (run_dir / CONFIG).exists():
    return
  try:
    before = flat(json.loads((run_dir / CONFIG).read_text('utf-8')))
    inputs_before = dict(
      json.loads((run_dir / RUN).read_text('utf-8'))['inputs']
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    raise ResumeError(
      f'run_dir {run_dir}: its {CONFIG} or {RUN} is damaged or not of a run:'
      ' give another run_dir to start again'
    ) from None
  # A key that is younger than the run had no say in it.
  before = {**flat(config_lib.defaults()), **before}
  now = flat(mapping)
  changed = [
    f'{key} was {before.get(key)!r}, is {now.get(key)!r}'
    for key in sorted({*before, *now})
    if before.get(key) != now.get(key) and not _may_change(key, now)
  ]
  if not changed:
    changed = [
      f'{_INPUTS[name]} are not those it was started with'
      for name, value in inputs.items()
      if inputs_before.get(name) != value
    ]
  if changed and begun:
    raise ResumeError(
      f'run_dir {run_dir}: holds another run ({"; ".join(changed)}): set it'
      ' back to continue, or give another run_dir'
    )


def write_config(
  run_dir: Path, mapping: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
  """Writes config.json (as resolved) and run.json (what it was run on)."""
  ran = {'inputs': dict(inputs), 'versions': versions()}
  write_atomically(run_dir / RUN, json.dumps(ran, indent=2) + '\n')
  write_atomically(run_dir / CONFIG, json.dumps(mapping, indent=2) + '\n')


def versions() -> dict[str, str]:
  """Versions of what computes."""
  return {
    name: importlib.metadata.version(name)
    for name in ('lorax-train', 'jax', 'jaxlib', 'flax', 'optax')
  }


def flat(mapping: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': [1]}} -> {'a.b': (1,)}: JSON makes lists of tuples."""
  out: dict[str, Any] = {}
  for key, value in mapping.items():
    if isinstance(value, Mapping):
      out.update(flat(value, f'{prefix}{key}.'))
    else:
      out[f'{prefix}{key}'] = tuple(value) if isinstance(value, list) else value
  return out


def _may_change(key: str, now: Mapping[str, Any]) -> bool:
  # With a constant rate the steps done don't depend on how many there are.
  if key == 'train.steps':
    return now['train.schedule'] == 'constant'
  return key.startswith(_FREE)
