"""Which remat is chosen, what is refused and what is advised instead."""

import dataclasses
import json

import pytest

from lorax_train import config, hardware
from lorax_train.__main__ import cli
from lorax_train.errors import ConfigError, ModelError
from lorax_train.plan import chips, sizes, text, verdict
from lorax_train.plan.estimate import ERROR, SPARE
from lorax_train.train import rundir
from tests.plan.cases import SMALL, devices, run
from tests.toys import write_model


def peak(remat, **of):
  cfg, adapters = run(remat=remat, **of)
  return verdict.case(cfg, adapters, devices()).found.peak


def test_less_is_kept_the_more_is_computed_twice():
  peaks = [peak(policy) for policy in verdict.LADDER]
  assert peaks == sorted(peaks, reverse=True)
  assert len(set(peaks)) == len(peaks)


@pytest.mark.parametrize('policy', verdict.LADDER)
def test_auto_is_the_least_that_fits(policy):
  cfg, adapters = run(remat='auto')
  limit = int(peak(policy) / (1 - SPARE)) + 1
  chosen = verdict.case(cfg, adapters, devices(limit=limit))
  assert chosen.cfg.model.remat == policy


@pytest.mark.parametrize('limit', [None, 1000])
def test_auto_is_full_where_nothing_fits_or_nobody_knows(limit):
  cfg, adapters = run(remat='auto')
  chosen = verdict.case(cfg, adapters, devices(limit=limit))
  assert chosen.cfg.model.remat == verdict.LADDER[-1]


WIDE = dataclasses.replace(SMALL, vocab=64_000)
CHANGES = [
  # The last policy fits, or nearly; so many rows; what is advised.
  (
    'logits',
    {'size': WIDE, 'length': 512, 'train': {'loss_chunk': 4096}},
    {'size': WIDE, 'length': 512},
    '--config.train.loss_chunk=0',
  ),
  ('remat', {'remat': 'none'}, 'full', '--config.model.remat=full'),
  (
    'rows',
    {'rows': 8},
    {'rows': 2, 'train': {'grad_accum': 4}},
    '--config.train.batch_size=2 --config.train.grad_accum=4',
  ),
  (
    'length',
    {'rows': 1, 'length': 512},
    {'rows': 1, 'length': 256},
    '--config.data.max_length=256',
  ),
]


@pytest.mark.parametrize(('what', 'of', 'enough', 'words'), CHANGES)
def test_the_nearest_change_is_advised(what, of, enough, words):
  room = peak(enough) if what == 'remat' else peak('full', **enough)
  cfg, adapters = run(**of)
  limit = int(room / (1 - SPARE)) + 10_000
  case = verdict.case(cfg, adapters, devices(limit=limit))
  assert case.share > 1
  change = verdict.nearest(case)
  assert change.words == words
  assert change.case.share <= 1 - SPARE


def test_a_gpu_is_first_asked_for_more_of_its_memory(monkeypatch):
  monkeypatch.setenv(hardware.SHARES[0], '0.75')
  cfg, adapters = run()
  found = verdict.case(cfg, adapters, devices()).found.peak
  card = hardware.CHIPS['h100']._replace(hbm=int(found / 0.85))
  topology = chips.Topology('card', 'gpu', card, 1, 1, int(card.hbm * 0.75))
  change = verdict.nearest(verdict.case(cfg, adapters, topology))
  assert change.words == f'{hardware.SHARES[0]}=0.95'


def test_more_chips_come_last():
  topology = chips.topology('v5e-1')
  halves = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16'}
  cfg, adapters = run(
    sizes.SIZES['mistral-7b'], 256, 3, model=halves, train={'grad_accum': 4}
  )
  small = topology._replace(limit=8 * hardware.GIB)
  change = verdict.nearest(verdict.case(cfg, adapters, small))
  flags = '--config.train.batch_size=4 --config.train.grad_accum=3'
  assert change.words == f'4 chips in place of 1 {flags}'
  assert change.case.mesh.shape['fsdp'] == 4
  # As many rows a step, and nothing about it that the flags don't say.
  said = config.to_mapping(cfg)
  said['train'].update(batch_size=4, grad_accum=3)
  assert config.from_mapping(said) == change.case.cfg


@pytest.fixture
def on_disk(tmp_path):
  """A run of a model that lies on the disk."""
  directory = write_model(tmp_path / 'model')

  def of(**more):
    cfg, _ = run(length=512, rows=4, **more)
    own = dataclasses.replace(cfg.model, path=str(directory))
    return dataclasses.replace(cfg, model=own)

  return of


def fitting(cfg):
  topology = devices(limit=1 << 40)
  adapters = verdict.setup.plan_adapters(
    cfg, sizes.model_config(cfg.model.path)
  )
  return verdict.case(cfg, adapters, topology).found.peak


def test_prepare_lets_through_what_fits_and_says_what_it_chose(on_disk):
  cfg = on_disk(remat='auto')
  chosen, lines = verdict.prepare(cfg, devices(limit=1 << 40))
  assert chosen.model.remat == 'dots'
  assert len(lines) == 1
  assert lines[0].startswith('remat      dots: a step takes about ')
  cfg = on_disk()
  assert verdict.prepare(cfg, devices(limit=1 << 40)) == (cfg, [])
  assert verdict.prepare(cfg, devices(limit=None)) == (cfg, [])


@pytest.mark.parametrize(
  ('began', 'room', 'goes_on'),
  [('mlp', 1 << 40, 'mlp'), ('none', 1 << 40, 'none'), ('dots', 1, 'full')],
)
def test_a_run_that_goes_on_keeps_its_remat_where_it_fits(
  on_disk, tmp_path, began, room, goes_on
):
  cfg = dataclasses.replace(on_disk(remat='auto'), run_dir=str(tmp_path))
  was = config.to_mapping(cfg)
  was['model']['remat'] = began
  (tmp_path / rundir.CONFIG).write_text(json.dumps(was))
  (tmp_path / rundir.RUN).write_text('{"inputs": {}}')
  limit = max(room, int(fitting(on_disk(remat='full')) / (1 - SPARE)) + 1)
  chosen, _ = verdict.prepare(cfg, devices(limit=limit))
  assert chosen.model.remat == goes_on


def test_prepare_refuses_packs_that_cannot_fit(on_disk):
  cfg = on_disk(data={'packing': True})
  limit = int(fitting(cfg) / (1 + ERROR) * 0.99)
  with pytest.raises(ConfigError, match=r'does not fit: .* what would fit: --con') as error:  # fmt: skip
    verdict.prepare(cfg, devices(limit=limit))
  assert '\n' not in str(error.value)
  # By less than the formula may be wrong, it is let through.
  assert verdict.prepare(cfg, devices(limit=int(limit * 1.03))) == (cfg, [])


def test_prepare_only_warns_where_rows_may_be_shorter(on_disk):
  cfg = on_disk()
  limit = int(fitting(cfg) / (1 + ERROR) * 0.99)
  same, lines = verdict.prepare(cfg, devices(limit=limit))
  assert same == cfg
  assert 'rows of 512 tokens may not fit' in lines[0]
  with pytest.raises(ConfigError, match='does not fit'):
    verdict.prepare(cfg, devices(limit=10_000))


@pytest.mark.parametrize('name', sizes.SIZES)
def test_public_sizes_are_their_published_counts(name):
  from lorax_train.models import params

  published = {
    'mistral-7b': 7_241_732_096,
    'mistral-7b-v0.2': 7_241_732_096,
    'mistral-7b-v0.3': 7_248_023_552,
    'nemo-12b': 12_247_782_400,
    'ministral-8b': 8_019_808_256,
    'small-24b': 23_572_403_200,
    'llama-2-7b': 6_738_415_616,
    'llama-2-13b': 13_015_864_320,
    'llama-3.1-8b': 8_030_261_248,
    'llama-3.1-70b': 70_553_706_496,
    'llama-3.2-1b': 1_235_814_400,
    'llama-3.2-3b': 3_212_749_824,
    'tinyllama-1.1b': 1_100_048_384,
    'smollm2-135m': 134_515_008,
    'smollm2-360m': 361_821_120,
    'smollm2-1.7b': 1_711_376_384,
  }
  assert params.total(sizes.SIZES[name]) == published[name]


def test_a_model_is_a_size_a_directory_or_its_config(tmp_path):
  directory = write_model(tmp_path / 'model')
  (directory / 'model.safetensors').unlink()
  by_directory = sizes.model_config(str(directory))
  assert sizes.model_config(str(directory / 'config.json')) == by_directory
  with pytest.raises(ModelError, match='no size of that name; there are: mist'):
    sizes.model_config('mistral-8b')


def test_the_verb_answers_in_words_and_in_json(capsys):
  argv = ['plan', '--model', 'mistral-7b', '--topology', 'v5e-16', '--formula']
  assert cli(argv) == 0
  words = capsys.readouterr().out
  for expected in ('7,241,732,096 parameters', 'verdict    fits: ', 'at best'):
    assert expected in words
  assert cli([*argv, '--json']) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts['fits'] == 'yes'
  assert facts['model']['matmul_parameters'] == 7_110_393_856
  kinds = {k: n for k, n in facts['bytes'].items() if k != 'peak'}
  assert sum(kinds.values()) == facts['bytes']['peak']
  assert facts['tokens_per_second_chip'] == pytest.approx(
    facts['step']['tokens'] / max(facts['seconds'].values()) / 16
  )


def test_what_is_trained_is_counted_over_all_devices():
  cfg, adapters = run(mesh={'tensor': 4})
  found = verdict.case(cfg, adapters, devices(8, platform='tpu'))
  m = SMALL
  ends = (m.hidden + m.heads * m.head_dim) * 2  # of q and o
  ends += (m.hidden + m.kv_heads * m.head_dim) * 2 + (m.hidden + m.mlp) * 3
  facts = text.facts(found, None)
  assert facts['model']['trained'] == 16 * m.layers * ends
  assert facts['flops']['needed']['adapters'] == 6 * 16 * m.layers * ends


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--model', 'mistral-7b', '--topology', 'v9-1'], 'no such chip'),
    (
      ['--model', 'mistral-7b', '--config.train.steps=3'],
      'does not go with --model: give --config FILE --config.model.path=mist',
    ),
    (['--model', 'mistral-7b', '--fomula'], '--fomula is no option'),
    (['--topology', 'v5e-1'], '--config=FILE is missing'),
  ],
)
def test_the_verb_says_what_is_wrong_with_its_options(capsys, argv, words):
  assert cli(['plan', *argv]) == 2
  assert words in capsys.readouterr().err


def test_the_verb_compiles_for_the_devices_at_hand(tmp_path, capsys):
  directory = write_model(tmp_path / 'model')
  assert cli(['plan', '--model', str(directory)]) == 0
  words = capsys.readouterr().out
  assert 'by the compiler' in words
  assert 'dW ' in words
