"""The verb `data`: what training will see.

Reference: numbers counted by hand of rows of one byte a token (BOS is 256, EOS
257), and for real rows a few lines over what sentencepiece gives.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lorax_train import __main__ as verbs
from tests import toys

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs' / 'mistral_lora.py'
ESCAPES = re.compile(r'\x1b\[[\d;]*m')

# 3 + 2 tokens and BOS and EOS: 7; 4 + 2 + 2: 8; 1 + 9 + 2: 12; 2 + 16 + 2: 20.
ROWS = [
  {'prompt': 'abc', 'completion': 'de'},
  {'prompt': 'abcd', 'completion': 'ef'},
  {'prompt': 'abc', 'completion': 'de'},
  {'prompt': 'a', 'completion': 'bcdefghij'},
  {'prompt': 'ab', 'completion': 'c' * 16},
]


@pytest.fixture
def weightless(tiny_model):
  """A model of which there are only config.json and the tokenizer."""
  (tiny_model / 'model.safetensors').unlink()
  return tiny_model


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
  return path


def of_file(model, data, *more, template='prompt_completion'):
  options = ['--model', model, '--data', data, '--template', template, *more]
  return ['data', *map(str, options)]


def of_config(model, data, *more):
  keys = {'model.path': model, 'data.path': data}
  keys['data.template'] = 'prompt_completion'
  return ['data', '--config', str(CONFIG), *(f'--config.{k}={v}' for k, v in keys.items()), *more]  # fmt: skip


def run(argv, capfd):
  capfd.readouterr()
  code = verbs.cli(argv)
  out, err = capfd.readouterr()
  assert code == 0, err
  return out


def facts_of(argv, capfd):
  return json.loads(run([*argv, '--json'], capfd))


def test_every_number_of_a_few_rows(weightless, tmp_path, capfd):
  data = write(tmp_path / 'rows.jsonl', ROWS)
  argv = of_file(weightless, data, '--max-length', 15, '--rows', 1)
  facts = facts_of(argv, capfd)
  (example,) = facts.pop('examples')
  bins = facts['lengths'].pop('bins')
  assert facts == {
    'model': str(weightless),
    'data': str(data),
    'eval_data': None,
    'template': 'prompt_completion',
    'max_length': 15,
    'rows': {'read': 5, 'kept': 4, 'train': 4, 'held_out': 0},
    'dropped': [
      {'reason': 'longer than 15 tokens', 'rows': 1, 'first': [f'{data}:5']}
    ],
    'truncated': 0,
    'cut_off': 0,
    'merged_boundary': 0,
    'tokens': 7 + 8 + 7 + 12,
    'learned_tokens': 3 + 3 + 3 + 10,
    'lengths': {
      'shortest': 7,
      'mean': 34 / 4,
      'longest': 12,
      'quantiles': {
        '1': 7, '5': 7, '25': 7, '50': 7, '75': 8, '95': 12, '99': 12
      },
    },
    'choices': None,
    'padding': {
      'packing': False,
      'plain': {'rows': 4, 'length': 15, 'share': pytest.approx(1 - 34 / 60)},
      # 12 alone, 8 + 7, 7
      'packed': {'packs': 3, 'length': 15, 'share': pytest.approx(1 - 34 / 45)},
      'buckets': None,
    },
    'ends': {'ids': [257], 'learned': 4, 'share': 1.0, 'missing': []},
    'duplicates': {'rows': 1, 'first': [[f'{data}:3', f'{data}:1']]},
    'leaks': {'rows': 0, 'first': []},
    'run': None,
    'sources': [
      {
        'path': str(data), 'template': 'prompt_completion', 'weight': 1.0,
        'read': 5, 'kept': 4, 'epochs': None,
      }
    ],
  }  # fmt: skip
  assert [(b['from'], b['to']) for b in bins] == [
    (n, n + 1) for n in range(1, 13, 2)
  ]
  assert [b['rows'] for b in bins] == [0, 0, 0, 3, 0, 1]
  ids = [256, *example['ids'][1:-1], 257]
  assert example == {
    'where': f'{data}:1',
    'tokens': 7,
    'learned_tokens': 3,
    'end_learned': True,
    'ids': ids,
    'labels': [-100] * 4 + ids[4:],
    'pieces': ['<s>', 'a', 'b', 'c', 'd', 'e', '</s>'],
    'runs': [
      {'text': '<s>', 'learned': False, 'piece': True},
      {'text': 'abc', 'learned': False, 'piece': False},
      {'text': 'de', 'learned': True, 'piece': False},
      {'text': '</s>', 'learned': True, 'piece': True},
    ],
    'others': [],
  }


def test_the_same_in_words(weightless, tmp_path, capfd):
  data = write(tmp_path / 'rows.jsonl', ROWS)
  argv = of_file(weightless, data, '--max-length', 15, '--rows', 1)
  out = run(argv, capfd)
  assert out.startswith(
    f'{data}:1  7 tokens, 3 learned, EOS learned\n  ⟨<s>⟩abc⟦de⟨</s>⟩⟧\n\n'
  )
  for line in (
    f'  7-8  3  {"#" * 40}',
    f'11-12  1  {"#" * 14}',
    'rows        5 read, 4 kept, 4 to train on, 0 held out',
    'dropped     1 x longer than 15 tokens (rows.jsonl:5)',
    'tokens      34, 19 learned (55.9 %)',
    'padding     43.3 % with rows filled up to 15 tokens',
    'packing     data.packing would make 3 packs of 4 rows, 15 tokens each,'
    ' padding 24.4 %',
    'EOS         learned in 4 of 4 rows (100.0 %)',
    'duplicates  1 rows repeat an earlier one (rows.jsonl:3 as rows.jsonl:1)',
  ):
    assert f'\n{line}\n' in out


def test_a_configuration_has_steps_and_held_out_rows(
  weightless, tmp_path, capfd
):
  data = write(tmp_path / 'rows.jsonl', ROWS[:4])
  other = write(tmp_path / 'other.jsonl', [ROWS[4], ROWS[3], ROWS[0]])
  argv = of_config(
    weightless,
    data,
    f'--config.data.eval_path={other}',
    '--config.train.steps=6',
    '--config.train.batch_size=2',
    '--config.train.grad_accum=3',
    '--config.data.max_length=15',
    '--rows=0',
  )
  facts = facts_of(argv, capfd)
  assert facts['examples'] == []
  assert facts['run'] == {'steps': 6, 'batch': 6, 'epochs': 9.0}
  assert facts['eval_data'] == str(other)
  assert facts['leaks'] == {
    'rows': 2,
    'first': [[f'{other}:2', f'{data}:4'], [f'{other}:3', f'{data}:1']],
  }
  packed = facts_of([*argv, '--config.data.packing=True'], capfd)
  assert packed['padding'] == {**facts['padding'], 'packing': True}
  assert packed['run'] == {'steps': 6, 'batch': 6, 'epochs': 12.0}
  out = run([*argv, '--config.data.packing=True'], capfd)
  assert '\npadding     3 packs of 4 rows' in out
  assert '\nrun         6 steps of 6 packs: 12.00 epochs\n' in out


def test_a_mixture_and_its_sources(weightless, tmp_path, capfd):
  a = write(tmp_path / 'a.jsonl', ROWS * 4)
  b = write(tmp_path / 'b.jsonl', [{'text': 'xyz'}, {'text': ''}] * 3)
  argv = of_config(
    weightless,
    '',
    f"--config.data.mixture=({{'path': '{a}', 'weight': 3}},"
    f" {{'path': '{b}', 'template': 'text'}})",
    '--config.data.max_length=15',
    '--config.data.on_bad_row=skip',
    '--config.train.steps=10',
    '--config.train.batch_size=8',
    '--config.train.grad_accum=1',
    '--config.eval.rows=0',
    '--rows=0',
  )
  facts = facts_of(argv, capfd)
  assert facts['data'] == f'{a}, {b}'
  assert facts['template'] == 'prompt_completion, text'
  assert facts['rows'] == {'read': 26, 'kept': 19, 'train': 19, 'held_out': 0}
  assert facts['dropped'] == [
    {
      'reason': 'longer than 15 tokens',
      'rows': 4,
      'first': [f'{a}:{n}' for n in (5, 10, 15, 20)],
    },
    {
      'reason': 'empty completion',
      'rows': 3,
      'first': [f'{b}:{n}' for n in (2, 4, 6)],
    },
  ]
  assert facts['tokens'] == 4 * 34 + 3 * 5
  # 80 rows: 60 of 16 and 20 of 3
  assert [s['epochs'] for s in facts['sources']] == [60 / 16, 20 / 3]
  assert [(s['read'], s['kept']) for s in facts['sources']] == [
    (20, 16),
    (6, 3),
  ]
  assert facts['run'] == {'steps': 10, 'batch': 8, 'epochs': None}
  out = run(argv, capfd)
  assert f'{a}, prompt_completion, weight 3: 16 of 20 rows kept, 3.75' in out


def test_buckets(weightless, tmp_path, capfd):
  data = write(tmp_path / 'rows.jsonl', ROWS[:4] * 2)
  argv = of_config(
    weightless,
    data,
    '--config.data.buckets=8,12',
    '--config.train.batch_size=2',
    '--config.train.grad_accum=1',
    '--config.train.steps=8',
    '--config.eval.rows=0',
    '--rows=0',
  )
  facts = facts_of(argv, capfd)
  # 3 batches of two rows of 8 tokens, one of two of 12
  assert facts['padding']['buckets'] == {
    'lengths': [8, 12],
    'share': pytest.approx(1 - 68 / 72),
  }
  assert facts['run'] == {'steps': 8, 'batch': 2, 'epochs': 2.0}
  out = run(argv, capfd)
  assert re.search(r'padding +5\.6 % in batches of 8, 12 tokens\n', out)


def test_no_end_is_shown(weightless, tmp_path, capfd):
  rows = [{'input_ids': [256, 65, 66]}, {'input_ids': [256, 65, 257]}]
  data = write(tmp_path / 'rows.jsonl', rows)
  out = run(of_file(weightless, data, template='tokens'), capfd)
  assert f'{data}:1  3 tokens, 2 learned, EOS NOT LEARNED\n' in out
  assert 'learned in 1 of 2 rows (50.0 %); not in 1 (rows.jsonl:1)' in out


def test_ids_need_no_tokenizer(tmp_path, capfd):
  model = toys.write_model(tmp_path / 'bare', tokenizer=False)
  data = write(tmp_path / 'rows.jsonl', [{'input_ids': [256, 65, 66, 257]}])
  argv = of_file(model, data, template='tokens')
  assert '  256⟦ 65 66 257⟧\n' in run(argv, capfd)
  (example,) = facts_of(argv, capfd)['examples']
  assert example['pieces'] is None
  assert example['end_learned']  # config.json names EOS


HOSTILE = {
  'prompt': '\x1b]0;owned\x07\x1b[2J\x9b1m\r',
  'completion': 'x\nrows.jsonl:9  1 tokens, 1 learned, EOS learned \u202e',
}


def on_a_terminal(argv, **env):
  """What a process writes to a terminal, which `script` makes."""
  command = ' '.join(f"'{a}'" for a in [sys.executable, '-m', 'lorax_train', *argv])  # fmt: skip
  done = subprocess.run(
    ['script', '-qec', command, '/dev/null'],
    cwd=ROOT,
    env={
      **{k: v for k, v in os.environ.items() if k != 'NO_COLOR'},
      'TERM': 'xterm',
      **env,
    },
    capture_output=True,
    check=True,
    timeout=120,
  )
  return done.stdout.decode().replace('\r\n', '\n')


@pytest.mark.skipif(not shutil.which('script'), reason='no script(1)')
def test_a_terminal_gets_our_colours_and_no_escape_of_the_data(
  weightless, tmp_path
):
  data = write(tmp_path / 'rows.jsonl', [HOSTILE])
  argv = of_file(weightless, data)
  out = on_a_terminal(argv)
  assert set(ESCAPES.findall(out)) == {'\x1b[32m', '\x1b[2m', '\x1b[0m'}
  assert r'\x1b]0;owned\x07\x1b[2J\x9b1m\r' in out
  assert '⟦' not in out
  assert '\x1b' not in ESCAPES.sub('', out)
  plain = on_a_terminal(argv, NO_COLOR='1')
  assert '\x1b' not in plain
  assert '⟦x\n  rows.jsonl:9' in plain  # no line of a row is a heading
  assert plain == on_a_terminal(argv, TERM='dumb')


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_a_pipe_gets_brackets_whatever_its_encoding(
  encoding, weightless, tmp_path
):
  data = write(tmp_path / 'rows.jsonl', [HOSTILE])
  done = subprocess.run(
    [sys.executable, '-m', 'lorax_train', *of_file(weightless, data)],
    cwd=ROOT,
    env={**os.environ, 'PYTHONIOENCODING': encoding},
    capture_output=True,
    check=True,
    timeout=120,
  )
  out = done.stdout.decode(encoding)
  assert ('⟦x\n' if encoding == 'utf-8' else r'\u27e6x' + '\n') in out
  assert not re.search(r'[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]', out)


WRONG = [
  (['data'], 2, ['--config=FILE is missing']),
  (['data', '--model', 'm', '--data', 'd'], 2, ['give --template']),
  (['data', '--model', 'm', '--config', 'x.py'], 2, ['--config', '--model']),
  (['data', '--rows', 'x', '--config', str(CONFIG)], 2, ['--rows', "'x'"]),
  (['data', '--config', str(CONFIG), '--config.no=1'], 2, ['no']),
]


@pytest.mark.parametrize(('argv', 'code', 'words'), WRONG)
def test_a_wrong_command_is_told_in_one_line(argv, code, words, capfd):
  capfd.readouterr()
  assert verbs.cli(argv) == code
  out, err = capfd.readouterr()
  assert not out
  assert len(err.splitlines()) == 1
  for word in words:
    assert word in err


# (data, options, exit code, words)
BAD = [
  ([{'prompt': 'a'}], [], 3, ['rows.jsonl:1', "'completion'", '--on-bad-row']),
  (ROWS, ['--max-length', '3'], 3, ['no row is left to show', 'longer than 3']),
  (ROWS, ['--max-length', '1'], 2, ['--max-length', 'below 2']),
  (ROWS, ['--rows', '-1'], 2, ['--rows -1']),
]


@pytest.mark.parametrize(('rows', 'options', 'code', 'words'), BAD)
def test_bad_input_is_told_in_the_words_of_the_options(
  rows, options, code, words, weightless, tmp_path, capfd
):
  argv = of_file(weightless, write(tmp_path / 'rows.jsonl', rows), *options)
  capfd.readouterr()
  assert verbs.cli(argv) == code
  out, err = capfd.readouterr()
  assert not out
  assert len(err.splitlines()) == 1
  for word in words:
    assert word in err
  assert '--config' not in err


def test_real_rows_are_counted_as_by_sentencepiece(shared, tmp_path, capfd):
  import sentencepiece

  model = toys.write_model(tmp_path / 'm', tokenizer=False, vocab_size=32000, bos_token_id=1, eos_token_id=2)  # fmt: skip
  (model / 'model.safetensors').unlink()
  file = shared / 'tokenizers' / 'mistral-v1' / 'tokenizer.model'
  shutil.copy(file, model)
  data = shared / 'data' / 'alpaca_gpt4_999.json'
  own = '### Instruction:\n{instruction}\n{input}\n### Response:{|}{output}'
  argv = of_file(model, data, '--max-length', 256, template=own)
  facts = facts_of(argv, capfd)

  encode = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode
  rows = json.loads(data.read_text('utf-8'))
  prompts = ['### Instruction:\n{instruction}\n{input}\n### Response:'.format(**r) for r in rows]  # fmt: skip
  ids = encode([p + r['output'] for p, r in zip(prompts, rows, strict=True)])
  lengths = [len(i) + 2 for i in ids if len(i) + 2 <= 256]
  repeated = Counter(tuple(i) for i in ids if len(i) + 2 <= 256)
  assert facts['rows']['kept'] == len(lengths)
  assert facts['tokens'] == sum(lengths)
  assert max(lengths) > 192  # so that 64s make 256 of it
  share = 1 - sum(lengths) / (256 * len(lengths))
  assert facts['padding']['plain']['share'] == pytest.approx(share)
  n_packs = facts['padding']['packed']['packs']
  assert sum(lengths) / 256 <= n_packs < 1.05 * sum(lengths) / 256
  assert facts['duplicates']['rows'] == sum(n - 1 for n in repeated.values())
  assert facts['ends']['share'] == 1


@pytest.mark.parametrize('verb', ['data', 'validate'])
def test_no_device_is_touched(verb, tiny_model, tmp_path):
  data = write(tmp_path / 'rows.jsonl', ROWS)
  argv = [verb, *of_config(tiny_model, data)[1:]]
  argv.append(f'--config.run_dir={tmp_path / "run"}')
  done = subprocess.run(
    [sys.executable, '-m', 'lorax_train', *argv],
    cwd=ROOT,
    # jax would raise at the first use of a device.
    env={**os.environ, 'JAX_PLATFORMS': 'none_such'},
    capture_output=True,
    check=False,
    timeout=120,
  )
  assert (done.returncode, done.stderr) == (0, b'')
  assert not (tmp_path / 'run').exists()
