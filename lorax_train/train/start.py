"""A training process, from its command line to its exit code."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator

import jax

from lorax_train import distributed, errors, hardware, together
from lorax_train.config import TrainConfig
from lorax_train.data.prepare import cache_root
from lorax_train.train import loop

# A run, and what is to be said of it, before anything is loaded.
Prepare = Callable[[TrainConfig], tuple[TrainConfig, list[str]]]


def run(
  cfg: TrainConfig, options: distributed.Options, prepare: Prepare
) -> int:
  """Joins the other processes, trains, and returns the exit code.

  All processes of a run end with the same code, and process 0 says why: none
  returns before the others have come to their end. One that fails where the
  others can't know of it ends at once, and they after it.

  Args:
    cfg: the run.
    options: how the processes find each other.
    prepare: asked, when they have, whether the run fits its devices, and for
      its remat; what process 0 hears counts.

  Raises:
    UserError: alone, what is wrong; the caller reports it.
    OSError: likewise.
  """
  hardware.take_memory()  # before jax looks at its devices
  distributed.start(options)
  keep_compiled()
  if not together.several():
    _train(cfg, prepare)
    return 0
  with _others_silent():
    code = _run_as_one(cfg, prepare)
  jax.distributed.shutdown()
  return code


def _train(cfg: TrainConfig, prepare: Prepare) -> None:
  with together.together():
    own, lines = prepare(cfg)
  remat = together.of_first(own.model.remat)
  cfg = dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, remat=remat)
  )
  for line in lines:
    print(line, flush=True)
  loop.run(cfg)


def _run_as_one(cfg: TrainConfig, prepare: Prepare) -> int:
  try:
    _train(cfg, prepare)
  except together.FailedError as failed:
    if together.first():
      where = f'process {failed.process}: ' if failed.process else ''
      print(where + failed.line, file=sys.stderr, flush=True)
    return failed.code
  except BaseException as error:
    what = errors.first_and_last(error)
    if together.lost(error):
      together.leave(
        errors.StoppedError.exit_code,
        'the other processes no longer answer, one of them has ended: run the'
        f' same command again to continue: {what[:300]}',
      )
    told = errors.outcome(error)
    if told is None:
      traceback.print_exc(file=sys.__stderr__)
    together.leave(*(told or (1, f'{type(error).__name__}: {what}')))
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
  folder = cache_root().with_name('compiled')
  jax.config.update('jax_compilation_cache_dir', str(folder))


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
