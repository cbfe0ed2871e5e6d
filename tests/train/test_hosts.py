"""Runs of several real processes: one process could not tell the difference.

Reference: the same run of one process with as many devices, uninterrupted.
Processes are started as a user starts them, talk over localhost, and have CPU
devices; what each of them is to do alone is in test_together.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import main
from lorax_train.train import checkpoint
from tests import toys
from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]
STEPS = 5
DEADLINE = 240.0  # seconds; far more than any of this takes
# Of collectives, when four processes share a core.
PATIENT = [
  '--xla_cpu_collective_call_terminate_timeout_seconds=200',
  '--xla_cpu_collective_timeout_seconds=200',
]


def command(folder, run_dir, **changes):
  keys = {
    'model.path': folder / 'model',
    'model.dtype': 'float32',
    'model.param_dtype': 'float32',
    'model.remat': 'none',
    'lora.rank': 2,
    'lora.dropout': 0.1,
    'data.path': folder / 'rows.json',
    'data.max_length': 64,
    'data.truncation': 'left',
    'train.steps': STEPS,
    'train.batch_size': 8,
    'train.grad_accum': 1,
    'train.learning_rate': 0.01,
    'train.schedule': 'constant',
    'train.warmup_steps': 0,
    'train.log_every': 1,
    'checkpoint.every': 2,
    'checkpoint.keep': 9,
    'eval.every': STEPS,
    'eval.rows': 4,
    'eval.samples': 0,
    'run_dir': run_dir,
    **changes,
  }
  overrides = [f'--config.{key}={value}' for key, value in keys.items()]
  return ['--config', str(ROOT / 'configs' / 'mistral_lora.py'), *overrides]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model, rows, and `one`: the run of one process with 8 devices."""
  folder = tmp_path_factory.mktemp('hosts')
  toys.write_model(folder / 'model', num_hidden_layers=2)
  rows = [{'instruction': f'{i}', 'output': f'no {i}'} for i in range(40)]
  (folder / 'rows.json').write_text(json.dumps(rows))
  argv = command(folder, folder / 'one', **{'eval.samples': 1})
  assert main.main(['main', *argv]) == 0
  return folder


def by_flags(process, of, port):
  return [
    f'--coordinator=localhost:{port}', f'--processes={of}',
    f'--process={process}',
  ], {}  # fmt: skip


def by_slurm(process, of, port):
  return [], {
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': f'{of}',
    'SLURM_PROCID': f'{process}',
    'SLURM_LOCALID': f'{process}',
    'JAX_COORDINATOR_PORT': f'{port}',
  }


@contextlib.contextmanager
def started(folder, argv, of, devices, joined=by_flags):
  """The processes of a run."""
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]
  dropped = ('HF_', 'JAX_', 'XLA_', 'SLURM_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
  processes = []
  try:
    for i in range(of):
      flags, of_cluster = joined(i, of, port)
      processes.append(
        subprocess.Popen(
          [sys.executable, '-m', 'lorax_train.main', *argv, *flags],
          cwd=ROOT,
          env={
            **env,
            **of_cluster,
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': f'{devices}',
            # What one has compiled the others need not.
            'JAX_COMPILATION_CACHE_DIR': f'{folder}/compiled',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'XLA_FLAGS': ' '.join([*QUICK, *PATIENT]),
          },
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    yield processes
  finally:
    for process in processes:
      process.kill()


def ends(processes):
  """[(exit code, stdout, stderr)] of them all, less what gloo says of itself."""
  own = []
  for process in processes:
    texts = process.communicate(timeout=DEADLINE)
    out, err = (
      ''.join(
        line
        for line in text.splitlines(keepends=True)
        if not re.search(r'\[Gloo\]|peer ranks', line)
      )
      for text in texts
    )
    own.append((process.returncode, out, err))
  return own


def check_done(processes):
  """All ended well, and process 0 alone has spoken; returns what it said."""
  (code, out, err), *others = ends(processes)
  assert code == 0, err
  assert all(other == (0, '', '') for other in others), others
  return out


def values(run_dir, key):
  lines = (run_dir / 'metrics.jsonl').read_text('utf-8').splitlines()
  return {v['step']: v[key] for v in map(json.loads, lines) if key in v}


def names(run_dir):
  """All there is, but for what differs: parts of states, events, samples."""
  return sorted(
    str(path.relative_to(run_dir))
    for path in run_dir.rglob('*')
    if not {'state', 'tensorboard', 'samples.md'} & {*path.parts}
  )


def check_same(run_dir, folder):
  """A run measured and exported what the reference did."""
  for key in ('loss', 'eval_loss', 'grad_norm', 'learning_rate'):
    got, want = values(run_dir, key), values(folder / 'one', key)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(
      [*got.values()], [*want.values()], rtol=1e-5, err_msg=key
    )
  got, want = (
    load_file(r / 'adapter' / 'adapter_model.safetensors')
    for r in (run_dir, folder / 'one')
  )
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def at_step_two(run_dir, to):
  """The run as it would be, had it been cut off after step 2."""
  shutil.copytree(run_dir, to)
  shutil.rmtree(to / 'adapter')
  for step in (4, STEPS):
    shutil.rmtree(to / 'checkpoints' / str(step))
  return to


@pytest.mark.slow
@pytest.mark.compat
def test_four_processes_train_what_one_does(folder, capsys):
  run_dir = folder / 'four'
  with started(folder, command(folder, run_dir), 4, 2) as processes:
    out = check_done(processes)
  assert re.search(r'devices +8 cpu \(data 1 x fsdp 8 x tensor 1\)', out)
  assert re.search(r'processes +4', out)
  check_same(run_dir, folder)
  assert names(run_dir) == names(folder / 'one')
  # And one process goes on where the four were.
  back = at_step_two(run_dir, folder / 'four-then-one')
  assert main.main(['main', *command(folder, back)]) == 0
  assert 'resumed    at step 2' in capsys.readouterr().out
  check_same(back, folder)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_on_another_mesh(folder):
  run_dir = at_step_two(folder / 'one', folder / 'one-then-two')
  argv = command(folder, run_dir, **{'mesh.tensor': 2, 'eval.samples': 1})
  with started(folder, argv, 2, 4, by_slurm) as processes:
    out = check_done(processes)
  assert 'resumed    at step 2' in out
  assert 'fsdp 4 x tensor 2' in out
  check_same(run_dir, folder)
  # The last look is theirs, the first the reference's own.
  assert values(run_dir, 'samples') == values(folder / 'one', 'samples')


def wait_for(run_dir, step, processes):
  begun = time.monotonic()
  while True:
    with contextlib.suppress(FileNotFoundError, ValueError):
      if max(values(run_dir, 'loss'), default=0) >= step:
        return
    assert all(p.poll() is None for p in processes), ends(processes)
    assert time.monotonic() - begun < DEADLINE
    time.sleep(0.02)


@pytest.mark.slow
def test_what_becomes_of_one_becomes_of_all(folder):
  run_dir = folder / 'stopped'
  # Lines of the first steps are the reference's; the checkpoint is of the stop.
  argv = command(
    folder, run_dir,
    **{'train.steps': 1000, 'checkpoint.every': 1000, 'eval.every': 1000},
  )  # fmt: skip
  with started(folder, argv, 2, 1) as processes:
    wait_for(run_dir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    (code, _, err), other = ends(processes)
  assert code == 75
  assert other == (75, '', '')
  (at,) = (int(p.name) for p in (run_dir / 'checkpoints').iterdir())
  assert err == (
    f'stopped by SIGTERM at step {at} of 1000, nothing lost: run the same'
    ' command again to continue\n'
  )
  assert (
    checkpoint.describe(run_dir / 'checkpoints' / str(at))['problem'] is None
  )
  # The same command again; this time one dies without a word.
  with started(folder, argv, 2, 1) as processes:
    wait_for(run_dir, at + 2, processes)
    processes[1].kill()
    begun = time.monotonic()
    (code, out, err), _ = ends(processes)
  assert time.monotonic() - begun < 60
  assert f'resumed    at step {at}' in out
  assert code == 75, err  # gloo tells that the other is gone
  assert 'process 0: the other processes no longer answer' in err
  got, want = values(run_dir, 'loss'), values(folder / 'one', 'loss')
  np.testing.assert_allclose(
    [got[step] for step in want], [*want.values()], rtol=1e-5
  )
  assert [*got] == [*range(1, max(got) + 1)]


def test_a_mistake_is_told_once(folder):
  argv = command(folder, folder / 'none', **{'data.path': folder / 'no.json'})
  with started(folder, argv, 2, 1) as processes:
    (code, _, err), other = ends(processes)
  assert (code, other) == (3, (3, '', ''))
  assert err == f'{folder}/no.json: no such file; check --config.data.path\n'
