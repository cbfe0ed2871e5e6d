"""Losses of a finished run and of a file, base and adapter.

References: the run's own metrics; for files the losses that transformers and
PEFT gave (tests/golden), or what follows in numpy from their logits.
"""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train import __main__, config
from lorax_train.errors import DataError, DivergedError, ModelError, ResumeError
from lorax_train.infer.load import load_params
from lorax_train.train import evaluate, loop, rundir, step
from lorax_train.train import losses as losses_lib
from tests.formats.refusals import refusal
from tests.toys import random_ids, write_model


def start(root, dtype='float32', **sections):
  """A finished run of two steps, its model and rows below `root`."""
  root.mkdir(parents=True, exist_ok=True)
  model = write_model(root / 'model')
  rows = [
    {'prompt': f'Count to {i}. ', 'completion': 'one, two, ' * (1 + i % 4)}
    for i in range(60)
  ]
  (root / 'rows.json').write_text(json.dumps(rows))
  mapping = config.defaults()
  mapping['run_dir'] = str(root / 'run')
  mapping['model'].update(path=str(model), dtype=dtype, param_dtype=dtype)
  mapping['lora'].update(targets='all-linear', rank=4)
  mapping['data'].update(
    path=str(root / 'rows.json'), template='prompt_completion', max_length=96
  )
  mapping['train'].update(steps=2, learning_rate=1e-2, schedule='constant')
  mapping['eval'].update(rows=5, samples=0)
  for name, values in sections.items():
    mapping[name].update(values)
  loop.run(config.from_mapping(mapping))
  return root / 'run'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A finished run in float32, whose loss is of few tokens at a time."""
  root = tmp_path_factory.mktemp('evaluate') / 'a'
  return start(root, train={'loss_chunk': 24})


@pytest.fixture
def run(finished, tmp_path):
  """A copy of it, to be damaged; its model and rows as well."""
  root = shutil.copytree(finished.parent, tmp_path / 'copy')
  for name in ('config.json', 'run.json'):
    path = root / 'run' / name
    path.write_text(path.read_text().replace(str(finished.parent), str(root)))
  return root / 'run'


def eval_losses(run_dir):
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  return [v['eval_loss'] for v in map(json.loads, lines) if 'eval_loss' in v]


def verb(capsys, *argv):
  capsys.readouterr()
  code = __main__.cli(['eval', *map(str, argv)])
  return code, *capsys.readouterr()


# --- of a run


@pytest.mark.parametrize(
  'dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)]
)
def test_a_run_gets_the_losses_that_it_logged(
  dtype, finished, tmp_path, capsys
):
  run_dir = finished
  if dtype == 'bfloat16':
    run_dir = start(tmp_path / 'b', dtype)
  first, last = eval_losses(run_dir)
  code, out, err = verb(capsys, '--run', run_dir, '--json')
  assert (code, err) == (0, '')
  report = json.loads(out)
  assert report['base']['loss'] == pytest.approx(first, abs=1e-6)
  assert report['adapted']['loss'] == pytest.approx(last, abs=1e-6)
  assert last < first
  for key in ('base', 'adapted'):
    assert report[key]['perplexity'] == math.exp(report[key]['loss'])
  assert report['change_percent']['loss'] == pytest.approx(
    100 * (last - first) / first, abs=1e-4
  )
  assert report['rows'] == 5
  assert report['dtype'] == dtype
  assert report['run'] == str(run_dir)


@pytest.mark.slow
def test_logits_of_a_run_are_as_few_as_in_training(run, monkeypatch):
  chunks = []

  def spied(*args):
    chunks.append(args[-1])
    return losses_lib.next_token_loss_of_states(*args)

  monkeypatch.setattr(step, 'next_token_loss_of_states', spied)
  evaluate.evaluate_run(str(run))
  assert set(chunks) == {24}
  (run.parent / 'again').mkdir()
  start(run.parent / 'again', train={'loss_chunk': 7})
  assert set(chunks) == {24, 7}


def test_a_run_in_words(finished, capsys):
  first, last = eval_losses(finished)
  code, out, _ = verb(capsys, '--run', finished)
  assert code == 0
  lines = dict(line.split(maxsplit=1) for line in out.splitlines())
  assert list(lines) == [
    'run', 'model', 'adapter', 'data', 'rows', 'compute', 'base', 'adapted',
    'change',
  ]  # fmt: skip
  assert lines['base'].startswith(f'loss {first:.6f}, perplexity ')
  assert lines['adapted'].startswith(f'loss {last:.6f}, perplexity ')
  assert re.fullmatch(r'loss -\d+\.\d\d %, perplexity -\d+\.\d\d %',
                      lines['change'])  # fmt: skip


def test_a_mesh_of_other_devices_becomes_one_device(run):
  path = run / 'config.json'
  mapping = json.loads(path.read_text())
  mapping['mesh'].update(data=3, fsdp=1)
  path.write_text(json.dumps(mapping))
  report = evaluate.evaluate_run(str(run))
  assert report['devices'] == '1 cpu'
  assert report['adapted']['loss'] == pytest.approx(
    eval_losses(run)[-1], abs=1e-5
  )


@pytest.mark.slow
def test_rows_held_out_in_a_file_of_their_own(tmp_path):
  held = [{'prompt': 'a', 'completion': 'b' * n} for n in (3, 5, 9)]
  path = tmp_path / 'held.json'
  path.write_text(json.dumps(held))
  run_dir = start(tmp_path, data={'eval_path': str(path)})
  report = evaluate.evaluate_run(str(run_dir))
  assert report['adapted']['loss'] == pytest.approx(
    eval_losses(run_dir)[-1], abs=1e-6
  )
  # Of each row its letters and EOS.
  assert (report['rows'], report['learned_tokens']) == (3, 4 + 6 + 10)
  assert report['data'] == str(path)


def test_the_base_of_a_run_from_an_adapter_has_no_adapter(finished, tmp_path):
  second = start(tmp_path, lora={'init_from': str(finished / 'adapter')})
  report = evaluate.evaluate_run(str(second))
  assert report['base']['loss'] == pytest.approx(
    eval_losses(finished)[0], abs=1e-6
  )
  # What it logged first was that of the adapter it began with.
  assert eval_losses(second)[0] == pytest.approx(
    eval_losses(finished)[-1], abs=1e-6
  )


def change_rows(run):
  path = run.parent / 'rows.json'
  path.write_text(path.read_text().replace('Count to 7.', 'Count to 8.'))


def change_weights(run):
  write_model(run.parent / 'model', seed=1)


def cut_adapter(run):
  path = run / 'adapter' / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:-5])


# What happened to a run -> exit code, words of the message.
DAMAGE = {
  'no adapter': (
    lambda run: shutil.rmtree(run / 'adapter'),
    4,
    'no adapter yet, the run is at step 2 of 2: give its command again',
  ),
  'a damaged adapter': (cut_adapter, 4, 'damaged or not complete'),
  'no config': (
    lambda run: (run / 'config.json').unlink(),
    5,
    'no config.json in it',
  ),
  'no run.json': (lambda run: (run / 'run.json').unlink(), 5, 'no run.json'),
  'half a config': (
    lambda run: (run / 'config.json').write_text('{"model'),
    5,
    'config.json or run.json is damaged',
  ),
  'other rows': (change_rows, 5, 'rows.json are not those that it read'),
  'other weights': (change_weights, 5, 'the weights of'),
  'no rows': (
    lambda run: (run.parent / 'rows.json').unlink(),
    3,
    'relative paths count from here: ',
  ),
  'no model': (
    lambda run: shutil.rmtree(run.parent / 'model'),
    4,
    'no such directory',
  ),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_runs_that_are_refused(case, run, capsys):
  damage, want, words = DAMAGE[case]
  damage(run)
  code, out, err = verb(capsys, '--run', run)
  assert (code, out, err.count('\n')) == (want, '', 1), err
  assert words in err
  assert str(run) in err


def test_a_run_that_held_nothing_out(tmp_path):
  run_dir = start(tmp_path, eval={'rows': 0})
  message = refusal(evaluate.evaluate_run, str(run_dir), kind=DataError)
  assert 'it held no rows out (eval.rows=0, of 60 rows' in message
  assert '--data' in message


def test_what_is_no_run(tmp_path):
  for path in (tmp_path / 'absent', tmp_path):
    message = refusal(evaluate.evaluate_run, str(path), kind=ResumeError)
    assert message.startswith(f'run {path}: no {rundir.CONFIG} in it')


# --- of a file


def losses(logits, labels):
  """-log p of each label that counts, from float64, in numpy alone."""
  x, y = logits[:, :-1].astype(np.float64), labels[:, 1:]
  top = x.max(-1, keepdims=True)
  logp = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
  picked = np.take_along_axis(logp, np.maximum(y, 0)[..., None], -1)[..., 0]
  return -picked[y != -100]


def rows_of(ids, labels, path):
  """A file of the template `tokens`."""
  rows = [
    {'input_ids': i.tolist(), 'labels': l.tolist()}
    for i, l in zip(ids, labels, strict=True)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return str(path)


@pytest.mark.parametrize('adapter', ['', 'adapter_patterns', 'adapter_head'])
def test_losses_equal_transformers(adapter, golden, tmp_path, capsys):
  folder = golden / 'mistral_window'
  want = load_file(folder / 'reference.safetensors')
  facts = json.loads((folder / 'reference.json').read_text())
  argv = ['--model', folder / 'model', '--template', 'tokens', '--data']
  argv.append(rows_of(want['ids'], want['labels'], tmp_path / 'rows.jsonl'))
  if adapter:
    argv += ['--adapter', folder / adapter]
  code, out, err = verb(capsys, *argv, '--json')
  assert (code, err) == (0, '')
  report = json.loads(out)
  assert report['base']['loss'] == pytest.approx(facts['loss'], abs=1e-5)
  every = losses(want['logits'], want['labels'])
  assert report['base']['loss'] == pytest.approx(every.mean(), abs=1e-5)
  assert report['learned_tokens'] == every.size
  if adapter:
    every = losses(want[f'logits_{adapter}'], want['labels'])
    assert report['adapted']['loss'] == pytest.approx(every.mean(), abs=1e-5)
    assert report['change_percent']['loss'] != 0
  else:
    assert report['adapted'] is report['change_percent'] is None
  words = verb(capsys, *argv)[1]
  assert ('adapted' in words) == ('change' in words) == bool(adapter)


def test_the_base_is_quantised_where_that_is_asked(golden, tmp_path, capsys):
  folder = golden / 'mistral_window'
  want = load_file(folder / 'reference.safetensors')
  path = rows_of(want['ids'], want['labels'], tmp_path / 'rows.jsonl')
  argv = ['--model', folder / 'model', '--template', 'tokens', '--data', path]
  code, out, _ = verb(capsys, *argv, '--quant', 'nf4', '--json')
  loss = json.loads(out)['base']['loss']
  apply, params = load_params(folder / 'model', quant='nf4')
  logits = np.asarray(jax.jit(apply)(params, want['ids']))
  every = losses(logits, want['labels'])
  assert (code, loss) == (0, pytest.approx(every.mean(), abs=1e-5))
  plain = losses(want['logits'], want['labels']).mean()
  assert abs(loss - plain) > 1e-2


@pytest.mark.slow
def test_the_first_rows_in_batches_of_any_size(golden, tmp_path):
  model = str(golden / 'mistral_tied' / 'model')
  want = load_file(golden / 'mistral_tied' / 'reference.safetensors')
  vocab = want['logits'].shape[-1]
  ids = np.concatenate([want['ids'], random_ids(3, want['ids'].shape, vocab)])
  labels = ids.copy()
  labels[0, :5] = labels[3, 4:] = -100
  path = rows_of(ids, labels, tmp_path / 'rows.jsonl')

  def loss(**kwargs):
    return evaluate.evaluate_file(model, path, 'tokens', **kwargs)

  whole = loss(batch_size=3)
  assert (whole['rows'], whole['learned_tokens']) == (
    len(ids), (labels[:, 1:] != -100).sum()
  )  # fmt: skip
  assert loss(rows=99)['base'] == loss()['base']
  for size in (1, 8):
    assert loss(batch_size=size)['base']['loss'] == pytest.approx(
      whole['base']['loss'], abs=1e-6
    )
  two = loss(rows=2)
  assert two['rows'] == 2
  assert two['base']['loss'] == pytest.approx(
    losses(want['logits'], labels[:2]).mean(), abs=1e-5
  )
  half = loss(rows=2, dtype='bfloat16')['base']['loss']
  assert 1e-6 < abs(half - two['base']['loss']) < 0.05


def with_alpha(golden, tmp_path, alpha):
  """PEFT's adapter of the head, so strong that it rules the logits."""
  source = golden / 'mistral_window' / 'adapter_head'
  adapter = shutil.copytree(source, tmp_path / 'adapter')
  path = adapter / 'adapter_config.json'
  settings = json.loads(path.read_text()) | {'lora_alpha': alpha}
  path.write_text(json.dumps(settings))
  return str(adapter)


def test_a_perplexity_past_floats_is_none(golden, tmp_path, capsys):
  folder = golden / 'mistral_window'
  want = load_file(folder / 'reference.safetensors')
  argv = ['--model', folder / 'model', '--template', 'tokens', '--data']
  argv.append(rows_of(want['ids'], want['labels'], tmp_path / 'rows.jsonl'))
  argv += ['--adapter', with_alpha(golden, tmp_path, 10**6)]
  report = json.loads(verb(capsys, *argv, '--json')[1])
  assert report['adapted']['loss'] > 1000
  assert report['adapted']['perplexity'] is None
  assert report['change_percent']['perplexity'] is None
  assert 'perplexity too large' in verb(capsys, *argv)[1]


def test_a_loss_that_is_not_finite_is_an_error(golden, tmp_path):
  folder = golden / 'mistral_window'
  want = load_file(folder / 'reference.safetensors')
  path = rows_of(want['ids'], want['labels'], tmp_path / 'rows.jsonl')
  adapter = with_alpha(golden, tmp_path, 1.3e39)
  message = refusal(
    lambda: evaluate.evaluate_file(
      str(folder / 'model'), path, 'tokens', adapter
    ),
    kind=DivergedError,
  )
  assert 'the loss of the adapter is' in message


def test_an_adapter_of_another_model(finished, golden, tmp_path):
  path = rows_of(random_ids(), random_ids(), tmp_path / 'rows.jsonl')
  message = refusal(
    lambda: evaluate.evaluate_file(
      str(finished.parent / 'model'),
      path,
      'tokens',
      str(golden / 'mistral_window' / 'adapter_patterns'),
    ),
    kind=ModelError,
  )
  assert 'does not fit' in message


# Arguments ('M' a model, 'D' its rows, 'T' the template) -> exit code, words.
USAGE = [
  ('', 2, 'one of the arguments --run --model is required'),
  ('--run R --model M', 2, '--model: not allowed with argument --run'),
  ('--run R --rows 3 --dtype float32', 2, '--run has --dtype, --rows of its'),
  ('--run= --data D T', 2, '--run has --data, --template of its own'),
  ('--model M', 2, 'give --data, --template'),
  ('--model M --data D', 2, 'give --template'),
  ('--model M --data D --template wibble', 2, "template is 'wibble', none of"),
  ('--model M --data D T --truncation up', 2, "invalid choice: 'up'"),
  ('--model M --data D T --rows -1', 2, '--rows -1: give 0 for all'),
  ('--model M --data D T --rows many', 2, "invalid int value: 'many'"),
  ('--model M --data D T --batch-size 0', 2, '--batch-size is 0, below 1'),
  ('--model M --data D T --max-length 1', 2, '--max-length is 1, below 2'),
  ('--model M --data D T --max-length 4', 3, 'no row is left to evaluate'),
  (
    '--model M --data D T --max-length 4 --truncation error',
    3,
    'raise --max-length, or set --truncation=drop',
  ),
  ('--model M --data absent.json T', 3, 'no such file; check --data'),
  ('--model M --data EMPTY T', 3, 'no rows; pass a file that has some'),
  (
    '--model M --data D --template alpaca',
    3,
    'leave them out with --on-bad-row=skip',
  ),
  ('--model absent/none/x --data D T', 4, 'no such directory'),
  ('--model M --data D T --adapter absent', 4, 'is this an adapter?'),
  ('--model EMPTY --data D T', 4, 'is a file'),
]


@pytest.mark.parametrize(('line', 'code', 'words'), USAGE)
def test_errors_of_usage(line, code, words, finished, tmp_path, capsys):
  (tmp_path / 'empty.json').write_text('')
  root = finished.parent
  stands = {
    'M': [root / 'model'],
    'R': [finished],
    'D': [root / 'rows.json'],
    'T': ['--template', 'prompt_completion'],
    'EMPTY': [tmp_path / 'empty.json'],
  }
  argv = [a for word in line.split() for a in stands.get(word, [word])]
  got, out, err = verb(capsys, *argv)
  assert (got, out, err.count('\n')) == (code, '', 1), err
  assert words in err
  assert '--config' not in err


def test_nothing_to_learn_is_refused(finished, tmp_path):
  ids = random_ids()
  path = rows_of(ids, np.full_like(ids, -100), tmp_path / 'rows.jsonl')
  message = refusal(
    lambda: evaluate.evaluate_file(
      str(finished.parent / 'model'), path, 'tokens'
    ),
    kind=DataError,
  )
  assert 'no row is left to evaluate' in message


def test_a_base_that_is_not_finite_is_refused(run, tmp_path):
  path = run.parent / 'model' / 'model.safetensors'
  save_file({k: v * np.nan for k, v in load_file(path).items()}, path)
  message = refusal(
    lambda: evaluate.evaluate_file(
      str(run.parent / 'model'),
      str(run.parent / 'rows.json'),
      'prompt_completion',
    )
  )
  assert 'not finite' in message
