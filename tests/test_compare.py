"""scripts/compare.py: each method is trained for itself, and its figures are its own.

References: the numbers that a model of these sizes has, counted by hand; what the
runs say of themselves in metrics.jsonl, and their files.
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests import toys

ROOT = Path(__file__).parents[1]

RESULT = {
  'method': 'lora', 'steps': 200, 'trained': 2442240,
  'curve': [[0, 100, 200], [2.0, 1.75, 1.5]], 'step_bytes': 2**30,
  'process_bytes': 3 * 2**29, 'seconds': 61.4, 'cpu_seconds': 1234.5,
  'artefact_bytes': 9_790_000,
}  # fmt: skip


@pytest.fixture
def script():
  path = ROOT / 'scripts' / 'compare.py'
  spec = importlib.util.spec_from_file_location('compare', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_row_says_what_a_run_cost_and_gave(script):
  row = script.table([RESULT]).splitlines()[2]
  assert [cell.strip() for cell in row.strip('|').split('|')] == [
    'lora', '200', '2.0000 -> 1.5000 (-25.0 %)', '2,442,240', '1.00 GiB',
    '1.50 GiB', '61', '1,234', '9.8 MB',
  ]  # fmt: skip


def test_overrides_are_of_all_or_of_one(script, capsys):
  options, overrides = script.parsed(
    ['--methods', 'lora,mezo', '--config.train.steps=3', '--mezo.train.steps=9']
  )
  assert options.methods == 'lora,mezo'
  assert overrides['config'] == {'train.steps': '3'}
  assert overrides['mezo'] == {'train.steps': '9'}
  assert not overrides['full']
  for flags, message in (
    (['--methods', 'dora'], 'known are lora, qlora, mezo, full'),
    (['--config.train.steps'], 'write --config.KEY=VALUE'),
    (['--dora.train.steps=3'], 'unrecognized arguments'),
  ):
    with pytest.raises(SystemExit):
      script.parsed(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_all_methods_are_trained_once(script, tmp_path, capfd):
  model = toys.write_model(tmp_path / 'model', head_dim=16, hidden_size=64)
  rows = tmp_path / 'rows.jsonl'
  row = {'instruction': 'Say it.', 'input': '', 'output': 'It.'}
  rows.write_text(''.join(json.dumps(row | {'output': str(i)}) + '\n' for i in range(30)))  # fmt: skip
  argv = [
    f'--out={tmp_path / "out"}', f'--config.model.path={model}',
    f'--config.data.path={rows}', '--config.data.max_length=400',
    '--config.train.steps=2', '--config.eval.every=1', '--full.train.steps=3',
  ]  # fmt: skip
  script.compare(argv)
  results = {
    path.parent.name: json.loads(path.read_text())
    for path in tmp_path.glob('out/*/compare.json')
  }
  # Rank 8 over q, o of 64 x 64, k, v of 64 x 32, three of 64 x 48, 3 layers.
  sums = 8 * 3 * (2 * 128 + 2 * 96 + 3 * 112)
  b_alone = 8 * 3 * (64 + 2 * 32 + 64 + 2 * 48 + 64)
  whole = (
    3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 48 + 128) + 2 * 260 * 64 + 64
  )
  assert {name: r['trained'] for name, r in results.items()} == {
    'lora': sums, 'qlora': sums, 'mezo': b_alone, 'full': whole,
  }  # fmt: skip
  for name, result in results.items():
    last = 3 if name == 'full' else 2
    assert result['steps'] == last
    steps, losses = result['curve']
    assert steps == list(range(last + 1))
    lines = (tmp_path / 'out' / name / 'metrics.jsonl').read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert losses == [x['eval_loss'] for x in logged if 'eval_loss' in x]
    assert all(map(math.isfinite, losses))
    assert result['process_bytes'] > result['step_bytes'] > 4 * whole / 2
    assert result['cpu_seconds'] > 1
  assert results['qlora']['step_bytes'] < results['lora']['step_bytes']
  assert results['lora']['artefact_bytes'] > 4 * sums
  assert results['full']['artefact_bytes'] > 4 * whole
  told = (tmp_path / 'out' / 'compare.md').read_text()
  assert told == script.table(list(map(results.get, script.METHODS)))
  assert (tmp_path / 'out' / 'compare.png').stat().st_size > 1000

  capfd.readouterr()
  script.compare(argv)  # nothing is trained a second time
  out = capfd.readouterr().out
  assert told in out
  assert 'loaded' not in out
