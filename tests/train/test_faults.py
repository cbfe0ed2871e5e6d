"""Kill it anywhere: the finished adapter is the same as if you had not.

Reference: an uninterrupted run, whose adapter and per-step losses an
interrupted one must equal bit for bit. The runs are real processes and real
signals; a signal is sent when metrics.jsonl shows a step, not after a time.
The adapter itself is whole or absent, whatever fails while it is written.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import config, lora, main
from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.errors import ModelError
from lorax_train.formats import peft
from lorax_train.train import checkpoint, export, setup
from lorax_train.train.metrics import MetricsLog
from tests import toys
from tests.data.toys import sentencepiece_model

ROOT = Path(__file__).parents[2]
STEPS = 160
DEADLINE = 120.0  # seconds; far more than any of this takes


def command(folder, run_dir, **changes):
  """The command line of a run of many small steps."""
  keys = {
    'model.path': folder / 'model',
    'model.dtype': 'float32',
    'model.param_dtype': 'float32',
    'model.remat': 'none',
    'lora.rank': 2,
    'lora.dropout': 0.1,
    'data.path': folder / 'rows.json',
    'train.steps': STEPS,
    'train.batch_size': 2,
    'train.log_every': 5,
    'checkpoint.every': 20,
    'eval.every': 60,
    'run_dir': run_dir,
    **changes,
  }
  overrides = [f'--config.{key}={value}' for key, value in keys.items()]
  return ['--config', str(ROOT / 'configs' / 'mistral_lora.py'), *overrides]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model, rows, and `whole`: the run that nobody interrupted."""
  folder = tmp_path_factory.mktemp('faults')
  toys.write_model(folder / 'model', num_hidden_layers=1)
  rows = [{'instruction': f'{i}', 'output': f'no {i}'} for i in range(30)]
  (folder / 'rows.json').write_text(json.dumps(rows))
  code, _, err = finish(start(folder, folder / 'whole'))
  assert (code, err) == (0, '')
  return folder


def start(folder, run_dir):
  dropped = ('HF_', 'JAX_', 'XLA_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
  return subprocess.Popen(
    [sys.executable, '-m', 'lorax_train.main', *command(folder, run_dir)],
    cwd=ROOT,
    env={
      **env,
      'JAX_PLATFORMS': 'cpu',
      # Compiled once for all of these processes, one after the other.
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  """(exit code, stdout, stderr) when it has ended."""
  try:
    out, err = process.communicate(timeout=DEADLINE)
  finally:
    process.kill()
  return process.returncode, out, err


def interrupt(folder, run_dir, step, number):
  """Starts a run, and sends it the signal once `step` is on disk."""
  process = start(folder, run_dir)
  try:
    wait_for(run_dir, step, process)
    process.send_signal(number)
  except BaseException:
    process.kill()
    raise
  return finish(process)


def wait_for(run_dir, step, process):
  begun = time.monotonic()
  while not any(line['step'] >= step for line in metrics(run_dir)):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() - begun < DEADLINE
    time.sleep(0.002)


def metrics(run_dir):
  """The whole lines of metrics.jsonl so far."""
  lines = []
  with contextlib.suppress(FileNotFoundError):
    for text in (run_dir / 'metrics.jsonl').read_text('utf-8').splitlines():
      with contextlib.suppress(ValueError):  # being written just now
        lines.append(json.loads(text))
  return lines


def curve(run_dir):
  """What the run measured, but for the speed."""
  speed = 'tokens_per_second', 'data_wait'
  return [
    {k: v for k, v in line.items() if k not in speed}
    for line in metrics(run_dir)
  ]


def resumed_at(out):
  return int(re.search(r'^resumed    at step (\d+)$', out, re.MULTILINE)[1])


def check_equals_the_whole_run(folder, run_dir):
  for name in ('adapter_model.safetensors', 'adapter_config.json'):
    want = (folder / 'whole' / 'adapter' / name).read_bytes()
    assert (run_dir / 'adapter' / name).read_bytes() == want
  assert curve(run_dir) == curve(folder / 'whole')
  steps = [line['step'] for line in curve(run_dir) if 'loss' in line]
  assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_asked_to_stop_twice_and_run_again(folder, tmp_path):
  run_dir, at = tmp_path / 'run', 0
  for number, name, step in [
    (signal.SIGTERM, 'SIGTERM', 10),
    (signal.SIGINT, 'SIGINT', 70),
  ]:
    code, out, err = interrupt(folder, run_dir, step, number)
    assert code == 75, err
    assert 'Traceback' not in err
    stopped = re.fullmatch(
      rf'stopped by {name} at step (\d+) of {STEPS}, nothing lost: run the same'
      r' command again to continue\n',
      err,
    )
    assert stopped, err
    assert not (run_dir / 'adapter').exists()
    if at:
      assert resumed_at(out) == at
    at = int(stopped[1])
    assert step <= at < STEPS
    # The step that it names is on disk: nothing lost.
    assert checkpoint.latest_step(run_dir / 'checkpoints') == at
  code, out, err = finish(start(folder, run_dir))
  assert (code, err) == (0, '')
  assert resumed_at(out) == at
  check_equals_the_whole_run(folder, run_dir)


@pytest.mark.slow
def test_killed_twice_and_run_again(folder, tmp_path):
  run_dir, at = tmp_path / 'run', None
  for step in (0, 70):  # before the first checkpoint, and among later ones
    code, out, err = interrupt(folder, run_dir, step, signal.SIGKILL)
    assert (code, err) == (-signal.SIGKILL, '')
    if at is not None:
      assert resumed_at(out) == at
    at = checkpoint.latest_step(run_dir / 'checkpoints')
    assert (at or 0) % 20 == 0
    assert step - 20 <= (at or 0) < STEPS
  code, out, err = finish(start(folder, run_dir))
  assert (code, err) == (0, '')
  assert resumed_at(out) == at
  check_equals_the_whole_run(folder, run_dir)


# --- the same in this process, at a moment that is not left to chance


def test_a_signal_between_steps_loses_none_of_them(
  folder, tmp_path, monkeypatch, capfd
):
  # While metrics are fetched: on an accelerator nearly all time is spent so.
  write, sent = MetricsLog.write, []

  def write_and_signal(log, step, **values):
    write(log, step, **values)
    if step == 3 and not sent:
      sent.append(step)
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(MetricsLog, 'write', write_and_signal)
  before = signal.getsignal(signal.SIGTERM)
  argv = command(
    folder,
    tmp_path / 'run',
    **{'train.batch_size': 8, 'train.log_every': 1, 'eval.rows': 0},
  )
  assert main.main(['main', *argv]) == 75
  (line,) = capfd.readouterr().err.splitlines()
  at = int(re.search(r'at step (\d+) of', line)[1])
  assert at in (3, 4)
  assert checkpoint.latest_step(tmp_path / 'run' / 'checkpoints') == at
  assert signal.getsignal(signal.SIGTERM) is before


# --- writing the adapter


def write_adapter(directory, value, tokenizer=None):
  """An adapter of 2 x 16 KiB whose factors are all `value`."""
  names = {'q_proj': ('model.layers.0.self_attn.q_proj',)}
  spec = lora.LoraSpec('q_proj', rank=4)
  placed = lora.resolve(spec, names['q_proj'])
  params = {'q_proj': np.ones((1024, 1024), np.float32)}
  frozen, trainable = lora.split(jax.random.key(0), params, placed, names)
  trainable = jax.tree.map(lambda x: jnp.full_like(x, value), trainable)
  export.write_adapter(
    directory,
    frozen,
    trainable,
    setup.Adapters(None, names, {}, {}, spec, placed, None),
    config.TrainConfig(),
    'some/base',
    tokenizer,
    'held-out loss 2 -> 1',
  )


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_adapter_has_the_tokenizer_json_that_its_base_lacks(
  tmp_path, capsys
):
  base = tmp_path / 'base'
  base.mkdir()
  (base / 'tokenizer.model').write_bytes(sentencepiece_model())
  write_adapter(tmp_path / 'adapter', 1.0, load_tokenizer(base))
  written = contents(tmp_path / 'adapter')
  files, _ = missing_files(base)
  assert written.items() >= (contents(base) | files).items()
  assert 'tokenizer.json' in written
  assert capsys.readouterr().out == ''
  # Where none can be made, a line says why, and the rest is there.
  unigram = sentencepiece_model(
    model_type='unigram', vocab_size=60, byte_fallback=False
  )
  (base / 'tokenizer.model').write_bytes(unigram)
  write_adapter(tmp_path / 'adapter', 1.0, load_tokenizer(base))
  assert 'tokenizer.json' not in contents(tmp_path / 'adapter')
  assert contents(tmp_path / 'adapter')['tokenizer.model'] == unigram
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(
    f'tokenizer  {base}/tokenizer.model: no tokenizer.json'
  )


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path):
  directory = tmp_path / 'adapter'
  write_adapter(directory, 1.0)
  before = contents(directory)
  with (
    toys.full_disk(2**12),
    pytest.raises(OSError, match='adapter not written') as error,
  ):
    write_adapter(directory, 2.0)
  assert str(directory) in str(error.value)
  assert '\n' not in str(error.value)
  assert contents(directory) == before


def test_an_adapter_that_does_not_read_back_is_not_put_in_place(
  tmp_path, monkeypatch
):
  directory = tmp_path / 'adapter'
  write_adapter(directory, 1.0)
  before = contents(directory)
  load = peft.load_adapter

  def one_bit_off(path):
    loaded = load(path)
    for a, _ in loaded.factors.values():
      a[0, 0] = np.nextafter(a[0, 0], np.float32(9))
    return loaded

  monkeypatch.setattr(peft, 'load_adapter', one_bit_off)
  with pytest.raises(OSError, match='does not read back'):
    write_adapter(directory, 2.0)
  assert contents(directory) == before
  monkeypatch.undo()
  write_adapter(directory, 2.0)  # over what the failed one left
  assert [path.name for path in tmp_path.iterdir()] == ['adapter']
  assert set(contents(directory)) == set(before)
  assert contents(directory) != before


def test_an_adapter_that_is_not_finite_is_not_put_in_place(tmp_path):
  with pytest.raises(ModelError, match='not finite'):
    write_adapter(tmp_path / 'adapter', float('nan'))
  assert not (tmp_path / 'adapter').exists()
