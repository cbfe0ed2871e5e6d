"""scripts/launch/slurm.sbatch: what it starts, and when it is queued again.

srun is a stand-in that starts two tasks here. References: sbatch(1) and srun(1);
the exit codes of errors.py; two real processes, which jax itself finds by SLURM's
variables.
"""

import importlib.util
import json
import os
import shlex
import sys

import pytest

from tests.launch.standins import LAUNCH, ROOT, STAND_IN, STOPPED, calls, run

SRUN = """#!/usr/bin/env bash
printf '%q ' srun "$@" >>"$FAKES/calls"
echo >>"$FAKES/calls"
while [[ $1 == -* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
code=0
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || code=$?
wait $! || code=$?
exit $code
"""


@pytest.fixture
def slurm(service, tmp_path, monkeypatch):
  """(what Python is, arguments) -> slurm.sbatch as its batch shell runs it."""
  bin_dir = tmp_path / 'bin'
  for name, text in (('srun', SRUN), ('scontrol', STAND_IN)):
    (bin_dir / name).write_text(text)
    (bin_dir / name).chmod(0o755)
  checkout = tmp_path / 'checkout'
  python = checkout / '.venv-cuda12' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  (checkout / 'lorax_train').symlink_to(ROOT / 'lorax_train')

  def start(text, *args, **env):
    python.write_text(f'#!/usr/bin/env bash\n{text}\n')
    python.chmod(0o755)
    # A port of one's own: jax makes it of the job's number.
    job = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_SUBMIT_DIR': str(checkout)}
    return run('slurm.sbatch', *args, **job, **env)

  return start


# (code of task 0, of task 1, restarts so far, whether it is queued again)
ENDS = [
  (0, 0, '0', False),
  (STOPPED, STOPPED, '0', True),
  (STOPPED, STOPPED, '100', False),
  (134, 137, '3', True),
  (2, 2, '0', False),
  (6, 6, '0', False),
]


@pytest.mark.parametrize(('first', 'second', 'restarts', 'again'), ENDS)
def test_slurm_queues_what_was_stopped_again(
  slurm, tmp_path, first, second, restarts, again
):
  done = slurm(
    f'echo "$SLURM_PROCID $*" >>"$FAKES/tasks"; exit $((SLURM_PROCID ? {second} : {first}))',
    '--config', 'a file.py',
    SLURM_RESTART_COUNT=restarts,
  )  # fmt: skip
  assert done.returncode == second
  tasks = (tmp_path / 'tasks').read_text().splitlines()
  assert sorted(tasks) == [
    f'{i} -m lorax_train.main --config a file.py' for i in range(2)
  ]
  called = [shlex.split(call) for call in calls()]
  assert ([*called[-1][:2]] == ['scontrol', 'requeue']) == again
  assert len(called) == 1 + again


def test_slurm_asks_for_what_a_run_needs():
  """sbatch(1): a signal to the tasks before the end, and one log for all."""
  text = (LAUNCH / 'slurm.sbatch').read_text()
  head, _, _ = text.partition('\nset -')
  options = dict(
    line.removeprefix('#SBATCH --').partition('=')[::2]
    for line in head.splitlines()
    if line.startswith('#SBATCH ')
  )
  assert text.count('#SBATCH --') == len(options)  # none after a command
  assert options['gpus-per-node'] == options['ntasks-per-node']
  assert options['signal'] == 'TERM@300'  # and no B:, which is the script alone
  assert options['open-mode'] == 'append'
  assert 'requeue' in options


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('lorax_train.distributed') is None,
  reason='a run of several processes',
)
def test_slurm_trains_with_two_processes(
  slurm, tmp_path, tiny_model, rows_file
):
  keys = {
    'run_dir': tmp_path / 'run',
    'model.path': tiny_model,
    'model.dtype': 'float32',
    'model.param_dtype': 'float32',
    'data.path': rows_file,
    'data.max_length': 64,
    'data.truncation': 'left',
    'lora.rank': 2,
    'train.steps': 2,
    'train.warmup_steps': 0,
    'eval.samples': 0,
  }
  done = slurm(
    f'exec {shlex.quote(sys.executable)} "$@"',
    f'--config={ROOT / "configs" / "mistral_lora.py"}',
    *[f'--config.{key}={value}' for key, value in keys.items()],
    JAX_PLATFORMS='cpu',
    JAX_NUM_CPU_DEVICES='1',
    PYTHONPATH=str(ROOT),
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'adapter' / 'adapter_model.safetensors').is_file()
  log = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  losses = [line for line in map(json.loads, log) if 'loss' in line]
  assert [line['step'] for line in losses] == [1, 2]
  assert done.stdout.count('trainable') == 1  # one of them speaks
