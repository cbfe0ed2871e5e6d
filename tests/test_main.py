"""The command line: exit codes, and the one line that a failed run says.

Reference: the contract of exit codes, and for each mistake the words without
which a user could not mend it. Nearly all run in this process, on 8 simulated
devices; a few as real processes, on one.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train import __main__ as verbs
from lorax_train import errors, main
from lorax_train.train import checkpoint, rundir
from tests import toys

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'mistral_lora.py'
TINY = {
  'model.dtype': 'float32',
  'model.param_dtype': 'float32',
  'model.remat': 'none',
  'lora.rank': 2,
  'data.max_length': 64,
  'data.truncation': 'left',
  'train.steps': 2,
  'train.batch_size': 8,
  'train.warmup_steps': 0,
  'eval.rows': 0,
}


def command(model, data, run_dir, **changes):
  """The command line of a tiny run; `changes` by dotted key win."""
  keys = {
    **TINY,
    'model.path': model,
    'data.path': data,
    'run_dir': run_dir,
    **changes,
  }
  overrides = [f'--config.{key}={value}' for key, value in keys.items()]
  return ['main', '--config', str(CONFIG), *overrides]


def run(argv, capfd, verb=main.main):
  """(exit code, stdout, lines of stderr) of a call in this process."""
  capfd.readouterr()
  code = verb(argv)
  out, err = capfd.readouterr()
  return code, out, err.splitlines()


def check_fails(argv, code, words, capfd, verb=main.main):
  got, _, lines = run(argv, capfd, verb)
  assert got == code, lines
  assert len(lines) == 1, lines
  for word in words:
    assert str(word) in lines[0]
  assert 'Traceback' not in lines[0]
  return lines[0]


def metrics(run_dir):
  text = (run_dir / 'metrics.jsonl').read_text('utf-8')
  return [json.loads(line) for line in text.splitlines()]


def check_nothing_half_written(run_dir):
  """No adapter, no step without manifest, nothing that ends in .tmp."""
  assert not (run_dir / 'adapter').exists()
  for step in run_dir.glob('checkpoints/*'):
    assert (step / checkpoint.MANIFEST).exists()
  assert not list(run_dir.rglob('*.tmp*'))


# --- the command line itself

CONFIG_FILES = {
  'syntax.py': 'def get_config(:\n',
  'raises.py': 'def get_config():\n  raise ValueError("my own trouble")\n',
  'divides.py': 'def get_config():\n  return 1 / 0\n',
  'imports.py': 'import no_such_module\n',
  'returns_none.py': 'def get_config():\n  pass\n',
  'typo.py': """
from ml_collections import ConfigDict
from lorax_train.config import defaults
def get_config():
  cfg = ConfigDict(defaults())
  cfg.lora.rnk = 4
  return cfg
""",
}

# ('C' stands for --config configs/mistral_lora.py, '@' for the folder of the
# files above; the words that the line must hold)
COMMAND_LINES = {
  'no config': ([], ['--config=FILE is missing', 'mistral_lora.py']),
  'no file named': (['--config'], ['Missing value', '--config']),
  'no such file': (['--config', 'absent.py'], ['No such file', 'absent.py']),
  'no such file, and an override': (
    ['--config=absent.py', '--config.lora.rank=4'],
    ['No such file', 'absent.py'],
  ),
  'a directory': (['--config', '@'], ['Is a directory', '@']),
  'a syntax error': (['--config', '@syntax.py'], ['syntax.py, line 1']),
  'an error of the user': (
    ['--config', '@raises.py'],
    ['raises.py', 'ValueError: my own trouble'],
  ),
  'another error of the user': (['--config', '@divides.py'], ['ZeroDivision']),
  'an import that fails': (['--config', '@imports.py'], ['no_such_module']),
  'a config of None': (['--config', '@returns_none.py'], ['returns nothing']),
  'a typo in the file': (
    ['--config', '@typo.py'],
    ['lora.rnk is no key', 'did you mean lora.rank?', 'data.path is required'],
  ),
  'a typo in a key': (['C', '--config.lora.rnk=4'], ['rnk', '"rank"']),
  'a typo in a section': (['C', '--config.lra.rank=4'], ['lra', '"lora"']),
  'a typo in the flag': (['C', '--confg.lora.rank=4'], ['confg.lora.rank']),
  'a word for a number': (
    ['C', '--config.train.steps=many'],
    ['--config.train.steps=many', 'int'],
  ),
  'a fraction for an integer': (
    ['C', '--config.train.steps=1.5'],
    ['--config.train.steps=1.5', 'int'],
  ),
  'a value missing': (['C', '--config.train.steps'], ['config.train.steps']),
  'a value for a section': (['C', '--config.lora=4'], ['--config.lora=4']),
  'an unknown flag': (['C', '--wibble=1'], ['wibble']),
  'a flag of another program': (['C', '-x'], ['x']),
  'one of several, but of how many': (
    ['C', '--process=1'],
    ['--coordinator and --processes missing'],
  ),
  'a stray word': (['C', 'train'], ["'train' is no flag"]),
  'a stray word after a value': (
    ['C', '--config.lora.rank', '4', 'more'],
    ["'more' is no flag"],
  ),
  'overrides before the file': (
    ['--config.lora.rank=4', 'C'],
    ['--config.lora.rank=4', 'before'],
  ),
  'a flagfile that is not there': (['C', '--flagfile=/absent'], ['/absent']),
  'an unknown choice': (
    ['C', '--config.data.template=alpacka'],
    ['data.template', 'did you mean alpaca?', 'uno_reverse'],
  ),
  'not a number': (
    ['C', '--config.train.learning_rate=nan'],
    ['train.learning_rate is nan'],
  ),
  'a required key emptied': (['C', '--config.data.path='], ['data.path']),
  'no targets': (['C', '--config.lora.targets='], ['targets is empty']),
  'several at once': (
    ['C', '--config.lora.rank=0', '--config.model.dtype=half'],
    ['lora.rank is 0', "model.dtype is 'half'"],
  ),
}


@pytest.mark.parametrize('case', COMMAND_LINES)
def test_a_wrong_command_line(case, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  for name, text in CONFIG_FILES.items():
    (tmp_path / name).write_text(text)
  argv, words = COMMAND_LINES[case]
  expand = {'C': [f'--config={CONFIG}']}
  argv = [
    a.replace('@', f'{tmp_path}/')
    for one in argv
    for a in expand.get(one, [one])
  ]
  words = [w.replace('@', str(tmp_path)) for w in words]
  check_fails(['main', *argv], 2, words, capfd)
  # The train verb says the same.
  check_fails(['train', *argv], 2, words, capfd, verbs.cli)
  assert not (tmp_path / 'runs').exists()


def test_parsing_leaves_no_trace_in_flags_or_argv(monkeypatch):
  # ml_collections looks for overrides in sys.argv unless told otherwise.
  monkeypatch.setattr(sys, 'argv', ['pytest', '--config.lora.rank=99'])
  argv = ['main', '--config', str(CONFIG), '--config.lora.alpha=3']
  for _ in range(2):
    cfg = main.parse(argv)
    assert (cfg.lora.rank, cfg.lora.alpha) == (64, 3.0)
  assert argv[3] == '--config.lora.alpha=3'


def test_overrides_of_every_type():
  cfg = main.parse(
    command(
      'a model', 'rows.json', '~/run',
      **{
        'lora.targets': '.*(q|v)_proj', 'lora.alpha': 32, 'train.steps': 7,
        'train.learning_rate': '1e-5', 'lora.layers_to_transform': '',
      },
    )
  )  # fmt: skip
  assert cfg.model.path == 'a model'
  assert cfg.lora.targets == '.*(q|v)_proj'
  assert cfg.lora.alpha == 32.0
  assert cfg.train.learning_rate == 1e-5
  assert cfg.train.steps == 7
  assert cfg.run_dir == '~/run'


# --- verbs

VERB_ERRORS = {
  'no verb': ([], 2, ['VERB is missing', 'train', 'score']),
  'an unknown verb': (['trian'], 2, ["'trian' is no verb", 'train', 'score']),
  'a flag for a verb': (['--json'], 2, ["'--json' is no verb"]),
  'score without anything': (['score'], 2, ['score', '--model', '--tokens']),
  'an unknown flag': (
    ['score', '--model', 'm', '--tokens', 't', '--out', 'o', '--wibble'],
    2,
    ['score', '--wibble'],
  ),
  'a word for a number': (
    ['score', '--model', 'm', '--tokens', 't', '--out', 'o', '--batch-size=x'],
    2,
    ['--batch-size', "'x'"],
  ),
  'a batch of nothing': (
    ['score', '--model', 'm', '--tokens', 't', '--out', 'o', '--batch-size=0'],
    2,
    ['--batch-size 0'],
  ),
  'export without anything': (['export'], 2, ['ADAPTER', '--for', '--out']),
  'export for nobody': (
    ['export', 'a', '--for', 'nobody', '--out', 'o'],
    2,
    ["'nobody'", 'peft', 'vllm', 'llama.cpp'],
  ),
  'export of nothing': (
    ['export', './absent', '--for', 'vllm', '--out', './o'],
    4,
    ['absent/adapter_config.json', 'no such file'],
  ),
  'rows for no report': (
    ['merge', '--model', 'm', '--adapter', 'a', '--out', './o', '--rows=3'],
    2,
    ['--rows is for --report'],
  ),
  'tokens that are not there': (
    ['score', '--model', 'm', '--tokens', './absent.npz', '--out', 'o'],
    3,
    ['absent.npz', 'no such file'],
  ),
}


@pytest.mark.parametrize('case', VERB_ERRORS)
def test_a_wrong_verb(case, capfd):
  argv, code, words = VERB_ERRORS[case]
  check_fails(argv, code, words, capfd, verbs.cli)


def test_score_without_a_model_or_onto_a_full_path(tmp_path, capfd):
  tokens = tmp_path / 'in.npz'
  np.savez(tokens, ids=np.zeros((1, 4), np.int32))
  absent = tmp_path / 'absent'
  argv = ['score', '--tokens', str(tokens), '--out', str(tmp_path / 'o.npz')]
  words = [absent, 'no such directory']
  check_fails([*argv, '--model', str(absent)], 4, words, capfd, verbs.cli)
  model = toys.write_model(tmp_path / 'model')
  argv[-1] = str(tokens / 'o.npz')  # below a file
  words = ['input/output error', tokens]
  check_fails([*argv, '--model', str(model)], 74, words, capfd, verbs.cli)


@pytest.mark.parametrize('argv', [[], *([verb] for verb in verbs.VERBS)])
@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_of_every_verb(argv, flag, capfd):
  try:
    code = verbs.cli([*argv, flag])
  except SystemExit as stop:  # argparse's own way
    code = stop.code
  out, err = capfd.readouterr()
  assert (code, err) == (0, '')
  assert 'usage' in out
  for word in argv or verbs.VERBS:
    assert word == 'train' or word in out


def test_help_of_the_module(capfd):
  code, out, lines = run(['main', '--help'], capfd)
  assert (code, lines) == (0, [])
  assert '--config FILE' in out


# --- mistakes in what the configuration points to, before training begins


def shards(model, lost=()):
  """Cuts a model's one file into two shards with an index; `lost` goes."""
  whole = load_file(model / 'model.safetensors')
  (model / 'model.safetensors').unlink()
  names = sorted(whole)
  parts = {
    'model-00001-of-00002.safetensors': names[::2],
    'model-00002-of-00002.safetensors': names[1::2],
  }
  for file, held in parts.items():
    save_file({name: whole[name] for name in held}, model / file)
  index = {name: file for file, held in parts.items() for name in held}
  text = json.dumps({'metadata': {}, 'weight_map': index})
  (model / 'model.safetensors.index.json').write_text(text)
  for file in lost:
    (model / file).unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


def poison(model):
  tensors = load_file(model / 'model.safetensors')
  tensors['model.layers.1.self_attn.q_proj.weight'][3, 4] = np.nan
  save_file(tensors, model / 'model.safetensors')


def write_rows(path, rows):
  path.write_text(json.dumps(rows), 'utf-8')


# name: (what breaks it (model, rows), overrides, exit code, words). {model},
# {rows} and {tmp} stand for paths.
MISTAKES = {
  # configuration
  'a target that is not there': (
    None,
    {'lora.targets': 'q_porj,v_proj'},
    2,
    ["'q_porj' matched no module", 'q_proj, k_proj, v_proj', 'lm_head'],
  ),
  'a regex that matches nothing': (
    None,
    {'lora.targets': 'q_proj.*x'},
    2,
    ["'q_proj.*x'", 'there are: embed_tokens, q_proj'],
  ),
  'a layer that is not there': (
    None,
    {'lora.layers_to_transform': '0,7'},
    2,
    ['layer 7'],
  ),
  'a batch that the mesh cannot cut': (
    None,
    {'train.batch_size': 6},
    2,
    ['train.batch_size=6', 'multiple of 8'],
  ),
  'a mesh of another size': (
    None,
    {'mesh.tensor': 3},
    2,
    ['tensor=3', '8 device(s)', '-1'],
  ),
  'a mesh of no size': (None, {'mesh.data': 0}, 2, ['data=0', '8 device']),
  # data
  'no rows': (
    lambda model, rows: write_rows(rows, []),
    {},
    3,
    ['{rows}', 'no rows'],
  ),
  'another file': (None, {'data.path': '{tmp}/absent.json'}, 3, ['{tmp}/absent.json', 'no such file']),
  'a directory of rows': (None, {'data.path': '{tmp}'}, 3, ['{tmp}', 'a directory']),
  'other columns': (
    None,
    {'data.template': 'prompt_completion'},
    3,
    ["no column 'prompt'", 'first: {rows}: row 1', "'instruction'", 'skip'],
  ),
  'rows all too long': (
    None,
    {'data.max_length': 4, 'data.truncation': 'drop'},
    3,
    ['40', 'longer than 4 tokens'],
  ),
  'a token beyond the embedding': (
    lambda model, rows: write_rows(rows, [{'input_ids': [5, 260, 7]}] * 9),
    {'data.template': 'tokens'},
    3,
    ['id 260', "embedding's 260 rows", '{rows}: row 1'],
  ),
  'held-out rows that are not there': (
    None,
    {'data.eval_path': '{tmp}/held.json'},
    3,
    ['{tmp}/held.json', 'no such file'],
  ),
  # model
  'no such model': (
    None,
    {'model.path': '{tmp}/absent'},
    4,
    ['{tmp}/absent', 'no such directory', 'hub id'],
  ),
  'a file for a model': (
    None,
    {'model.path': '{rows}'},
    4,
    ['{rows}', 'is a file'],
  ),
  'a model without config.json': (
    lambda model, rows: (model / 'config.json').unlink(),
    {},
    4,
    ['{model}/config.json', 'no such file'],
  ),
  'a config.json that is cut off': (
    lambda model, rows: truncate(model / 'config.json'),
    {},
    4,
    ['{model}/config.json', 'not JSON'],
  ),
  'a shard that is missing': (
    lambda model, rows: shards(model, ['model-00002-of-00002.safetensors']),
    {},
    4,
    ['{model}', '1 of 2 shards missing', 'model-00002-of-00002.safetensors'],
  ),
  'safetensors that are cut off': (
    lambda model, rows: truncate(model / 'model.safetensors'),
    {},
    4,
    ['{model}/model.safetensors', 'download it again'],
  ),
  'no weights at all': (
    lambda model, rows: (model / 'model.safetensors').unlink(),
    {},
    4,
    ['{model}', 'no model.safetensors'],
  ),
  'weights that are no numbers': (
    lambda model, rows: poison(model),
    {},
    4,
    ['model.layers.1.self_attn.q_proj.weight', 'not finite'],
  ),
  'weights of another shape': (
    lambda model, rows: toys.write_model(model, intermediate_size=32)
    and (model / 'config.json').write_text(json.dumps(toys.CONFIG)),
    {},
    4,
    ['mlp.gate_proj.weight', '(32, 32)', '(48, 32)'],
  ),
  'no tokenizer': (
    lambda model, rows: (model / 'tokenizer.json').unlink(),
    {},
    4,
    ['{model}', 'tokenizer.json'],
  ),
  'an adapter to start from that is not there': (
    None,
    {'lora.init_from': '{tmp}/absent'},
    4,
    ['{tmp}/absent', 'no such file'],
  ),
  # run directory
  'a run_dir below a file': (
    None,
    {'run_dir': '{rows}/run'},
    74,
    ['{rows}/run', 'Not a directory', 'give another run_dir'],
  ),
  'a model for a run_dir': (
    None,
    {'run_dir': '{model}'},
    5,
    ['{model}', 'config.json', 'give another run_dir'],
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_before_training(
  case, tmp_path, rows_file, tiny_model, capfd
):
  breaks, changes, code, words = MISTAKES[case]
  places = {'model': tiny_model, 'rows': rows_file, 'tmp': tmp_path}
  if breaks:
    breaks(tiny_model, rows_file)
  changes = {
    key: value.format(**places) if isinstance(value, str) else value
    for key, value in changes.items()
  }
  run_dir = tmp_path / 'run'
  files = {p: p.read_bytes() for p in tiny_model.iterdir()}
  where = changes.pop('run_dir', run_dir)
  argv = command(tiny_model, rows_file, where, **changes)
  check_fails(argv, code, [w.format(**places) for w in words], capfd)
  check_nothing_half_written(run_dir)
  assert (
    files.items()
    <= {
      p: p.read_bytes() for p in tiny_model.iterdir() if p.name != 'LOCK'
    }.items()
  )
  # What is left does not stand in the way of a corrected command.
  corrected = main.parse(command('other/model', 'other.json', run_dir))
  mapping = main.config.to_mapping(corrected)
  rundir.check_same_run(run_dir, mapping, {'data': 'other rows'})


def test_a_locked_run_dir(tmp_path, rows_file, tiny_model, capfd):
  run_dir = tmp_path / 'run'
  with rundir.locked(run_dir):
    argv = command(tiny_model, rows_file, run_dir)
    words = [run_dir, f'pid {os.getpid()}', 'give another run_dir']
    check_fails(argv, 7, words, capfd)
  assert [path.name for path in run_dir.iterdir()] == ['LOCK']


# (mistake, its overrides and what breaks it are those of the table above)
@pytest.mark.parametrize(
  'case',
  ['a target that is not there', 'other columns', 'a shard that is missing'],
)
def test_the_corrected_command_works_in_the_same_run_dir(
  case, tmp_path, rows_file, tiny_model, capfd
):
  breaks, changes, code, _ = MISTAKES[case]
  run_dir, broken = tmp_path / 'run', tmp_path / 'broken'
  shutil.copytree(tiny_model, broken)
  if breaks:
    breaks(broken, rows_file)
  argv = command(broken, rows_file, run_dir, **changes)
  check_fails(argv, code, [], capfd)
  done, out, lines = run(command(tiny_model, rows_file, run_dir), capfd)
  assert (done, lines) == (0, [])
  assert 'adapter' in out.splitlines()[-1]
  assert (run_dir / 'adapter' / 'adapter_model.safetensors').exists()
  assert [line['step'] for line in metrics(run_dir)] == [1, 2]


def test_a_run_that_diverges(tmp_path, rows_file, tiny_model, capfd):
  changes = {
    'train.learning_rate': 1e38,
    'train.schedule': 'constant',
    'train.steps': 9,
    'train.log_every': 1,
    'train.clip_norm': 0.0,
  }
  run_dir = tmp_path / 'run'
  argv = command(tiny_model, rows_file, run_dir, **changes)
  words = ['step ', 'not finite', 'train.learning_rate']
  check_fails(argv, 6, words, capfd)
  check_nothing_half_written(run_dir)
  assert all(math.isfinite(line['loss']) for line in metrics(run_dir))


# --- a run that has begun


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(model, rows, run_dir) after two steps; to be copied, not changed."""
  folder = tmp_path_factory.mktemp('trained')
  model = toys.write_model(folder / 'model')
  rows = folder / 'rows.json'
  write_rows(
    rows,
    [{'instruction': f'Add {i}.', 'output': f'{i} it is'} for i in range(20)],
  )
  argv = command(model, rows, folder / 'run')
  assert main.main([*argv, '--config.train.schedule=constant']) == 0
  return model, rows, folder / 'run'


# (overrides, what happens to the run directory, exit code, words)
RESUMES = {
  'another rank': (
    {'lora.rank': 4},
    None,
    5,
    ['lora.rank was 2, is 4', 'give another run_dir'],
  ),
  'other targets and another seed': (
    {'lora.targets': 'q_proj', 'train.seed': 1},
    None,
    5,
    ["lora.targets was 'q_proj,v_proj', is 'q_proj'", 'train.seed was 0, is 1'],
  ),
  'fewer steps than there are': (
    {'train.steps': 1},
    None,
    2,
    ['train.steps=1', 'is at step 2'],
  ),
  'a damaged config.json': (
    {},
    lambda run: (run / 'config.json').write_text('{'),
    5,
    ['config.json', 'damaged', 'give another run_dir'],
  ),
  'no good checkpoint': (
    {'train.steps': 3},
    lambda run: truncate(run / 'checkpoints' / '2' / 'state' / '_METADATA'),
    5,
    ['no valid checkpoint left', 'give another run_dir'],
  ),
}


@pytest.mark.parametrize('case', RESUMES)
def test_a_resume_that_is_refused(case, trained, tmp_path, capfd):
  changes, damage, code, words = RESUMES[case]
  model, rows, run_dir = trained
  copy = tmp_path / 'run'
  shutil.copytree(run_dir, copy)
  if damage:
    damage(copy)
  argv = command(model, rows, copy, **{'train.schedule': 'constant', **changes})
  check_fails(argv, code, [*words, copy], capfd)
  # The adapter of the finished run is not lost over it.
  for name in ('adapter_model.safetensors', 'adapter_config.json'):
    before = (run_dir / 'adapter' / name).read_bytes()
    assert (copy / 'adapter' / name).read_bytes() == before


def test_other_rows_are_refused(trained, tmp_path, capfd):
  model, rows, run_dir = trained
  copy = tmp_path / 'run'
  shutil.copytree(run_dir, copy)
  other = tmp_path / 'rows.json'
  write_rows(other, json.loads(rows.read_text())[1:])
  kept = rows.read_bytes()
  try:
    rows.write_bytes(other.read_bytes())
    argv = command(model, rows, copy, **{'train.schedule': 'constant'})
    check_fails(argv, 5, [copy, 'rows of data.path'], capfd)
  finally:
    rows.write_bytes(kept)


def test_a_finished_run_is_done_again_at_once(trained, capfd):
  model, rows, run_dir = trained
  files = {p: p.stat().st_mtime_ns for p in run_dir.rglob('*/*')}
  argv = command(model, rows, run_dir, **{'train.schedule': 'constant'})
  code, out, lines = run(argv, capfd)
  assert (code, lines) == (0, [])
  assert 'already done: 2 steps' in out.splitlines()
  assert {p: p.stat().st_mtime_ns for p in run_dir.rglob('*/*')} == files


def test_what_a_finished_run_leaves(trained):
  model, _, run_dir = trained
  assert {p.name for p in run_dir.iterdir()} == {
    'LOCK', 'config.json', 'run.json', 'metrics.jsonl', 'checkpoints', 'adapter',
    'plots', 'tensorboard',
  }  # fmt: skip
  assert {p.name for p in (run_dir / 'adapter').iterdir()} == {
    'README.md', 'adapter_config.json', 'adapter_model.safetensors',
    'tokenizer.json', 'tokenizer_config.json',
  }  # fmt: skip
  saved = json.loads((run_dir / 'config.json').read_text())
  assert saved['lora']['rank'] == 2
  assert saved['model']['path'] == str(model)
  # The card is meant for the hub: it names no path of this machine.
  assert str(model) not in (run_dir / 'adapter' / 'README.md').read_text()


# --- what reports errors


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (errors.ConfigError('a\n  b'), 2, 'a b'),
    (errors.DataError(), 3, 'DataError'),
    (errors.ModelError(ValueError('inner')), 4, 'inner'),
    (errors.ResumeError('c'), 5, 'c'),
    (errors.StoppedError('d'), 75, 'd'),
    (errors.DataError('é \x1b[2J\u202e\udcff'), 3, 'é \\x1b[2J\\u202e\\udcff'),
    (OSError(28, 'No space left'), 74, 'input/output error: [Errno 28] No space left'),
    (FileNotFoundError(2, 'No such file', 'x'), 74, "input/output error: [Errno 2] No such file: 'x'"),
  ],
)  # fmt: skip
def test_a_report_is_one_line(error, code, line, capfd):
  assert errors.report(error) == code
  assert capfd.readouterr().err == line + '\n'


def test_an_interrupt_is_reported_without_traceback(monkeypatch, capfd):
  def interrupt(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(main, 'parse', interrupt)
  check_fails(['main'], 130, ['interrupted', 'run the same command'], capfd)


# --- real processes


def process(argv, tmp_path, **environment):
  """A finished process of one CPU device, as a user would start it."""
  dropped = ('HF_', 'JAX_', 'XLA_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
  env |= {
    'JAX_PLATFORMS': 'cpu',
    'HF_HOME': str(tmp_path / 'hf'),
    **environment,
  }
  return subprocess.run(
    [sys.executable, '-m', *argv],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=100,
    check=False,
  )


def test_a_process_trains(tmp_path, rows_file, tiny_model):
  run_dir = tmp_path / 'run'
  argv = command(
    tiny_model, rows_file, run_dir, **{'train.batch_size': 3, 'eval.rows': 4}
  )
  done = process(['lorax_train.main', *argv[1:]], tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  banner = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:8])
  # 3 layers; q 32 -> 40, v 32 -> 20: rank x (in + out) each
  count = 3 * 2 * (32 + 40 + 32 + 20)
  assert banner['trainable'].startswith(f'{count:,} of 42,208 ')
  assert banner['targets'] == 'q_proj x 3 (r 2), v_proj x 3 (r 2)'
  assert banner['devices'].startswith('1 cpu')
  assert 'held-out loss' in done.stdout
  # 2 factors x 2 modules x 3 layers
  weights = load_file(run_dir / 'adapter' / 'adapter_model.safetensors')
  assert len(weights) == 12
  assert all(np.isfinite(w).all() for w in weights.values())
  assert any(w.any() for n, w in weights.items() if 'lora_B' in n)


def test_a_reader_that_has_had_enough(tiny_model, tmp_path):
  done = subprocess.Popen(
    [sys.executable, '-m', 'lorax_train', 'inspect', str(tiny_model)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  done.stdout.close()
  error = done.stderr.read()
  done.stderr.close()
  assert (done.wait(timeout=60), error) == (74, '')


@pytest.mark.parametrize('closed', ['>&-', '2>&-'])
def test_a_stream_that_is_closed(closed, tiny_model, tmp_path):
  data = tmp_path / 'rows.jsonl'
  data.write_text('{"text": "a"}\n')
  verb = [sys.executable, '-m', 'lorax_train', 'data', '--json', '--rows', '0']
  of = ['--model', tiny_model, '--data', data, '--template', 'text']
  # The cache can't be written to, and that is told on stderr.
  done = subprocess.run(
    ['sh', '-c', f'exec "$@" {closed}', 'sh', *verb, *of],
    capture_output=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': data},
    check=False,
  )
  assert done.returncode == 0
  if closed == '>&-':
    assert done.stderr.startswith(b'tokenised rows are not kept: ')
    assert done.stderr.count(b'\n') == 1
  else:
    assert json.loads(done.stdout)['rows']['read'] == 1


def test_a_process_fails_in_one_line(tmp_path):
  argv = ['--config', str(CONFIG), '--config.lora.rnk=4']
  done = process(['lorax_train', 'train', *argv], tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.splitlines() == [
    'command line: \'rnk\' Did you mean "rank" instead of "rnk"?'
  ]


def test_the_reference_run_without_the_hub(tmp_path):
  run_dir = f'--config.run_dir={tmp_path / "run"}'
  argv = ['lorax_train.main', '--config', 'configs/mistral_lora.py', run_dir]
  done = process(argv, tmp_path, HF_HUB_OFFLINE='1')
  assert (done.returncode, done.stdout) == (4, '')
  (line,) = done.stderr.splitlines()
  for word in [
    'mistralai/Mistral-7B-v0.1',
    '--config.model.path',
    '--config.data.path',
  ]:
    assert word in line
