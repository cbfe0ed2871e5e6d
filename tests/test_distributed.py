"""How processes find each other: what is asked of jax, and what is refused.

Reference: the variables that SLURM, Open MPI and Kubernetes set, and what jax
says it wants; that jax then does join them is in tests/train/test_hosts.
"""

import os
import subprocess
import sys

import jax
import pytest

from lorax_train import distributed
from lorax_train.distributed import Options, options_of
from lorax_train.errors import ConfigError

FLAGS = ['--coordinator=a:1', '--processes=4', '--process=3']
BY_FLAGS = Options(coordinator='a:1', processes=4, process=3)


@pytest.mark.parametrize(
  ('argv', 'options', 'rest'),
  [
    (['main'], Options(), ['main']),
    (['main', '--config', 'c', *FLAGS], BY_FLAGS, ['main', '--config', 'c']),
    (
      ['main', '--distributed', 'off', '--config.lora.rank', '4', '--x'],
      Options(mode='off'),
      ['main', '--config.lora.rank', '4', '--x'],
    ),
    (['main', '--wait=9', '--config=c'], Options(wait=9), ['main', '--config=c']),
  ],
)  # fmt: skip
def test_flags_are_taken_out_of_the_command_line(argv, options, rest):
  assert options_of(argv) == (options, rest)


MISTAKES = {
  'another mode': (['--distributed=on'], ['on', 'auto, off, manual']),
  'no number': (['--process=x'], ['--process', "'x'"]),
  'a flag alone': (
    ['--process=1'],
    ['--coordinator and --processes missing', '--coordinator=HOST:PORT'],
  ),
  'manual without flags': (['--distributed=manual'], ['--coordinator and']),
  'off with flags': (['--distributed=off', *FLAGS], ['leave out']),
  'past the last': (
    ['--coordinator=a:1', '--processes=4', '--process=4'],
    ['--process=4', '--processes=4', 'from 0'],
  ),
  'no port': (
    ['--coordinator=a', '--processes=4', '--process=0'],
    ['--coordinator=a', 'HOST:PORT'],
  ),
  'no such port': (
    ['--coordinator=a:65536', '--processes=4', '--process=0'],
    ['--coordinator=a:65536', 'below 65536'],
  ),
  'no patience': (['--wait=0'], ['--wait=0']),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_flags_that_can_not_be(case):
  argv, words = MISTAKES[case]
  with pytest.raises(ConfigError) as caught:
    options_of(['main', *argv])
  for word in words:
    assert word in str(caught.value)


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '0'}  # fmt: skip
KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}


@pytest.fixture
def alone(monkeypatch):
  """An environment that tells of nobody, and no TPU library."""
  known = ('SLURM_', 'OMPI_', 'KUBERNETES_', 'JOB_', 'JAX_')
  for name in [name for name in os.environ if name.startswith(known)]:
    monkeypatch.delenv(name)
  monkeypatch.setattr(distributed.importlib.util, 'find_spec', lambda _: None)


@pytest.mark.parametrize(
  ('environment', 'name'),
  [
    ({}, ''),
    ({**SLURM, 'SLURM_NTASKS': '2'}, 'SLURM'),
    ({**SLURM, 'SLURM_NTASKS': '1'}, ''),
    # A batch script itself is no step, however many tasks it may start.
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}, ''),
    ({'OMPI_COMM_WORLD_SIZE': '16'}, 'Open MPI'),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, ''),
    (KUBERNETES, ''),  # a pod that is no part of an indexed Job
    ({**KUBERNETES, 'JOB_COMPLETION_INDEX': '0'}, 'Kubernetes'),
  ],
)
def test_surroundings(environment, name, alone, monkeypatch):
  for key, value in environment.items():
    monkeypatch.setenv(key, value)
  assert distributed.surrounded_by() == name


def test_a_tpu_is_asked_for_where_its_library_is(alone, monkeypatch):
  monkeypatch.setattr(
    distributed.importlib.util, 'find_spec', lambda name: name
  )
  assert distributed.surrounded_by() == 'Cloud TPU'
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert distributed.surrounded_by() == ''


@pytest.fixture
def asked(monkeypatch):
  """What jax is asked; it answers with the error put at the end of the list."""
  calls = []

  def initialize(**kwargs):
    answer = calls.pop() if calls else None
    calls.append(kwargs)
    if answer:
      raise answer

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  name = 'jax_enable_preemption_service'
  before = jax.config.values[name]
  yield calls
  jax.config.update(name, before)


def test_who_is_alone_starts_nothing(alone, asked):
  distributed.start(Options())
  distributed.start(Options(coordinator='a:1', processes=1, process=0))
  assert asked == []


def test_what_jax_is_told(alone, asked, monkeypatch):
  patience = {
    'initialization_timeout': 360,
    'heartbeat_timeout_seconds': 30,
    'shutdown_timeout_seconds': 60,
  }
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  distributed.start(Options())
  assert asked.pop() == patience
  assert not jax.config.values['jax_enable_preemption_service']
  distributed.start(Options(mode='off'))
  assert asked == []
  distributed.start(BY_FLAGS)  # which win
  assert asked.pop() == {
    'coordinator_address': 'a:1',
    'num_processes': 4,
    'process_id': 3,
    'cluster_detection_method': 'deactivate',
    **patience,
  }


def test_processes_that_can_not_be_found(alone, asked, monkeypatch):
  """jax's own words, where it knows of no coordinator."""
  unknown = ValueError('coordinator_address should be defined.')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  asked.append(unknown)
  words = r'^Open MPI: .*coordinator_address.*--distributed=off to run alone$'
  with pytest.raises(ConfigError, match=words):
    distributed.start(Options())
  monkeypatch.delenv('OMPI_COMM_WORLD_SIZE')
  monkeypatch.setattr(
    distributed.importlib.util, 'find_spec', lambda name: name
  )
  asked[:] = [unknown]
  distributed.start(Options())  # the library is there, but no TPU
  assert len(asked) == 1


def test_a_port_that_is_taken(alone, asked):
  asked.append(RuntimeError('UNKNOWN: Failed to start RPC server'))
  words = r'^a:1: .*Failed to start RPC server: .*is the port free there\?$'
  with pytest.raises(ConfigError, match=words):
    distributed.start(BY_FLAGS)


@pytest.mark.parametrize(
  ('given', 'environ', 'where', 'alone'),
  [
    ('coordinator="localhost:9", processes=2, process=1, ', {}, 'localhost:9', ''),
    (
      '',
      {
        'SLURM_JOB_ID': '7',
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': '1',
        'SLURM_LOCALID': '1',
        'JAX_COORDINATOR_PORT': '9',
      },
      'SLURM',
      ', or --distributed=off to run alone',
    ),
  ],
)  # fmt: skip
def test_others_that_never_come(given, environ, where, alone):
  code = (
    'from lorax_train import distributed;'
    f' distributed.start(distributed.Options({given}wait=1))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 2
  assert done.stderr == (
    f'the other processes ({where}) did not come within 1 s: was the command'
    ' started on all hosts, and is the port open? Give --wait=SECONDS to wait'
    f' longer{alone}\n'
  )
