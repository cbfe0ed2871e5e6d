"""How the processes of a run find each other.

One process a host, or one a GPU: all are given the same command. On a TPU pod,
under SLURM, Open MPI or as an indexed Job of Kubernetes jax knows by itself who
the others are; elsewhere three flags say so. A process that is alone starts
nothing.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from lorax_train.errors import ConfigError, one_line

USAGE = """\
several processes, as detected or by flags, which are no part of the config:
  --distributed=auto|off|manual
  --coordinator=HOST:PORT --processes=N --process=I  [--wait=SECONDS]"""

_MODES = ('auto', 'off', 'manual')

# A process that says nothing for so long is dead. By jax's default of 100 the
# others were found stuck for 88 s.
_HEARTBEAT_S = 30
# How long the first to end waits for the others.
_SHUTDOWN_S = 60
# When to say that others are waited for.
_REMIND_S = 15

_TPU = 'Cloud TPU'
_ALONE = '--distributed=off to run alone'


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line says of the other processes.

  Attributes:
    mode: auto, off or manual.
    coordinator: host:port of process 0.
    processes: how many there are.
    process: which this one is.
    wait: seconds to wait for the others at the start.

  Raises:
    ConfigError: what does not go together.
  """

  mode: str = 'auto'
  coordinator: str = ''
  processes: int | None = None
  process: int | None = None
  wait: int = 300

  def __post_init__(self):
    values = (self.coordinator or None, self.processes, self.process)
    given = dict(
      zip(('--coordinator', '--processes', '--process'), values, strict=True)
    )
    missing = [name for name, value in given.items() if value is None]
    if self.mode not in _MODES:
      raise ConfigError(
        f'--distributed={self.mode}: give one of {", ".join(_MODES)}'
      )
    if self.mode == 'off' and len(missing) < 3:
      raise ConfigError('--distributed=off: leave out --coordinator and so on')
    if missing and (self.mode == 'manual' or len(missing) < 3):
      raise ConfigError(
        f'{" and ".join(missing)} missing: give --coordinator=HOST:PORT'
        ' --processes=N --process=I, the same but for I on each host'
      )
    if self.wait < 1:
      raise ConfigError(f'--wait={self.wait}: give 1 or more seconds')
    if missing:
      return
    assert self.processes is not None and self.process is not None
    if not 0 <= self.process < self.processes:
      raise ConfigError(
        f'--process={self.process} --processes={self.processes}: they count'
        ' from 0 to one less than there are'
      )
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
      raise ConfigError(
        f'--coordinator={self.coordinator}: give HOST:PORT, a port below 65536'
      )


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'command line: {message}')


def options_of(argv: Sequence[str]) -> tuple[Options, list[str]]:
  """The flags of a command line that are ours, and all the others.

  Raises:
    ConfigError: a value that can't be, or what does not go together.

  >>> options_of(['main', '--wait=60', '--config=run.py'])[1]
  ['main', '--config=run.py']
  """
  parser = _Parser(
    add_help=False,
    allow_abbrev=False,
    argument_default=argparse.SUPPRESS,
  )
  parser.add_argument('--distributed', dest='mode')
  parser.add_argument('--coordinator')
  for name in ('--processes', '--process', '--wait'):
    parser.add_argument(name, type=int)
  given, rest = parser.parse_known_args(list(argv))
  return Options(**vars(given)), rest


def start(options: Options) -> None:
  """Joins the other processes; where there are none, does nothing.

  Called before anything is computed. Returns when all have joined; a process
  that waits in vain is ended with a ConfigError's exit code, since jax would
  abort it.

  Raises:
    ConfigError: the surroundings tell of other processes, but not where they
      are.
  """
  if options.mode == 'off' or options.processes == 1:
    return
  surroundings = '' if options.coordinator else surrounded_by()
  if options.coordinator:
    # Or jax would take one GPU a process under SLURM, whatever the flags say.
    known: dict[str, Any] = {
      'coordinator_address': options.coordinator,
      'num_processes': options.processes,
      'process_id': options.process,
      'cluster_detection_method': 'deactivate',
    }
  elif surroundings:
    known = {}
  else:
    return
  # It would take SIGTERM away from us; see train/stopping.py.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    with _waiting(options.wait, options.coordinator, surroundings):
      jax.distributed.initialize(
        **known,
        initialization_timeout=options.wait + 60,  # ours is the shorter
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
      )
  except (ValueError, RuntimeError, OSError, KeyError) as error:
    if surroundings == _TPU and isinstance(error, ValueError):
      return  # its library is installed, but there is no TPU
    way_out = (
      'is it an address of process 0, and is the port free there?'
      if options.coordinator
      else 'give --coordinator=HOST:PORT --processes=N --process=I, or'
      f' {_ALONE}'
    )
    raise ConfigError(
      f'{options.coordinator or surroundings}: the processes of the run cannot'
      f' be joined: {one_line(error)}: {way_out}'
    ) from error


def surrounded_by() -> str:
  """What says that this process may be one of several; '' for nothing."""
  environ = os.environ
  if 'SLURM_STEP_NODELIST' in environ and _several(environ, 'SLURM_NTASKS'):
    return 'SLURM'
  if _several(environ, 'OMPI_COMM_WORLD_SIZE'):
    return 'Open MPI'
  platforms = environ.get('JAX_PLATFORMS') or 'tpu'
  if 'tpu' in platforms and importlib.util.find_spec('libtpu'):
    return _TPU
  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environ.keys():
    return 'Kubernetes'
  return ''


def _several(environ: Any, name: str) -> bool:
  value = environ.get(name, '')
  return value.isdecimal() and int(value) > 1


@contextlib.contextmanager
def _waiting(
  seconds: int, coordinator: str, surroundings: str
) -> Iterator[None]:
  """Says that others are waited for, and in the end ends the process."""
  where = coordinator or surroundings
  # Whoever works inside a job of a cluster may not have asked for others.
  alone = '' if coordinator else f', or {_ALONE}'
  hint = 'was the command started on all hosts, and is the port open?'

  def remind() -> None:
    print(
      f'waiting for the other processes ({where}): {hint}',
      file=sys.stderr,
      flush=True,
    )

  def give_up() -> None:
    print(
      f'the other processes ({where}) did not come within {seconds} s: {hint}'
      f' Give --wait=SECONDS to wait longer{alone}',
      file=sys.stderr,
      flush=True,
    )
    os._exit(ConfigError.exit_code)

  timers = [threading.Timer(seconds, give_up)]
  if seconds > _REMIND_S:
    timers.append(threading.Timer(_REMIND_S, remind))
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()
