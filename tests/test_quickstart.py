"""The quickstart: its rows, and three steps of it on the real model.

References: the rows' own promises in the README; the losses, which must be
finite and fall; for PEFT's reading of the adapter, tests/parity.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lorax_train import main
from lorax_train.data import source, tokenize, tokenized
from lorax_train.formats import find
from lorax_train.train import plot, samples
from tests.formats import smollm2

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'quickstart.py'
ROWS = ROOT / 'configs' / 'data' / 'instructions.jsonl'


@pytest.fixture(scope='module')
def rows():
  return [json.loads(line) for line in ROWS.read_text('utf-8').splitlines()]


def test_the_rows_are_many_and_none_is_there_twice(rows):
  assert len(rows) == 296
  for row in rows:
    assert list(row) == ['instruction', 'input', 'output']
    assert all(text == text.strip() for text in row.values())
    assert row['instruction']
    assert row['output']
  assert len({row['instruction'] for row in rows}) == len(rows)
  assert len({row['output'] for row in rows}) == len(rows)


def test_the_rows_are_varied(rows):
  first = Counter(row['instruction'].split()[0] for row in rows)
  assert max(first.values()) < len(rows) / 10
  assert len(first) > 60
  with_input = sum(bool(row['input']) for row in rows)
  assert 0.2 < with_input / len(rows) < 0.4


def test_the_rows_have_a_licence():
  assert 'CC0 1.0' in (ROWS.parent / 'LICENSE').read_text()


def test_no_row_is_too_long_for_the_quickstart():
  model_dir = find.find_model(str(smollm2.find()))
  cfg = main.parse(['main', '--config', str(CONFIG)])
  done = tokenized.tokenize_rows(
    source.read_rows(str(ROWS)),
    cfg.data.template,
    tokenize.load_tokenizer(model_dir),
    cfg.data.max_length,
  )
  assert done.report.rows_kept == 296
  assert done.report.longest == cfg.data.max_length


@pytest.mark.slow
def test_three_steps(tmp_path):
  # A process apart has one device and fast programs, as a laptop does.
  run_dir = tmp_path / 'run'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [
      sys.executable, '-m', 'lorax_train.main', f'--config={CONFIG}',
      f'--config.model.path={smollm2.find()}', f'--config.run_dir={run_dir}',
      '--config.train.steps=3', '--config.train.batch_size=2',
      '--config.train.grad_accum=2',
      '--config.train.warmup_steps=0', '--config.eval.rows=4',
      '--config.eval.samples=1',
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=240,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, '')
  assert '2,442,240 of 134,515,008' in done.stdout
  text = (run_dir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  losses = [line['loss'] for line in lines if 'loss' in line]
  held_out = [line['eval_loss'] for line in lines if 'eval_loss' in line]
  assert len(losses) == 3
  assert all(map(math.isfinite, losses))
  assert held_out[1] < held_out[0]
  for name in ('adapter/adapter_model.safetensors', plot.FILE, samples.FILE):
    assert (run_dir / name).is_file()
  written = json.loads((run_dir / 'adapter/adapter_config.json').read_text())
  base = Path(written['base_model_name_or_path'])
  assert (base / 'model.safetensors').is_file()  # and not the GGUF file
  assert '\nstep 3     ' in done.stdout  # the sample after training
