"""scripts/launch: the JobSet of gke_jobset.sh, and skypilot.yaml.

References: the fields of JobSet v1alpha2, batch/v1 Job and SkyPilot's task YAML as
documented; the exit codes of errors.py.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.standins import FINAL, LAUNCH, STOPPED, calls, run


def jobset(*args, **env):
  done = run('gke_jobset.sh', '--print', *args, **env)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def test_gke_makes_a_jobset_of_the_arguments():
  """The fields are those of JobSet v1alpha2, batch/v1 Job and GKE's nodes."""
  args = [
    '--config',
    "it's.py",
    '--config.lora.targets=q_proj,v_proj',
    '{a: 1}',
  ]
  found = jobset(*args, HOSTS='16', SLICES='2')
  assert (found['apiVersion'], found['kind']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
  )
  (slices,) = found['spec']['replicatedJobs']
  job = slices['template']['spec']
  assert slices['replicas'] == 2
  assert job['parallelism'] == job['completions'] == 16
  pod = job['template']['spec']
  (trainer,) = pod['containers']
  assert trainer['command'] == ['python', '-m', 'lorax_train.main', *args]
  assert trainer['resources']['limits'] == {'google.com/tpu': 4}
  mounts = {m['name']: m['mountPath'] for m in trainer['volumeMounts']}
  assert mounts == {v['name']: '/shared' for v in pod['volumes']}


def test_gke_restarts_what_a_restart_mends():
  """Kubernetes: the first rule that fits, no more than the set's `rules`."""
  spec = jobset('--config', 'x.py')['spec']
  job = spec['replicatedJobs'][0]['template']['spec']
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes']['operator'] == 'In'
  assert rule['onExitCodes']['values'] == sorted([1, *FINAL])
  (trainer,) = job['template']['spec']['containers']
  assert rule['onExitCodes']['containerName'] == trainer['name']
  # Kubernetes takes a podFailurePolicy with this only; and no pod is tried
  # again alone, when the others have ended.
  assert job['template']['spec']['restartPolicy'] == 'Never'
  assert job['backoffLimit'] == 0
  (of_set,) = spec['failurePolicy']['rules']
  assert of_set['action'] == 'FailJobSet'
  assert of_set['onJobFailureReasons'] == ['PodFailurePolicy']
  assert spec['failurePolicy']['maxRestarts'] > 0


def test_gke_replaces_the_jobset_of_an_earlier_command(service):
  service(('apply', 'cat >"$FAKES/applied"'))
  done = run('gke_jobset.sh', '--config', 'x.py')
  assert done.returncode == 0, done.stderr
  first, second = calls()
  assert shlex.split(first)[1:4] == ['delete', 'jobset', 'lorax-train']
  assert shlex.split(second)[1:] == ['apply', '-f', '-']
  applied = Path(os.environ['FAKES'], 'applied').read_text()
  assert yaml.safe_load(applied) == jobset('--config', 'x.py')


@pytest.fixture
def sky():
  return yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())


def test_skypilot_recovers_by_exit_code(sky):
  recovery = sky['resources']['job_recovery']
  assert STOPPED in recovery['recover_on_exit_codes']
  assert not set(FINAL) & set(recovery['recover_on_exit_codes'])
  assert sky['envs']['RUN_DIR'].startswith(tuple(sky['file_mounts']))


def test_skypilot_gives_each_host_its_flags(sky, tmp_path):
  host = tmp_path / 'scripts' / 'launch' / 'on_host.sh'
  host.parent.mkdir(parents=True)
  host.write_text(
    f'{shlex.quote(sys.executable)} -c'
    ' "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"'
  )
  env = {
    **os.environ,
    **sky['envs'],
    'ARGS': '--config.train.steps=3 --config.seed=1',
    'SKYPILOT_NODE_IPS': '10.0.0.5\n10.0.0.6',
    'SKYPILOT_NUM_NODES': '2',
    'SKYPILOT_NODE_RANK': '1',
  }
  for part, expected in [
    ('setup', ['cuda12']),
    (
      'run',
      [
        'cuda12', '--config', 'configs/mistral_lora.py',
        '--config.run_dir=/runs/mistral_lora', '--coordinator=10.0.0.5:8476',
        '--processes=2', '--process=1', '--config.train.steps=3',
        '--config.seed=1',
      ],
    ),
  ]:  # fmt: skip
    done = subprocess.run(
      ['bash', '-c', sky[part]], cwd=tmp_path, env=env, capture_output=True
    )
    assert json.loads(done.stdout) == expected
