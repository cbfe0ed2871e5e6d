"""scripts/bench.py: its arithmetic, a case from end to end, and what goes wrong.

References: parameter counts as published; FLOPs counted in jaxprs, of attention in
its plain form; masks for which token sees which; one device for eight.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train.models import params as params_lib
from lorax_train.models.remat import POLICIES
from lorax_train.plan.flops import flops
from lorax_train.train import step as step_lib

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / 'scripts'

# What bench.py may not need, so that it runs where only jax, flax and optax are.
REFUSED = (
  'orbax', 'transformers', 'datasets', 'safetensors', 'tokenizers', 'torch',
  'ml_collections', 'sentencepiece', 'huggingface_hub', 'jinja2', 'peft',
  'matplotlib', 'tensorboardX', 'pyarrow',
)  # fmt: skip
RUN_ALONE = f"""
import runpy, sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {REFUSED!r}:
      raise ImportError(f'{{name}} is refused')

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(SCRIPTS)!r})
runpy.run_path({str(SCRIPTS / 'bench.py')!r}, run_name='__main__')
"""


@pytest.fixture(scope='module')
def room():
  """The scripts by name, as they find one another."""
  sys.path.insert(0, str(SCRIPTS))
  yield importlib.import_module
  sys.path.remove(str(SCRIPTS))


@pytest.fixture
def cases(room):
  return room('bench_cases')


@pytest.fixture
def rates(room):
  return room('bench_rates')


def test_every_case_is_of_what_there_is(cases):
  n_rows = sum(len(list(of())) for of in (cases._cpu, cases._gpu, cases._tpu))
  assert n_rows == len(cases.CASES)  # no name twice
  for case in cases.CASES.values():
    assert case.model in cases.MODELS
    assert case.remat in POLICIES
    sizes = [s if s > 0 else case.devices for s in case.mesh]
    assert np.prod(sizes) == case.devices, case.name
    assert case.batch % (sizes[0] * sizes[1]) == 0, case.name


# (model, all parameters, those in products), of config.json and model cards.
COUNTS = [
  ('mistral-7b', 7_241_732_096, 7_241_732_096 - 32000 * 4096 - 65 * 4096),
  ('llama-3.1-8b', 8_030_261_248, 8_030_261_248 - 128256 * 4096 - 65 * 4096),
  ('tinyllama-1.1b', 1_100_048_384, 1_100_048_384 - 32000 * 2048 - 45 * 2048),
]


@pytest.mark.parametrize(('model', 'total', 'in_products'), COUNTS)
def test_the_models_have_their_published_sizes(
  cases, rates, model, total, in_products
):
  cfg = cases.MODELS[model]
  assert params_lib.total(cfg) == total
  assert rates.product_params(cfg) == in_products


def test_a_tied_head_is_in_a_product(cases, rates):
  cfg = cases.MODELS['tiny']
  tied = cfg.__class__(**{**vars(cfg), 'tied': True})
  assert rates.product_params(tied) == rates.product_params(cfg)


def test_flops_of_a_token_are_those_of_the_step(room, cases, rates):
  """4N, with next to no attention; and three times its plain form beside."""
  step = room('bench_step')
  case = cases.CASES['cpu-tiny']._replace(packed=False, length=2, batch=32)
  cfg = cases.MODELS[case.model]
  frozen, state = step.make_model(
    case, cfg, step.optim.make_optimizer(step.optim.OptimConfig(1, 1e-3)),
    step.parallel.make_mesh(devices=jax.devices()[:1]),
  )  # fmt: skip
  arrays = step.make_batch(case, cfg.vocab)
  micro = {name: jnp.asarray(arrays[name][0]) for name in ('ids', 'labels')}
  loss = step_lib.make_loss(step.make_apply(case, cfg))
  grad = jax.grad(loss, has_aux=True)
  tokens = arrays['mask'].size
  n_factors = sum(x.size for x in jax.tree.leaves(state.trainable))
  counted = flops(grad, state.trainable, frozen, micro, None) / tokens
  expected = rates.flops_a_token(cfg, case.length) + 6 * n_factors
  assert counted == pytest.approx(expected, rel=0.02)

  q, k = jnp.ones((1, 24, 4, 16)), jnp.ones((1, 24, 2, 16))
  plain = flops(jax.nn.dot_product_attention, q, k, k) / 24
  attention = rates.flops_a_token(cfg, 24) - rates.flops_a_token(cfg, 0)
  assert attention == 3 * cfg.layers * plain


@pytest.mark.parametrize('window', [None, 16])
@pytest.mark.parametrize('packed', [True, False])
def test_keys_seen_are_those_of_the_mask(room, cases, rates, packed, window):
  case = cases.CASES['cpu-tiny']._replace(packed=packed, length=200, batch=3)
  arrays = room('bench_step').make_batch(case, 50)
  mask = arrays['mask'][0]
  segments = arrays['segments'][0] if packed else np.ones((3, 200), np.int32)
  behind = np.arange(200)[:, None] - np.arange(200)
  seen = (behind >= 0) & (behind < (window or 200))
  seen = seen & (segments[:, :, None] == segments[:, None])
  expected = seen.sum(-1)[mask].mean()
  assert rates.keys_seen(arrays, window) == pytest.approx(expected, rel=1e-6)
  assert packed == (mask.mean() < 1)
  assert mask.mean() > 0.8
  if packed:
    assert segments.max() > 1
    assert (arrays['labels'][0][~mask] == -100).all()


# What a token's products are made of a second time, in Mistral-7B: gate and up,
# q and o, k and v; down_proj never is.
MLP = 2 * 32 * 2 * 4096 * 14336
ATTENTION = 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
H100 = 'NVIDIA H100 80GB HBM3'

# (card, dtype, remat, share of the peak, FLOPs a token made a second time)
SHARES = [
  (H100, 'bfloat16', 'none', 0.5, 0),
  (H100, 'bfloat16', 'dots', 0.5, 0),
  (H100, 'bfloat16', 'mlp', 0.5, MLP),
  (H100, 'bfloat16', 'full', 0.5, MLP + ATTENTION),
  (H100, 'float32', 'none', None, 0),
  ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', 'none', None, 0),
]


@pytest.mark.parametrize(('card', 'dtype', 'remat', 'mfu', 'again'), SHARES)
def test_shares_of_a_peak(cases, rates, card, dtype, remat, mfu, again):
  """A step of such a length that it reaches half of two cards' peak."""
  case = cases.CASES['gpu8-7b-b16-full']._replace(
    devices=2, packed=False, dtype=dtype, remat=remat
  )
  cfg = cases.MODELS[case.model]
  arrays = {'mask': np.ones((1, 2, 100), bool)}
  needed = 200 * rates.flops_a_token(cfg, 50.5)
  seconds = needed / (2 * 989.4e12) / 0.5
  took = rates.Took([seconds, 9.0, 0.0], [1.0])
  found = rates.rates(case, cfg, arrays, took, rates.Roof(600e12, 1.0), card)
  hfu = mfu and 0.5 + again / needed * 200 * 0.5
  assert found['mfu_4n'] == (mfu and pytest.approx(mfu))
  assert found['hfu'] == (hfu and pytest.approx(hfu))
  assert found['share_of_gemm'] == pytest.approx(0.5 * 989.4 / 600)
  assert found['tokens_per_second'] == pytest.approx(200 / seconds)


@pytest.fixture(scope='module')
def alone():
  """A case on one device, where jax, flax and optax are all that there is."""
  done = subprocess.run(
    [sys.executable, '-c', RUN_ALONE, '--child', 'cpu-tiny', '--steps=3'],
    capture_output=True,
    text=True,
    timeout=200,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
def test_a_line_has_what_was_measured(alone):
  assert alone['platform'] == alone['card'] == 'cpu'
  assert alone['versions']['jax'] == jax.__version__
  assert alone['peak_from'] == 'compiled'
  assert alone['peak_bytes'] > alone['compiled_bytes']['temporary'] > 0
  for name in ('step_seconds', 'step_cpu_seconds', *alone['pieces']):
    one = alone.get(name) or alone['pieces'][name]
    assert 0 < one['min'] <= one['median'] <= one['max']
    assert one['n'] == 3
  assert alone['tokens_per_second'] > alone['useful_tokens_per_second'] > 0
  assert alone['mfu_4n'] is None
  # Nothing is learned yet, and then the batch by heart.
  assert alone['loss_first'] == pytest.approx(np.log(256), rel=0.05)
  assert alone['loss_last'] < alone['loss_first']


@pytest.mark.slow
def test_eight_devices_do_what_one_does(room, cases, alone, monkeypatch):
  step = room('bench_step')
  monkeypatch.setattr(step, 'ROOF_ON_CPU', (64, 1))
  many = step.measure(cases.CASES['cpu-tiny-mesh'], 3)
  assert (many['devices'], alone['devices']) == (8, 1)
  for name in ('loss_first', 'loss_last'):
    assert many[name] == pytest.approx(alone[name], rel=1e-5)
  assert many['n_trained'] == alone['n_trained']
  arguments = [x['compiled_bytes']['arguments'] for x in (many, alone)]
  assert arguments[0] < arguments[1] / 3  # weights are cut by four


def test_what_fails_gives_a_line_and_the_exit_code(
  room, tmp_path, monkeypatch, capsys
):
  """A case for other devices; and those for which no time is left."""
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(sys, 'argv', ['bench.py'])
  bench, out = room('bench'), tmp_path / 'lines.jsonl'
  args = bench.parse()
  args.out, args.case = str(out), ['gpu-7b-b4-dots']
  assert bench.run(args) == 1
  args.seconds, args.case = 1.0, ['cpu-tiny', 'cpu-175m-f32']
  assert bench.run(args) == 1
  printed = capsys.readouterr()
  lines = [json.loads(line) for line in printed.out.splitlines()]
  assert lines == [json.loads(line) for line in out.read_text().splitlines()]
  assert [(line['case'], line['error']) for line in lines] == [
    (
      'gpu-7b-b4-dots',
      'ValueError: gpu-7b-b4-dots is for a gpu, this is a cpu',
    ),
    ('cpu-tiny', 'not begun: 1 s were over'),
    ('cpu-175m-f32', 'not begun: 1 s were over'),
  ]
  assert lines[0]['shape']['batch'] == 4
  assert 'Traceback' in printed.err  # which is for a person


# (platform, devices, processes, the first case that runs by default)
FITTING = [
  ('cpu', 1, 1, 'cpu-175m-f32'),
  ('gpu', 1, 1, 'gpu-7b-b4-dots'),
  ('gpu', 8, 1, 'gpu-7b-b4-dots'),
  ('tpu', 16, 4, 'tpu16-7b-full'),
  ('tpu', 1, 1, 'tpu-1b-full'),
]


@pytest.mark.parametrize(('platform', 'devices', 'processes', 'first'), FITTING)
def test_by_default_what_fits_runs(
  room, cases, platform, devices, processes, first
):
  names = room('bench').fitting(
    {'platform': platform, 'devices': devices, 'processes': processes}
  )
  assert names[0] == first
  for name in names:
    assert cases.CASES[name].platform == platform
    assert cases.CASES[name].devices in (1, devices)
