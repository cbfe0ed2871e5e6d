"""What models and adapters are said to be, and the rank that an adapter uses.

References: numpy's SVD of the explicit s B A in float64, the tensors as the
safetensors library reads them, and for settings PEFT's rules by hand.
"""

import json
import math
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train.errors import ModelError
from lorax_train.formats import safetensors
from lorax_train.infer import inspection, spectrum
from tests.formats.refusals import refusal
from tests.toys import random_tensors, write_model

# --- singular values


def factors(r, n_in, n_out, used=None, seed=0):
  """A [r, in] and B^T [r, out]; rows past `used` are zero in both."""
  rng = np.random.default_rng(seed)
  a, b = rng.normal(size=(r, n_in)), rng.normal(size=(r, n_out))
  a[used:] = b[used:] = 0
  return a.astype(np.float32), b.astype(np.float32)


# (rank, in, out, rows that are not zero)
@pytest.mark.parametrize(('r', 'n_in', 'n_out', 'used'), [
  (1, 7, 5, 1),
  (4, 32, 40, 4),
  (4, 40, 32, 2),  # half of it is padding
  (16, 64, 48, 16),
  (16, 10, 48, 16),  # a rank past the weight's own
  (16, 48, 10, 16),
  (9, 6, 6, 9),
])  # fmt: skip
@pytest.mark.parametrize('scale', [1.0, 0.25, 16.0, -3.0])
def test_values_are_those_of_the_explicit_update(r, n_in, n_out, used, scale):
  a, b = factors(r, n_in, n_out, used)
  got = spectrum.singular_values(a, b, scale)
  update = scale * (b.astype(np.float64).T @ a.astype(np.float64))
  want = np.linalg.svd(update, compute_uv=False)
  assert got.shape == (min(r, n_in, n_out),)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, want[: len(got)], atol=1e-13 * want[0])
  assert np.all(want[len(got) :] < 1e-13 * want[0])
  facts = spectrum.summary(got)
  assert facts['norm'] == pytest.approx(np.linalg.norm(update), rel=1e-12)
  assert facts['largest'] == pytest.approx(np.linalg.norm(update, 2), rel=1e-12)


# Values -> (rank_90, rank_99, effective rank), by hand.
SUMMARIES = [
  ([3.0], (1, 1, 1.0)),
  ([2.0] * 7, (7, 7, 7.0)),
  ([2.0, 2.0, 0.0, 0.0], (2, 2, 2.0)),
  # squares 100, 9, 9, 1: of 119, two are 91.6 % and three 99.2 %
  ([10.0, 3.0, 3.0, 1.0], (2, 3, None)),
  ([0.0, 0.0], (0, 0, 0.0)),
  ([], (0, 0, 0.0)),
  # squares that no float holds
  ([1e200, 1e200], (2, 2, 2.0)),
  ([1e-200, 1e-200, 0.0], (2, 2, 2.0)),
]


@pytest.mark.parametrize(('values', 'want'), SUMMARIES)
def test_summaries_by_hand(values, want):
  got = spectrum.summary(np.array(values))
  assert (got['rank_90'], got['rank_99']) == want[:2]
  if want[2] is not None:
    assert got['effective_rank'] == pytest.approx(want[2], rel=1e-12)
  json.dumps(got, allow_nan=False)


def test_effective_rank_is_the_formula_of_the_paper():
  values = np.array([4.0, 2.0, 1.0, 1.0])
  p = [0.5, 0.25, 0.125, 0.125]
  entropy = sum(-x * math.log(x) for x in p)
  got = spectrum.summary(values)['effective_rank']
  assert got == pytest.approx(math.exp(entropy), rel=1e-12)
  # Another scale, or more zeros, change nothing.
  for other in (values * 1e-3, np.append(values, [0.0, 0.0])):
    assert spectrum.summary(other)['effective_rank'] == pytest.approx(got)


# --- adapters

# What PEFT 0.21 wrote -> {end of a name: (rank, scale)} by its rules:
# alpha / r, with rsLoRA alpha / sqrt(r), patterns first.
ADAPTERS = {
  'adapter_default': {'': (4, 2.0)},
  'adapter_layers': {},
  'adapter_head': {'': (4, 2.0)},
  'adapter_patterns': {
    'layers.1.mlp.down_proj': (6, 8 / math.sqrt(6)),
    'layers.0.mlp.down_proj': (4, 4.0),
    'layers.0.self_attn.o_proj': (4, 2.5),
    'layers.1.self_attn.o_proj': (4, 4.0),
    'q_proj': (2, 8 / math.sqrt(2)),
    'v_proj': (4, 1.5),
    'k_proj': (4, 4.0),
    'gate_proj': (4, 4.0),
  },
}


@pytest.mark.parametrize('name', ADAPTERS)
def test_an_adapter_that_peft_wrote(name, golden):
  directory = golden / 'mistral_window' / name
  facts = inspection.adapter_facts(directory)
  tensors = load_file(directory / 'adapter_model.safetensors')
  lora = {k: v for k, v in tensors.items() if 'lora_' in k}
  assert facts['kind'] == 'adapter'
  assert facts['parameters'] == sum(v.size for v in lora.values())
  assert facts['bytes'] == sum(v.nbytes for v in lora.values())
  assert facts['carried'] == (['lm_head'] if name == 'adapter_head' else [])
  assert len(facts['modules']) == len(lora) / 2
  refs = safetensors.open_file(directory / 'adapter_model.safetensors')
  assert facts['fingerprint'] == safetensors.fingerprint(refs)
  for m in facts['modules']:
    a, b = (
      lora[f'base_model.model.{m["name"]}.lora_{half}.weight'] for half in 'AB'
    )
    assert m['A'] == f'float32{list(a.shape)}'
    assert m['B'] == f'float32{list(b.shape)}'
    assert m['rank'] == len(a) == len(m['singular_values'])
    for end, want in ADAPTERS[name].items():
      if m['name'].endswith(end):
        assert (m['rank'], m['scale']) == (want[0], pytest.approx(want[1]))
    update = m['scale'] * (b.astype(np.float64) @ a.astype(np.float64))
    want = np.linalg.svd(update, compute_uv=False)[: len(a)]
    np.testing.assert_allclose(m['singular_values'], want, atol=1e-12 * want[0])
    assert m['norm'] == pytest.approx(np.linalg.norm(update), rel=1e-12)
  json.dumps(facts, allow_nan=False)


def test_each_kind_has_its_median(golden):
  facts = inspection.adapter_facts(
    golden / 'mistral_window' / 'adapter_patterns'
  )
  kinds = {k['name']: k for k in facts['kinds']}
  assert list(kinds) == [
    'down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'v_proj',
  ]  # fmt: skip
  of = [m for m in facts['modules'] if m['name'].endswith('v_proj')]
  assert kinds['v_proj']['count'] == len(of) == 2
  for key in ('largest', 'smallest', 'norm', 'rank_90', 'effective_rank'):
    assert kinds['v_proj'][key] == np.median([m[key] for m in of])


def copy(golden, tmp_path, name='adapter_default'):
  return shutil.copytree(golden / 'mistral_window' / name, tmp_path / 'adapter')


def change(directory, keep=None, **settings):
  """Writes other settings, and other tensors by `keep(key, array)`."""
  path = directory / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
  path = directory / 'adapter_model.safetensors'
  if keep is not None:
    changed = {k: keep(k, v) for k, v in load_file(path).items()}
    save_file({k: v for k, v in changed.items() if v is not None}, path)


def test_an_untrained_adapter_has_rank_0(golden, tmp_path):
  directory = copy(golden, tmp_path)
  change(directory, lambda k, v: v * 0 if 'lora_B' in k else v)
  facts = inspection.adapter_facts(directory)
  for row in (*facts['modules'], *facts['kinds']):
    assert row['effective_rank'] == row['rank_90'] == row['norm'] == 0
  json.dumps(facts, allow_nan=False)
  assert 'nan' not in inspection.adapter_text(facts)


def test_dtypes_are_those_on_disk(golden, tmp_path):
  directory = copy(golden, tmp_path)
  change(directory, lambda _, v: v.astype(ml_dtypes.bfloat16))
  facts = inspection.adapter_facts(directory)
  assert all(m['A'].startswith('bfloat16[4, ') for m in facts['modules'])
  assert facts['bytes'] == 2 * facts['parameters']


def test_layers_come_in_order_of_their_numbers(tmp_path):
  tensors = {
    f'base_model.model.model.layers.{i}.self_attn.q_proj.lora_{half}.weight':
      np.ones(shape, np.float32)
    for i in (10, 2, 0)
    for half, shape in (('A', (1, 3)), ('B', (5, 1)))
  }  # fmt: skip
  save_file(tensors, tmp_path / 'adapter_model.safetensors')
  config = {'peft_type': 'LORA', 'r': 1, 'target_modules': ['q_proj']}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
  facts = inspection.adapter_facts(tmp_path)
  assert [m['name'].split('.')[2] for m in facts['modules']] == ['0', '2', '10']
  assert 'base        not said' in inspection.adapter_text(facts)


def test_an_adapter_in_words(golden):
  facts = inspection.adapter_facts(
    golden / 'mistral_window' / 'adapter_patterns'
  )
  text = inspection.adapter_text(facts)
  for words in (
    'settings    rslora, rank 4, alpha 8, dropout 0',
    ': 12 modules matched',
    'trainable   2,832 in 11,328 bytes',
    'ranks       layers.1.mlp.down_proj=6, q_proj=2',
    'excluded    up_proj',
    'q_proj         2     2  5.65685  float32[2, 32]  float32[32, 2]',
    'layers.1.self_attn.v_proj     4',
    'effective rank',
  ):
    assert words in text
  lines = text[text.index('singular values') :].splitlines()
  assert max(map(len, lines)) <= 80


# What is done to a sound adapter -> words of the message.
DAMAGE = {
  'cut off': (lambda d: cut(d / 'adapter_model.safetensors'), 'damaged'),
  'no weights': (
    lambda d: (d / 'adapter_model.safetensors').unlink(),
    'no such file',
  ),
  'no JSON': (
    lambda d: (d / 'adapter_config.json').write_text('{'),
    'not JSON',
  ),
  'empty': (lambda d: (d / 'adapter_config.json').write_text(''), 'not JSON'),
  'another rank': (
    lambda d: change(d, r=5),
    'has rank 5 by adapter_config.json, but 4',
  ),
  'other targets': (
    lambda d: change(d, target_modules=['k_proj']),
    'matched no module',
  ),
  'fewer targets': (
    lambda d: change(d, target_modules=['q_proj']),
    'factors of modules that are not targets',
  ),
  'half a module': (
    lambda d: change(d, lambda k, v: None if '0.self_attn.q_proj.lora_B' in k
                     else v),
    'lora_B is missing',
  ),
  'not finite': (lambda d: change(d, lambda _, v: v * np.nan), 'not finite'),
  'a scale past floats': (
    lambda d: change(d, lambda _, v: v * 1e30, lora_alpha=1e300),
    'is not finite',
  ),
}  # fmt: skip


def cut(path):
  path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize('case', DAMAGE)
def test_damaged_adapters_are_refused(case, golden, tmp_path):
  directory = copy(golden, tmp_path)
  damage, words = DAMAGE[case]
  damage(directory)
  assert words in refusal(inspection.adapter_facts, directory)


# --- models


def test_a_model_by_its_headers_alone(tmp_path, monkeypatch):
  directory = write_model(tmp_path / 'model', tokenizer=False)
  tensors = load_file(directory / 'model.safetensors')
  monkeypatch.setattr(safetensors.TensorRef, 'read', None)
  facts = inspection.model_facts(directory)
  assert facts['kind'] == 'model'
  assert facts['architecture']['model_type'] == 'mistral'
  assert facts['architecture']['layers'] == 3
  assert facts['parameters'] == sum(v.size for v in tensors.values())
  assert facts['parameters'] == facts['parameters_by_config']
  assert facts['bytes'] == 4 * facts['parameters']
  assert sum(t['count'] for t in facts['tensors']) == len(tensors)
  q = next(t for t in facts['tensors'] if 'q_proj' in t['name'])
  assert q == {
    'name': 'model.layers.{}.self_attn.q_proj.weight',
    'count': 3,
    'shape': [40, 32],
    'dtype': 'float32',
  }
  refs = safetensors.open_dir(directory)
  assert facts['fingerprint'] == safetensors.fingerprint(refs)
  json.dumps(facts, allow_nan=False)
  text = inspection.model_text(facts)
  for words in (
    'type        mistral, 3 layers',
    '4 heads of 10, 2 for keys and values, window 16',
    f'parameters  {facts["parameters"]:,} in {facts["bytes"]:,} bytes, 1 file\n',
    'model.layers.{}.self_attn.q_proj.weight              3  [40, 32]   float32',
  ):
    assert words in text


def test_shards_dtypes_and_what_config_json_does_not_say(tmp_path):
  directory = write_model(tmp_path / 'model', tokenizer=False)
  tensors = random_tensors(json.loads((directory / 'config.json').read_text()))
  tensors['model.layers.1.self_attn.q_proj.weight'] = tensors[
    'model.layers.1.self_attn.q_proj.weight'
  ].astype(ml_dtypes.bfloat16)
  tensors['extra'] = np.zeros(7, np.int32)
  names = sorted(tensors)
  files = {'a.safetensors': names[:9], 'b.safetensors': names[9:]}
  for file, part in files.items():
    save_file({n: tensors[n] for n in part}, directory / file)
  (directory / 'model.safetensors').unlink()
  index = {n: file for file, part in files.items() for n in part}
  (directory / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': index})
  )
  facts = inspection.model_facts(directory)
  q = [t for t in facts['tensors'] if 'q_proj' in t['name']]
  assert {(t['dtype'], t['count']) for t in q} == {
    ('float32', 2), ('bfloat16', 1)
  }  # fmt: skip
  assert facts['parameters'] == facts['parameters_by_config'] + 7
  text = inspection.model_text(facts)
  assert f'2 files; config.json makes {facts["parameters"] - 7:,}' in text
  assert facts['tensors'][-1]['name'] == 'extra'


@pytest.mark.parametrize(('case', 'words'), [
  ('llama3_rope', 'rope, theta 10000, llama3 x '),
  ('mistral_tied', 'embeddings tied'),
  ('mistral_window', 'embeddings not tied'),
])  # fmt: skip
def test_facts_of_other_architectures(case, words, golden):
  facts = inspection.model_facts(golden / case / 'model')
  assert words in inspection.model_text(facts)
  assert facts['parameters'] == facts['parameters_by_config']


def test_damaged_models_are_refused(tmp_path):
  directory = write_model(tmp_path / 'model', tokenizer=False)
  weights = directory / 'model.safetensors'
  cut(weights)
  assert 'damaged' in refusal(inspection.model_facts, directory)
  weights.unlink()
  assert 'no model.safetensors' in refusal(inspection.model_facts, directory)
  (directory / 'config.json').write_text('{"model_type": "bert"}')
  with pytest.raises(ModelError, match="'bert' is not supported"):
    inspection.model_facts(directory)
