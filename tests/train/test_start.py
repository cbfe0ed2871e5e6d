"""What a process does before and after the run.

Reference: the rule of who keeps compiled programs where, as docs/pods.md has
it, and that of exit codes. Of whole runs of several processes they are in
test_hosts; here two real ones get no further than to what comes first.
"""

import os
import socket
import subprocess
import sys

import jax
import pytest

from lorax_train import hardware
from lorax_train.train import start


@pytest.fixture
def cache_dir():
  """jax's setting, as it was before."""
  name = 'jax_compilation_cache_dir'
  before = jax.config.values[name]
  jax.config.update(name, None)
  yield lambda: jax.config.values[name]
  jax.config.update(name, before)


@pytest.mark.parametrize(
  ('platform', 'chosen', 'kept'),
  [
    ('cpu', None, None),
    ('gpu', None, 'caches/lorax_train/compiled'),
    ('tpu', None, 'caches/lorax_train/compiled'),
    ('tpu', 'mine', 'mine'),
    ('gpu', '', ''),  # switched off by the user
  ],
)
def test_accelerators_keep_what_was_compiled(
  platform, chosen, kept, cache_dir, monkeypatch
):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setenv('XDG_CACHE_HOME', 'caches')
  jax.config.update('jax_compilation_cache_dir', chosen)
  start.keep_compiled()
  assert cache_dir() == kept


def test_without_xdg_it_is_below_home(cache_dir, monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  start.keep_compiled()
  assert cache_dir() == f'{tmp_path}/.cache/lorax_train/compiled'


@pytest.mark.parametrize(
  ('given', 'taken'),
  [
    ({}, {'XLA_CLIENT_MEM_FRACTION': '0.92'}),
    ({'XLA_CLIENT_MEM_FRACTION': '0.5'}, {'XLA_CLIENT_MEM_FRACTION': '0.5'}),
    # jaxlib refuses both at once.
    (
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'},
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'},
    ),
  ],
)
def test_a_run_takes_nearly_all_of_a_gpu(given, taken, monkeypatch):
  environ = {'HOME': '/root', **given}
  monkeypatch.setattr(os, 'environ', environ)
  hardware.take_memory()
  assert environ == {'HOME': '/root', **taken}


TWO = """
import os, signal, sys
from lorax_train import config, distributed, errors, together
from lorax_train.train import start

process, case, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def prepare(cfg):
  together.gather(process)  # they have met
  if process and case == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
  if process:
    raise errors.ModelError('no shard')
  return cfg, []

options = distributed.Options('auto', f'localhost:{port}', 2, process)
sys.exit(start.run(config.TrainConfig(), options, prepare))
"""


@pytest.mark.parametrize(
  ('case', 'codes', 'words'),
  [
    # Where the others wait to agree with it, not in a step.
    ('killed', (75, -9), 'process 0: the other processes no longer answer'),
    ('fails', (4, 4), 'process 1: no shard'),
  ],
)
def test_two_processes_end_alike(case, codes, words):
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]
  env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  both = [
    subprocess.Popen(
      [sys.executable, '-c', TWO, f'{process}', case, f'{port}'],
      env={**env, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in (0, 1)
  ]
  told = [process.communicate(timeout=120)[1] for process in both]
  assert tuple(process.returncode for process in both) == codes, told
  assert words in told[0]
