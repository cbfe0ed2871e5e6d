"""What a path is said to be: runs, checkpoints, and what else there is.

References: the run's own files, and the words of the error for what is none
of ours.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorax_train import __main__
from lorax_train.train import checkpoint, inspection
from tests.formats.refusals import refusal
from tests.train.test_evaluate import eval_losses, finished, start

__all__ = ['finished']  # a fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(finished, tmp_path):
  """A copy of a finished run, to be damaged."""
  return shutil.copytree(finished, tmp_path / 'run')


def verb(capsys, *argv):
  capsys.readouterr()
  code = __main__.cli(['inspect', *map(str, argv)])
  return code, *capsys.readouterr()


def test_a_run(finished, capsys):
  code, out, err = verb(capsys, finished, '--json')
  assert (code, err) == (0, '')
  facts = json.loads(out)
  assert facts['kind'] == 'run'
  assert facts['config'] == json.loads((finished / 'config.json').read_text())
  assert facts['checkpoint']['step'] == 2
  assert facts['checkpoint']['problem'] is None
  assert facts['eval_losses'] == [
    {'step': step, 'eval_loss': loss}
    for step, loss in zip((0, 2), eval_losses(finished), strict=True)
  ]
  (last,) = facts['losses']
  assert last['step'] == 2
  alone = verb(capsys, finished / 'adapter', '--json')[1]
  assert facts['adapter'] == json.loads(alone)
  code, out, _ = verb(capsys, finished)
  first, last = eval_losses(finished)
  for words in (
    f'run         {finished}\n',
    'steps       2 of 8 rows',
    'checkpoint  step 2, every file is as it was written\n',
    f'held out    {first:.4f} at step 0, {last:.4f} at step 2\n',
    'lora        lora, rank 4, alpha 16, targets all-linear\n',
    ': 21 modules matched\n',
  ):
    assert words in out


def test_a_run_that_is_not_done(run, capsys):
  shutil.rmtree(run / 'adapter')
  shutil.rmtree(run / 'checkpoints')
  (run / 'metrics.jsonl').unlink()
  code, out, _ = verb(capsys, run)
  assert code == 0
  lines = dict(line.split(maxsplit=1) for line in out.splitlines())
  assert lines['checkpoint'] == 'none'
  assert lines['loss'] == 'none yet'
  assert lines['adapter'].startswith('none yet')
  facts, _ = inspection.inspect(str(run))
  assert facts['checkpoint'] is facts['adapter'] is None
  assert facts['losses'] == facts['eval_losses'] == []


def test_damage_in_a_run_is_said_and_is_no_error(run, capsys):
  weights = run / 'adapter' / 'adapter_model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-5])
  leaves = run / 'checkpoints' / '2' / checkpoint.LEAVES
  leaves.write_text(leaves.read_text().replace('float32', 'float16'))
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 3, "loss": "x"}\n{"step": 4, "lo')
  code, out, _ = verb(capsys, run)
  assert code == 0
  lines = dict(line.split(maxsplit=1) for line in out.splitlines())
  assert lines['checkpoint'] == (
    'step 2, damaged: leaves.json is not as it was written'
  )
  assert 'damaged or not complete' in lines['adapter']
  assert lines['loss'].endswith('at step 2')


def test_the_middle_of_many_losses_is_left_out(run, capsys):
  with open(run / 'metrics.jsonl', 'a') as file:
    for step in range(3, 30):
      file.write(json.dumps({'step': step, 'eval_loss': step / 10}) + '\n')
  out = verb(capsys, run)[1]
  assert ' at step 2, ..., 2.8000 at step 28, 2.9000 at step 29\n' in out
  assert len(inspection.inspect(str(run))[0]['eval_losses']) == 29


def test_a_run_whose_configuration_is_damaged(run, capsys):
  (run / 'config.json').write_text('{')
  code, _, err = verb(capsys, run)
  assert (code, err.count('\n')) == (5, 1)
  assert 'config.json or run.json is damaged' in err


def test_a_checkpoint(finished, capsys, monkeypatch):
  directory = finished / 'checkpoints' / '2'
  facts = json.loads(verb(capsys, directory, '--json')[1])
  assert (facts['kind'], facts['step']) == ('checkpoint', 2)
  files = [p for p in directory.rglob('*') if p.is_file()]
  assert facts['files'] == len(files)
  assert facts['bytes'] == sum(p.stat().st_size for p in files)
  assert facts['leaves'] == json.loads((directory / 'leaves.json').read_text())
  text = verb(capsys, directory)[1]
  assert 'verdict     every file is as it was written\n' in text
  assert all(name in text for name in facts['leaves'])
  # The same from inside of it.
  monkeypatch.chdir(directory)
  assert verb(capsys, '.')[1] == text


def test_checkpoints_of_every_kind(run, capsys):
  root = run / 'checkpoints'
  for name in ('10', '3.corrupt', '11', '12'):
    shutil.copytree(root / '2', root / name)
  for name in ('10', '12'):
    path = root / name / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, 'step': int(name)}))
  (root / '11' / checkpoint.MANIFEST).unlink()
  (root / '12' / checkpoint.LEAVES).write_text('')
  out = verb(capsys, root)[1]
  table = out.splitlines()[3:]
  steps = {line.split()[0]: line.split(maxsplit=4)[4] for line in table}
  assert steps == {
    '2': 'every file is as it was written',
    '3.corrupt': 'damaged: MANIFEST.json is that of step 2',
    '10': 'every file is as it was written',
    '11': 'damaged: no MANIFEST.json',
    '12': 'damaged: leaves.json is not as it was written',
  }
  assert list(steps) == ['2', '3.corrupt', '10', '11', '12']
  facts = json.loads(verb(capsys, root, '--json')[1])
  assert [s['step'] for s in facts['steps']] == [2, 3, 10, 11, 12]
  moved = (root / '2').rename(root.parent / 'moved')
  facts, text = inspection.inspect(str(moved))
  assert facts['step'] is None
  assert 'MANIFEST.json is that of step 2' in text
  # Beside steps, such a one is none.
  moved.rename(root / 'moved')
  facts, _ = inspection.inspect(str(root))
  assert [s['step'] for s in facts['steps']] == [3, 10, 11, 12]


def test_a_model_and_an_adapter(golden, capsys):
  for path, kind in (('model', 'model'), ('adapter_head', 'adapter')):
    directory = golden / 'mistral_window' / path
    facts = json.loads(verb(capsys, directory, '--json')[1])
    assert facts['kind'] == kind
    assert verb(capsys, directory)[1].startswith(f'{kind:<11} {directory}\n')


def test_what_is_none_of_ours(tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('')
  for name, words in (
    ('absent', 'absent: no such directory; give the directory of a model'),
    ('empty', 'empty: holds nothing; give'),
    ('other', 'other: holds notes.txt; give'),
    ('other/notes.txt', 'other/notes.txt: a file; give'),
  ):
    path = tmp_path / name
    assert words in refusal(inspection.inspect, str(path))
    code, out, err = verb(capsys, path)
    assert (code, out, err.count('\n')) == (4, '', 1)
  code, _, err = verb(capsys)
  assert (code, err.count('\n')) == (2, 1)
  assert 'required: PATH' in err


def test_a_run_that_learns_nothing_has_rank_0(tmp_path):
  run_dir = start(tmp_path, train={'steps': 1, 'learning_rate': 0.0})
  facts, text = inspection.inspect(str(run_dir / 'adapter'))
  assert all(m['effective_rank'] == 0 for m in facts['modules'])
  assert 'nan' not in text


@pytest.mark.parametrize('name', __main__.VERBS)
def test_help_brings_in_nothing_heavy(name, tmp_path):
  code = (
    'import sys; from lorax_train import __main__ as m\n'
    f'try: m.cli([{name!r}, "--help"])\n'
    'except SystemExit: pass\n'
    'print(*{"jax", "flax", "optax", "orbax", "tokenizers"} & {*sys.modules})'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert 'usage: ' in done.stdout
  # The keys of a configuration are those of the library's own LoraSpec.
  assert done.stdout.splitlines()[-1] == ('jax' if name == 'train' else '')
