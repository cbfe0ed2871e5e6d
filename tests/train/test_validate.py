"""The verb `validate`: every check fails on what is made for it, and alone.

Reference: for what stops a run, the exit code and words of `train` on the same
mistake (the table in test_main); for silent errors in rows, rows of a byte a
token, written out here (BOS 256, EOS 257, padding 259).
"""

import json

import pytest
from tokenizers import pre_tokenizers

from lorax_train import __main__ as verbs
from lorax_train.train import rundir
from tests import toys
from tests.test_main import MISTAKES, command

BOS, EOS, PAD = 256, 257, 259
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # as toys has them
SOUND = [[BOS, 65 + n, 70, EOS] for n in range(20)]


@pytest.fixture
def checked(tmp_path, tiny_model, capfd):
  """(rows, changes) -> exit code and the checks of rows of token ids."""

  def run(rows, **changes):
    data = tmp_path / 'ids.jsonl'
    fields = [{'input_ids': r} if isinstance(r, list) else r for r in rows]
    data.write_text(''.join(json.dumps(f) + '\n' for f in fields), 'utf-8')
    changes = {'data.template': 'tokens', **changes}
    return validate(command(tiny_model, data, tmp_path / 'run', **changes), capfd)  # fmt: skip

  return run


def validate(argv, capfd):
  """(exit code, {name: [(status, message)]}) of the verb."""
  capfd.readouterr()
  code = verbs.cli(['validate', *argv[1:], '--json'])
  out, err = capfd.readouterr()
  assert not err
  report = json.loads(out)
  assert report['exit_code'] == code
  checks = {}
  for check in report['checks']:
    assert (check['code'] != 0) == (check['status'] == 'FAIL')
    checks.setdefault(check['name'], []).append(
      (check['status'], check['message'])
    )
  return code, checks


def not_ok(checks):
  return {
    (name, status): message
    for name, found in checks.items()
    for status, message in found
    if status != 'ok'
  }


def test_sound_rows_pass_every_check(checked, tmp_path):
  code, checks = checked(SOUND)
  assert code == 0
  assert not not_ok(checks)
  assert [*checks] == [
    'model',
    'lora',
    'weights',
    'tokenizer',
    'rows',
    'ids',
    'EOS',
    'BOS',
    'labels',
    'padding',
    'spelling',
    'duplicates',
    'leaks',
    'run_dir',
  ]
  assert not (tmp_path / 'run').exists()


# what: (rows put before 20 sound ones, exit code, check, status, words)
SILENT = {
  'no EOS': (
    [[BOS, 65, 66]],
    3,
    'EOS',
    'FAIL',
    ['1 of 21 rows (4.76%)', 'ids.jsonl:1', '(257)', 'not learn to stop'],
  ),
  'EOS that is masked': (
    [{'input_ids': [BOS, 65, EOS], 'labels': [BOS, 65, -100]}],
    3,
    'EOS',
    'FAIL',
    ['ids.jsonl:1', '1 of them have it, but masked'],
  ),
  'BOS twice': (
    [[BOS, BOS, 65, EOS]],
    3,
    'BOS',
    'FAIL',
    ['twice', '1 of 21 rows', 'ids.jsonl:1'],
  ),
  'BOS within': (
    [[BOS, 65, BOS, EOS]],
    0,
    'BOS',
    'warn',
    ['within a row', 'ids.jsonl:1', 'chat format'],
  ),
  'labels that are shifted': (
    [{'input_ids': [BOS, 65, 66, EOS], 'labels': [65, 66, EOS, -100]}],
    3,
    'labels',
    'FAIL',
    ['shifted by one', 'ids.jsonl:1', 'shifts them itself'],
  ),
  'other labels': (
    [{'input_ids': [BOS, 65, 66, 66, EOS], 'labels': [-100, 9, 66, 66, EOS]}],
    0,
    'labels',
    'warn',
    ['not the ids of their places', 'ids.jsonl:1'],
  ),
  'padding that is learned': (
    [[BOS, 65, EOS, EOS]],
    3,
    'padding',
    'FAIL',
    ['learned', 'ids.jsonl:1'],
  ),
  'padding': (
    [
      {
        'input_ids': [BOS, 65, EOS, PAD, PAD],
        'labels': [-100, 65, EOS, -100, -100],
      }
    ],
    0,
    'padding',
    'warn',
    ['among the ids', 'ids.jsonl:1'],
  ),
  'ids past the embedding': (
    [[BOS, 65, 300, EOS]],
    3,
    'ids',
    'FAIL',
    ['260 rows', 'ids.jsonl:1 (id 300)'],
  ),
  'labels that are all masked': (
    [{'input_ids': [BOS, 65, EOS], 'labels': [-100] * 3}] * 2,
    0,
    'rows',
    'warn',
    ['2 nothing to learn, first', 'ids.jsonl:1', '20 of 22 rows kept'],
  ),
  'rows that are too long': (
    [[BOS, *[65] * 100, EOS]] * 2,
    0,
    'rows',
    'warn',
    ['2 longer than 64 tokens', 'data.max_length'],
  ),
  'a row that is there twice': (
    [SOUND[4]],
    0,
    'duplicates',
    'warn',
    ['1 of 21 rows', 'ids.jsonl:6 as', 'ids.jsonl:1'],
  ),
  'a special token that is spelled': (
    [[BOS, *map(LETTERS.index, '<|im_end|>'), EOS]],
    0,
    'spelling',
    'warn',
    ['<|im_end|>', 'ids.jsonl:1'],
  ),
}


@pytest.mark.parametrize('case', SILENT)
def test_a_silent_error_in_rows(case, checked):
  rows, code, name, status, words = SILENT[case]
  changes = {'data.truncation': 'drop'}
  got, checks = checked([*rows, *SOUND], **changes)
  assert got == code
  found = not_ok(checks)
  for word in words:
    assert word in found[name, status]
  # Rows whose labels lack EOS in its place have that failure besides.
  assert {*found} - {(name, status)} <= {('EOS', 'FAIL')}
  assert ('EOS', 'FAIL') not in found or code == 3


def test_what_is_many_is_told_with_few_places(checked):
  code, checks = checked([row[:-1] for row in SOUND])
  assert code == 3
  ((_, told),) = checks['EOS']
  assert '20 of 20 rows (100.00%)' in told
  assert told.count('ids.jsonl:') == 5
  assert ', ...;' in told


def test_everything_that_is_wrong_is_told_at_once(checked, tiny_model):
  (tiny_model / 'model.safetensors').write_bytes(b'')
  code, checks = checked(
    [
      [BOS, BOS, 65, 300],
      *SOUND,
      {'input_ids': [BOS, 'x']},
      [BOS, *[65] * 100, EOS],
    ],
    **{'lora.targets': 'q_prj', 'data.truncation': 'error'},
  )
  failed = [name for name, status in not_ok(checks) if status == 'FAIL']
  assert failed == ['lora', 'weights', 'rows', 'ids', 'EOS', 'BOS']
  assert code == 2  # of the first
  ((_, rows),) = checks['rows']
  assert 'ids.jsonl:22' in rows


def test_without_a_model_the_rest_is_skipped(checked, tiny_model):
  code, checks = checked(SOUND, **{'model.path': './absent'})
  assert code == 4
  assert {name: found[0][0] for name, found in checks.items()} == {
    'model': 'FAIL',
    'weights': 'skipped',
    'lora': 'skipped',
    'tokenizer': 'skipped',
    'rows': 'skipped',
    'run_dir': 'ok',
  }


def test_ids_need_no_tokenizer(checked, tiny_model):
  (tiny_model / 'tokenizer.json').unlink()
  code, checks = checked(SOUND)
  assert code == 0
  assert {*not_ok(checks)} == {('tokenizer', 'warn'), ('spelling', 'skipped')}
  code, checks = checked([[BOS, BOS, 65]])
  assert code == 3
  assert {('EOS', 'FAIL'), ('BOS', 'FAIL')} <= {*not_ok(checks)}


def test_a_row_may_end_where_the_model_stops(checked, tiny_model):
  rows = [[BOS, 65, 66]]
  (tiny_model / 'generation_config.json').write_text('{"eos_token_id": [66]}')
  code, checks = checked([*rows, *SOUND])
  assert code == 0
  assert not not_ok(checks)


def test_rows_cut_at_the_end_are_told_of_once(checked):
  long = [BOS, 65, 66, 67, EOS]
  options = {'data.max_length': 4, 'data.truncation': 'right'}
  code, checks = checked([*SOUND, long], **options)
  assert (code, not_ok(checks)) == (0, {})
  assert '1 cut at the end, where no EOS is learned' in checks['rows'][0][1]
  ((_, told),) = checks['EOS']
  assert told == 'learned at the end of all 20 rows whose end was not cut'
  # One that is short, and has none of its own.
  code, checks = checked([*SOUND, long, [BOS, 65, 66]], **options)
  assert code == 3
  ((kind, told),) = not_ok(checks).items()
  assert kind == ('EOS', 'FAIL') and '1 of 22 rows' in told


def test_a_model_without_eos_leaves_ends_alone(checked, tiny_model):
  (tiny_model / 'tokenizer.json').unlink()
  path = tiny_model / 'config.json'
  path.write_text(json.dumps({**toys.CONFIG, 'eos_token_id': None}))
  code, checks = checked(SOUND)
  assert code == 0
  ((status, told),) = checks['EOS']
  assert (status, told.split(' EOS')[0]) == ('skipped', 'the model names no')


def test_padding_with_eos_is_told_to_be_fine(checked, tiny_model):
  path = tiny_model / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps({**config, 'pad_token': '</s>'}))
  code, checks = checked(SOUND)
  assert code == 0
  ((status, told),) = checks['tokenizer']
  assert status == 'ok'
  assert 'padding with EOS is fine here' in told


def test_a_tokenizer_that_is_too_large_and_rows_all_the_same(
  tmp_path, capfd, rows_file
):
  model = toys.write_model(tmp_path / 'm', vocab_size=256, bos_token_id=1, eos_token_id=2)  # fmt: skip
  argv = command(model, rows_file, tmp_path / 'run')
  code, checks = validate(argv, capfd)
  assert code == 4
  assert {*not_ok(checks)} >= {('tokenizer', 'FAIL'), ('ids', 'FAIL')}
  assert '4 ids have no row' in checks['tokenizer'][0][1]


def test_held_out_rows_that_are_trained_on(checked, tmp_path):
  other = tmp_path / 'other.jsonl'
  rows = [SOUND[3], [BOS, 99, EOS], [BOS, 99]]
  other.write_text(''.join(json.dumps({'input_ids': r}) + '\n' for r in rows))
  code, checks = checked(SOUND, **{'data.eval_path': other})
  assert code == 3
  found = not_ok(checks)
  assert '1 of 3 rows held out are trained on' in found['leaks', 'warn']
  assert 'other.jsonl:1 as' in found['leaks', 'warn']
  assert '1 of 23 rows' in found['EOS', 'FAIL']
  assert 'other.jsonl:3' in found['EOS', 'FAIL']


@pytest.mark.parametrize(
  'changes, key',
  [
    ({'data.path': 'none.jsonl'}, 'path'),
    ({'data.eval_path': 'none.jsonl'}, 'eval_path'),
    ({'data.path': '', 'data.mixture': "({'path': 'none.jsonl'},)"}, 'mixture'),
  ],
)
def test_the_key_that_names_no_file_is_told(checked, changes, key):
  code, checks = checked(SOUND, **changes)
  told = f'none.jsonl: no such file; check --config.data.{key}'
  assert code == 3 and not_ok(checks)['rows', 'FAIL'] == told


# What only weights or devices can tell.
NOT_SEEN = {
  'weights that are no numbers',
  'a batch that the mesh cannot cut',
  'a mesh of another size',
  'a mesh of no size',
}


@pytest.mark.parametrize('case', MISTAKES)
def test_what_train_refuses_is_refused_in_its_words(
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
  where = changes.pop('run_dir', tmp_path / 'run')
  before = sorted(tmp_path.rglob('*'))
  argv = command(tiny_model, rows_file, where, **changes)
  capfd.readouterr()
  got = verbs.cli(['validate', *argv[1:]])
  out, err = capfd.readouterr()
  assert sorted(tmp_path.rglob('*')) == before
  if case in NOT_SEEN:
    assert got == 0, out + err
    return
  assert got == code, out + err
  lines = [line for line in out.splitlines() if line.startswith('FAIL')]
  lines = lines or err.splitlines()  # a configuration fails before all checks
  words = [word.format(**places) for word in words]
  assert any(all(word in line for word in words) for line in lines)


def test_a_run_dir_in_use_or_of_another_run(
  checked, tmp_path, tiny_model, rows_file, capfd
):
  with rundir.locked(tmp_path / 'run'):
    code, checks = checked(SOUND)
  assert code == 7
  assert 'in use by pid' in not_ok(checks)['run_dir', 'FAIL']
  argv = command(tiny_model, rows_file, tmp_path / 'run')
  from lorax_train import main

  assert main.main(argv) == 0
  code, checks = validate(argv, capfd)
  assert code == 0
  assert 'goes on from step 2' in checks['run_dir'][0][1]
  code, checks = validate([*argv, '--config.lora.alpha=3.0'], capfd)
  assert code == 5
  told = not_ok(checks)['run_dir', 'FAIL']
  assert 'lora.alpha was' in told
  rows_file.write_text(rows_file.read_text('utf-8').replace('Say', 'Tell'))
  code, checks = validate(argv, capfd)
  assert code == 5
  assert 'data.mixture are not those' in not_ok(checks)['run_dir', 'FAIL']


def test_the_lines_of_a_terminal(checked, tmp_path, tiny_model, capfd):
  data = tmp_path / 'a\x1b[31m.jsonl'
  data.write_text('{"input_ids": [1, 2]}\n')
  argv = command(tiny_model, data, tmp_path / 'run')
  code = verbs.cli(['validate', *argv[1:], '--config.data.template=tokens'])
  out, _ = capfd.readouterr()
  assert code == 3
  assert '\x1b' not in out
  assert r'a\x1b[31m.jsonl:1' in out
  lines = out.splitlines()
  assert lines[0].startswith('ok      model      ')
  assert lines[-1] == '14 checks: 13 ok, 1 failed'
  assert all(len(line.split(maxsplit=2)) == 3 for line in lines)
