"""The run directory: one writer at a time, and one configuration for good.

Reference: a real second process for the lock; for the configuration a table
that says of each key whether a started run may be continued with another
value.
"""

import json
import shutil
import subprocess
import sys

import pytest

from lorax_train import config
from lorax_train.errors import ConfigError, LockedError, ResumeError
from lorax_train.train import rundir

HOLDER = """
import pathlib, sys
from lorax_train.train import rundir
with rundir.locked(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


def mapping(**changes):
  out = config.defaults()
  out['model']['path'], out['data']['path'] = 'some/model', 'rows.json'
  for key, value in changes.items():
    section, _, name = key.rpartition('.')
    (out[section] if section else out)[name] = value
  return out


@pytest.fixture
def begun(tmp_path):
  """The directory of a run that has a checkpoint."""
  rundir.write_config(tmp_path, mapping(), {'data': 'rows-1'})
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  return tmp_path


# --- the lock


def test_a_second_process_is_kept_out_until_the_first_dies(tmp_path):
  run_dir = tmp_path / 'deep' / 'run'
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(run_dir)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(LockedError) as error, rundir.locked(run_dir):
      raise AssertionError('two writers')
    text = str(error.value)
    assert error.value.exit_code == 7
    assert str(run_dir) in text
    assert f'pid {holder.pid}' in text
    assert 'give another run_dir' in text
    assert '\n' not in text
    # The failed attempt has not taken the name out of the lock.
    assert (run_dir / 'LOCK').read_text() == f'pid {holder.pid}\n'
  finally:
    holder.kill()  # SIGKILL: nothing is tidied up
    holder.communicate()
  with rundir.locked(run_dir):
    assert (run_dir / 'LOCK').read_text() != f'pid {holder.pid}\n'


@pytest.mark.parametrize('shared', [True, False])
def test_a_directory_that_a_process_does_not_share(
  shared, tmp_path, monkeypatch
):
  """Process 0 has left a file in its own; this is another process."""
  monkeypatch.setattr(rundir, 'several', lambda: True)
  monkeypatch.setattr(rundir, 'first', lambda: False)
  monkeypatch.setattr(rundir, 'of_first', lambda own: '.seen-1')
  monkeypatch.setattr(rundir, '_SEEN_WITHIN_S', 0.1)
  if shared:
    (tmp_path / '.seen-1').touch()
    with rundir.held(tmp_path):
      # The lock is process 0's.
      assert [path.name for path in tmp_path.iterdir()] == ['.seen-1']
  else:
    with (
      pytest.raises(ConfigError, match='on a file system that all hosts share'),
      rundir.held(tmp_path),
    ):
      raise AssertionError('no two directories are one')


def test_alone_a_directory_is_locked_and_nothing_else(tmp_path):
  with rundir.held(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ['LOCK']
    with pytest.raises(LockedError), rundir.held(tmp_path):
      raise AssertionError('two writers')


def test_the_lock_is_free_after_an_error(tmp_path):
  for _ in range(2):
    with pytest.raises(ZeroDivisionError), rundir.locked(tmp_path):
      raise ZeroDivisionError


def test_two_directories_have_two_locks(tmp_path):
  with rundir.locked(tmp_path / 'a'), rundir.locked(tmp_path / 'b'):
    assert (tmp_path / 'a' / 'LOCK').exists()
    assert (tmp_path / 'b' / 'LOCK').exists()


@pytest.mark.parametrize('below', ['file', 'file/run', 'file/a/run'])
def test_a_path_that_is_a_file_is_an_io_error(tmp_path, below):
  (tmp_path / 'file').write_text('mine')
  with (
    pytest.raises(OSError, match='give another') as error,
    rundir.locked(tmp_path / below),
  ):
    raise AssertionError('there is no directory')
  assert str(tmp_path / below) in str(error.value)
  assert (tmp_path / 'file').read_text() == 'mine'


# --- the same run

# (key, another value, whether a begun run may go on with it)
CHANGES = [
  ('checkpoint.every', 7, True),
  ('checkpoint.keep', 7, True),
  ('eval.every', 7, True),
  ('train.log_every', 7, True),
  ('mesh.data', 2, True),
  ('mesh.fsdp', 2, True),
  ('mesh.tensor', 2, True),
  ('run_dir', 'moved', True),
  ('model.remat', 'none', True),
  ('train.loss_chunk', 64, True),
  ('model.attention', 'xla', True),
  ('eval.samples', 7, True),
  # eval.rows are taken out of the rows that are trained on.
  ('eval.rows', 7, False),
  ('model.path', 'other/model', False),
  ('method', 'full', False),
  ('model.init', 'random', False),
  ('model.dtype', 'float32', False),
  ('model.param_dtype', 'float32', False),
  ('method', 'mezo', False),
  ('mezo.weights', 'all', False),
  ('mezo.epsilon', 1e-3, False),
  ('mezo.probes', 2, False),
  ('lora.rank', 4, False),
  ('model.quant', 'nf4', False),
  ('lora.alpha', 8.0, False),
  ('lora.targets', 'all-linear', False),
  ('lora.dropout', 0.1, False),
  ('lora.variant', 'rslora', False),
  ('lora.init', 'pissa', False),
  ('lora.init_from', 'adapter', False),
  ('lora.rank_pattern', 'q_proj=4', False),
  ('data.path', 'other.json', False),
  ('data.mixture', ({'path': 'a.json', 'weight': 0.5, 'template': ''},), False),
  ('data.buckets', '32,64', False),
  ('data.rows', 7, False),
  ('data.eval_path', 'held.json', False),
  ('data.separator', '\n\n', False),
  ('data.template', 'text', False),
  ('data.max_length', 64, False),
  ('data.truncation', 'left', False),
  ('data.on_bad_row', 'skip', False),
  ('data.packing', True, False),
  ('data.cache', False, True),
  ('train.loss', 'tokens', False),
  ('train.batch_size', 16, False),
  ('train.grad_accum', 2, False),
  ('train.optimizer', 'lion', False),
  ('train.momentum', 0.5, False),
  ('train.learning_rate', 1e-5, False),
  ('train.lora_plus_ratio', 4.0, False),
  ('train.neftune_alpha', 5.0, False),
  ('train.schedule', 'linear', False),
  ('train.warmup_steps', 7, False),
  ('train.weight_decay', 0.1, False),
  ('train.beta1', 0.5, False),
  ('train.beta2', 0.5, False),
  ('train.epsilon', 1e-6, False),
  ('train.clip_norm', 0.5, False),
  ('train.seed', 7, False),
  # The default schedule is a cosine down to the last step.
  ('train.steps', 2000, False),
]


@pytest.mark.parametrize(('key', 'value', 'free'), CHANGES)
def test_which_keys_may_change(begun, key, value, free):
  before = rundir.flat(mapping())[key]
  assert before != value
  if free:
    rundir.check_same_run(begun, mapping(**{key: value}), {'data': 'rows-1'})
    return
  with pytest.raises(ResumeError) as error:
    rundir.check_same_run(begun, mapping(**{key: value}), {'data': 'rows-1'})
  text = str(error.value)
  assert f'{key} was {before!r}, is {value!r}' in text
  assert str(begun) in text
  assert 'give another run_dir' in text
  assert error.value.exit_code == 5


def test_a_key_that_is_younger_than_the_run_has_its_default(begun):
  path = begun / 'config.json'
  before = json.loads(path.read_text())
  del before['lora']['modules_to_save'], before['model']['untie']
  path.write_text(json.dumps(before))
  rundir.check_same_run(begun, mapping(), {'data': 'rows-1'})
  now = mapping(**{'lora.modules_to_save': 'norm'})
  with pytest.raises(ResumeError, match="modules_to_save was '', is 'norm'"):
    rundir.check_same_run(begun, now, {'data': 'rows-1'})


def test_every_key_stands_in_the_table():
  keys = {key for key, _, _ in CHANGES}
  # Of two there is but one value so far; the others are as rank_pattern is.
  rest = {
    'lora.exclude', 'lora.alpha_pattern',
    'lora.layers_to_transform', 'lora.modules_to_save',
    'lora.trainable_token_indices', 'model.untie',
  }  # fmt: skip
  assert keys | rest == set(rundir.flat(mapping()))


@pytest.mark.parametrize(
  ('before', 'after', 'free'),
  [
    ('constant', 'constant', True),
    ('linear', 'linear', False),
    ('cosine', 'cosine', False),
  ],
)
def test_more_steps_only_under_a_constant_schedule(
  tmp_path, before, after, free
):
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  first = mapping(**{'train.schedule': before, 'train.steps': 10})
  second = mapping(**{'train.schedule': after, 'train.steps': 20})
  rundir.write_config(tmp_path, first, {'data': 'rows-1'})
  if free:
    rundir.check_same_run(tmp_path, second, {'data': 'rows-1'})
  else:
    with pytest.raises(ResumeError, match=r'train\.steps was 10, is 20'):
      rundir.check_same_run(tmp_path, second, {'data': 'rows-1'})


def test_a_schedule_may_not_become_constant_on_the_way(begun):
  after = mapping(**{'train.schedule': 'constant', 'train.steps': 2000})
  with pytest.raises(ResumeError, match="schedule was 'cosine', is 'constant'"):
    rundir.check_same_run(begun, after, {'data': 'rows-1'})


def test_all_changes_stand_in_one_line(begun):
  after = mapping(**{'lora.rank': 4, 'train.seed': 1, 'eval.every': 3})
  with pytest.raises(ResumeError) as error:
    rundir.check_same_run(begun, after, {'data': 'rows-2'})
  text = str(error.value)
  assert 'lora.rank was 8, is 4; train.seed was 0, is 1' in text
  assert 'eval.every' not in text
  assert '\n' not in text


@pytest.mark.parametrize('name', ['data', 'weights'])
def test_other_inputs_under_the_same_name_are_refused(begun, name):
  inputs = {'data': 'rows-1', 'weights': 'base-1'}
  rundir.write_config(begun, mapping(), inputs)
  rundir.check_same_run(begun, mapping(), inputs)
  with pytest.raises(
    ResumeError, match=f'{name[:3]}.*are not those it was started with'
  ):
    rundir.check_same_run(begun, mapping(), {**inputs, name: 'another'})


def test_a_key_that_is_no_more_is_a_change(begun):
  old = mapping()
  old['train']['nesterov'] = 0.5
  rundir.write_config(begun, old, {'data': 'rows-1'})
  with pytest.raises(ResumeError) as error:
    rundir.check_same_run(begun, mapping(), {'data': 'rows-1'})
  assert 'train.nesterov was 0.5, is None' in str(error.value)


def test_an_empty_directory_is_a_new_run(tmp_path):
  rundir.check_same_run(tmp_path, mapping(), {'data': 'rows-1'})
  rundir.check_same_run(tmp_path / 'absent', mapping(), {'data': 'rows-1'})
  assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_may_be_corrected(tmp_path):
  rundir.write_config(tmp_path, mapping(), {'data': 'rows-1'})
  corrected = mapping(**{'lora.rank': 4})
  rundir.check_same_run(tmp_path, corrected, {'data': 'rows-2'})
  (tmp_path / 'adapter').mkdir()
  with pytest.raises(ResumeError, match=r'lora\.rank was 8, is 4'):
    rundir.check_same_run(tmp_path, corrected, {'data': 'rows-2'})


DAMAGE = {
  'config.json is cut off': (rundir.CONFIG, '{"lora": '),
  'config.json is empty': (rundir.CONFIG, ''),
  'config.json is a list': (rundir.CONFIG, '[]'),
  'config.json is gone': (rundir.CONFIG, None),
  'run.json is cut off': (rundir.RUN, '{"inputs": {"data": "rows-'),
  'run.json lacks the rows': (rundir.RUN, '{}'),
  'run.json is a list': (rundir.RUN, '[]'),
  'run.json is gone': (rundir.RUN, None),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_a_damaged_directory_is_refused(begun, case):
  name, text = DAMAGE[case]
  if text is None:
    (begun / name).unlink()
  else:
    (begun / name).write_text(text)
  with pytest.raises(ResumeError) as error:
    rundir.check_same_run(begun, mapping(), {'data': 'rows-1'})
  assert f'run_dir {begun}' in str(error.value)
  assert 'damaged' in str(error.value)
  assert 'give another run_dir' in str(error.value)


def test_a_directory_of_something_else_is_refused(tmp_path):
  # A model's directory given as run_dir: its config.json must survive.
  (tmp_path / rundir.CONFIG).write_text('{"model_type": "mistral"}')
  with pytest.raises(ResumeError, match='not of a run'):
    rundir.check_same_run(tmp_path, mapping(), {'data': 'rows-1'})


def test_what_is_written_reads_back_and_names_its_versions(tmp_path):
  given = mapping(**{'train.learning_rate': 1 / 3, 'train.epsilon': 1e-30})
  rundir.write_config(tmp_path, given, {'data': 'rows-1'})
  written = json.loads((tmp_path / rundir.CONFIG).read_text())
  assert rundir.flat(written) == rundir.flat(given)
  ran = json.loads((tmp_path / rundir.RUN).read_text())
  assert ran['inputs'] == {'data': 'rows-1'}
  assert {'lorax-train', 'jax', 'flax', 'optax'} <= set(ran['versions'])
  assert all(version[0].isdigit() for version in ran['versions'].values())
  # A copied directory is a run of its own.
  shutil.copytree(tmp_path, tmp_path / 'copy')
  rundir.check_same_run(tmp_path / 'copy', given, {'data': 'rows-1'})
