"""scripts/launch: the scripts are sound; tpu_vm.sh, and on_host.sh on its hosts.

gcloud is a stand-in that answers by a script. References: the options of gcloud's
own documentation; the exit codes of errors.py.
"""

import os
import shlex
import subprocess

import pytest

from tests.launch.standins import FINAL, LAUNCH, SCRIPTS, STOPPED, calls, run


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(script):
  text = script.read_text()
  assert text.startswith('#!/usr/bin/env bash\n# ')
  assert 'set -euo pipefail' in text
  subprocess.run(['bash', '-n', str(script)], check=True)


# What the queue says at each look at it, what the trainer ends with at each
# attempt; the exit code of it all, and how often a slice was asked for and
# given back.
ATTEMPTS = [
  (['', 'WAITING_FOR_RESOURCES', 'ACTIVE'], [0], 0, 1, 0),
  (['ACTIVE', 'ACTIVE'], [STOPPED, 0], 0, 0, 0),
  (['ACTIVE', 'SUSPENDING', 'SUSPENDED', '', 'ACTIVE'], [255, 0], 0, 1, 1),
  (['FAILED', '', 'ACTIVE', 'ACTIVE', 'ACTIVE'], [134, 137, 0], 0, 1, 1),
  # The hosts do not answer yet.
  (['ACTIVE', 'ACTIVE'], ['scp', 0], 0, 0, 0),
  # gcloud itself ends with 1 where the slice is gone, the trainer by a bug.
  (['ACTIVE', 'PROVISIONING', 'ACTIVE', 'ACTIVE'], [1, 0], 0, 0, 0),
  (['ACTIVE', 'ACTIVE'], [1], 1, 0, 0),
  (['ACTIVE'], [2], 2, 0, 0),
  *[(['ACTIVE'], [code], code, 0, 0) for code in FINAL if code != 2],
]


@pytest.mark.parametrize(
  ('states', 'codes', 'end', 'created', 'deleted'), ATTEMPTS
)
def test_tpu_vm_goes_on_until_the_run_is_done(
  service, states, codes, end, created, deleted
):
  service(
    *[('describe', f'echo {state}' if state else 'exit 1') for state in states],
    *[
      ('scp', 'exit 1') if code == 'scp' else ('on_host.sh', f'exit {code}')
      for code in codes
    ],
  )
  done = run('tpu_vm.sh', '--config', 'a file.py', '--config.train.steps=3')
  assert done.returncode == end, done.stdout + done.stderr
  called = calls()
  asked = [c for c in called if ' create ' in c]
  assert len(asked) == created
  for call in asked:
    assert call.split()[1:] == [
      'compute', 'tpus', 'queued-resources', 'create', 'lorax-train',
      '--zone=us-west4-a', '--node-id=lorax-train',
      '--accelerator-type=v5litepod-16',
      '--runtime-version=v2-alpha-tpuv5-lite', '--spot',
    ]  # fmt: skip
  assert sum(' delete ' in c for c in called) == deleted
  started = [shlex.split(c) for c in called if 'on_host.sh' in c]
  assert len(started) == len(codes) - codes.count('scp')
  for words in started:
    assert words[1:5] == ['compute', 'tpus', 'tpu-vm', 'ssh']
    assert '--worker=all' in words
    (command,) = [w for w in words if w.startswith('--command=')]
    assert shlex.split(command.removeprefix('--command=')) == [
      'bash', 'lorax-train/scripts/launch/on_host.sh', 'tpu', '--config',
      'a file.py', '--config.train.steps=3',
    ]  # fmt: skip
  # The code goes to a slice before each attempt: it may be a new one.
  assert sum(' scp ' in c for c in called) == len(codes)


def test_tpu_vm_gives_up_and_mounts_what_is_shared(service):
  service(*[('describe', 'echo ACTIVE')] * 3, *[('on_host.sh', 'exit 75')] * 3)
  done = run('tpu_vm.sh', MAX_RESTARTS='2', SHARED='10.0.0.2:/share', TIER='')
  assert done.returncode == STOPPED
  mounted = [c for c in calls() if 'mount' in c]
  assert len(mounted) == 3
  assert all('10.0.0.2:/share\\ /shared' in c for c in mounted)


def test_on_host_stops_what_was_left_and_starts_the_trainer(tmp_path):
  """In a checkout whose environment is a stand-in that says what it is given."""
  launch = tmp_path / 'scripts' / 'launch'
  launch.mkdir(parents=True)
  (launch / 'on_host.sh').write_text((LAUNCH / 'on_host.sh').read_text())
  (tmp_path / 'scripts' / 'environment.sh').write_text(
    'our_python() { echo python3; }\n'
    'known_good() { echo "constraints of $1"; }\n'
    'environment() { echo "environment $*"; mkdir -p "$1/bin"; cp p "$1/bin/python"; }\n'
  )
  (tmp_path / 'p').write_text('#!/usr/bin/env bash\necho "python $*"\n')
  (tmp_path / 'p').chmod(0o755)
  left = subprocess.Popen(
    [
      'bash',
      '-c',
      'trap "exit 75" TERM; while :; do sleep 0.1; done',
      'lorax_train',
    ]
  )
  pid = tmp_path / '.lorax_train.pid'
  pid.write_text(f'{left.pid}\n')
  env = {**os.environ, 'HOME': str(tmp_path)}
  command = ['bash', str(launch / 'on_host.sh'), 'tpu']
  begun = subprocess.Popen(
    [*command, '--config', 'x y.py'],
    env=env, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert left.wait(timeout=30) == 75
  out, _ = begun.communicate(timeout=30)
  assert begun.returncode == 0
  assert out.splitlines() == [
    'environment .venv-tpu python3 tpu --constraint constraints of python3',
    'python -m lorax_train.main --config x y.py',
  ]
  assert int(pid.read_text()) == begun.pid  # so that the next one finds it
  out = subprocess.run(command, env=env, capture_output=True, text=True).stdout
  assert len(out.splitlines()) == 1
