"""A training process, from its command line to its exit code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from lorax_train import distributed, errors, together
from lorax_train.config import TrainConfig
from lorax_train.train import loop


def run(cfg: TrainConfig, options: distributed.Options) -> int:
  """Joins the other processes, trains, and returns the exit code.

  All processes of a run end with the same code, and process 0 says why: none
  returns before the others have come to their end. One that fails where the
  others can't know of it ends at once, and they after it.

  Raises:
    UserError: alone, what is wrong; the caller reports it.
    OSError: likewise.
  """
  distributed.start(options)
  keep_compiled()
  if not together.several():
    loop.run(cfg)
    return 0
  with _others_silent():
    code = _run_as_one(cfg)
  jax.distributed.shutdown()
  return code


def _run_as_one(cfg: TrainConfig) -> int:
  try:
    loop.run(cfg)
  except together.FailedError as failed:
    if together.first():
      where = f'process {failed.process}: ' if failed.process else ''
      print(where + failed.line, file=sys.stderr, flush=True)
    return failed.code
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      together.leave(1, errors.first_and_last(error))
    together.leave(
      errors.StoppedError.exit_code,
      'the other processes no longer answer, one of them has ended: run the same'
      f' command again to continue: {errors.first_and_last(error)[:300]}',
    )
  except BaseException as error:
    told = errors.outcome(error)
    if told is None:
      traceback.print_exc(file=sys.__stderr__)
    together.leave(*(told or (1, f'{type(error).__name__}: {error}')))
  return 0


def keep_compiled() -> None:
  """On accelerators programs are kept for the next start.

  Among the user's caches, where he chose no other place by
  JAX_COMPILATION_CACHE_DIR or jax's flag. On a CPU they are compiled anew: they
  are of one machine's instructions, and quick to make.
  """
  chosen = jax.config.values['jax_compilation_cache_dir'] is not None
  if chosen or jax.default_backend() == 'cpu':
    return
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  folder = os.path.join(caches, 'lorax_train', 'compiled')
  jax.config.update('jax_compilation_cache_dir', folder)


@contextlib.contextmanager
def _others_silent() -> Iterator[None]:
  """Only process 0 prints."""
  if together.first():
    yield
    return
  with (
    open(os.devnull, 'w', encoding='utf-8') as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield
