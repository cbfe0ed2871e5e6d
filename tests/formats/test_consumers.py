"""Adapters as others read them: what is told, what is refused, what is baked.

Reference: readers written here by hand, which know of an adapter directory
what vLLM's and llama.cpp's sources know, in numpy and float64; and the logits
of the adapter as it was. tests/parity/test_consumers.py asks PEFT.
"""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train import __main__ as verbs
from lorax_train import load
from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import consumers
from tests import toys
from tests.formats.refusals import refusal

PREFIX = 'base_model.model.'
SHAPES = {  # (in, out) of toys.CONFIG
  'self_attn.q_proj': (32, 40),
  'self_attn.k_proj': (32, 20),
  'self_attn.v_proj': (32, 20),
  'self_attn.o_proj': (40, 32),
  'mlp.gate_proj': (32, 48),
  'mlp.up_proj': (32, 48),
  'mlp.down_proj': (48, 32),
}
IDS = toys.random_ids(3, (2, 20))
PLAIN = {'target_modules': ['q_proj', 'v_proj'], 'r': 4, 'lora_alpha': 8}
# All three at once: (config, {module's end: (rank, scale)}), by hand.
THREE = (
  {
    'target_modules': ['q_proj', 'v_proj', 'down_proj'],
    'r': 4,
    'lora_alpha': 8,
    'use_rslora': True,
    'rank_pattern': {'layers.1.mlp.down_proj': 6, 'q_proj': 2},
    'alpha_pattern': {'v_proj': 3},
  },
  {
    'q_proj': (2, 8 / math.sqrt(2)),
    'v_proj': (4, 3 / math.sqrt(4)),
    'layers.1.mlp.down_proj': (6, 8 / math.sqrt(6)),
    'down_proj': (4, 8 / math.sqrt(4)),
  },
)


def names(*ends, layers=range(3)):
  return [f'model.layers.{i}.{end}' for i in layers for end in ends]


def first(table, name):
  return next(value for end, value in table.items() if name.endswith(end))


def write_adapter(directory, config, ranks, extra=(), dtype=np.float32):
  """An adapter with random factors of {module: rank}."""
  directory.mkdir(parents=True, exist_ok=True)
  config = {
    'peft_type': 'LORA',
    'base_model_name_or_path': 'some/base',
    **config,
  }
  (directory / 'adapter_config.json').write_text(json.dumps(config))
  rng = np.random.default_rng(5)
  tensors = dict(extra)
  for name, rank in ranks.items():
    n_in, n_out = (32, 260) if name == 'lm_head' else first(SHAPES, name)
    for key, shape in (('A', (rank, n_in)), ('B', (n_out, rank))):
      factor = 0.3 * rng.standard_normal(shape).astype(np.float32)
      tensors[f'{PREFIX}{name}.lora_{key}.weight'] = factor.astype(dtype)
  save_file(tensors, directory / 'adapter_model.safetensors')
  return str(directory)


@pytest.fixture
def three(tmp_path):
  """An adapter with rank_pattern, alpha_pattern and rsLoRA."""
  config, table = THREE
  modules = names('self_attn.q_proj', 'self_attn.v_proj', 'mlp.down_proj')
  ranks = {name: first(table, name)[0] for name in modules}
  return write_adapter(tmp_path / 'three', config, ranks)


def plain(directory, config=(), modules=None, rank=4, **kwargs):
  modules = modules or names('self_attn.q_proj', 'self_attn.v_proj')
  config = {**PLAIN, **dict(config)}
  return write_adapter(
    directory, config, dict.fromkeys(modules, rank), **kwargs
  )


def of_directory(directory):
  """(adapter_config.json, {module: (A, B)})."""
  config = json.loads((directory / 'adapter_config.json').read_text())
  tensors = load_file(directory / 'adapter_model.safetensors')
  pairs = {}
  for key, tensor in tensors.items():
    assert key.startswith(PREFIX)
    module, _, half = key.removeprefix(PREFIX).partition('.lora_')
    pairs.setdefault(module, {})[half] = tensor.astype(np.float64)
  return config, {n: (p['A.weight'], p['B.weight']) for n, p in pairs.items()}


def as_vllm(directory):
  """{module: update}: r, lora_alpha and use_rslora, and the tensors."""
  config, pairs = of_directory(directory)
  r = config['r']
  root = math.sqrt(r) if config.get('use_rslora') else r
  scale = config['lora_alpha'] / root
  return {name: scale * b @ a for name, (a, b) in pairs.items()}


def as_llama_cpp(directory):
  """{module: update}: lora_alpha over the tensor's own rank; 0 is no alpha."""
  config, pairs = of_directory(directory)
  alpha = config['lora_alpha']
  return {
    name: (alpha / len(a) if alpha else 1.0) * b @ a
    for name, (a, b) in pairs.items()
  }


def as_one_scale(directory):
  """{module: update}: alpha / r for every pair, and nothing else."""
  config, pairs = of_directory(directory)
  scale = config['lora_alpha'] / config['r']
  return {name: scale * b @ a for name, (a, b) in pairs.items()}


READERS = {'peft': as_one_scale, 'vllm': as_vllm, 'llama.cpp': as_llama_cpp}


@pytest.fixture(scope='module')
def logits():
  """(model directory, adapter=) -> logits, compiled once for all of a kind."""
  runs = []

  def compute(directory, **kwargs):
    apply, params, _ = load(str(directory), **kwargs)
    runs.append(jax.jit(apply))
    return np.asarray(runs[0](params, IDS))

  return compute


def merged(updates, model, out):
  """A model directory with these updates in the weights of another."""
  tensors = load_file(model / 'model.safetensors')
  for name, update in updates.items():
    tensors[f'{name}.weight'] = (tensors[f'{name}.weight'] + update).astype(
      np.float32
    )
  toys.write_model(out)
  save_file(tensors, out / 'model.safetensors')
  return out


@pytest.mark.parametrize('consumer', consumers.CONSUMERS)
def test_a_baked_adapter_read_with_one_scale_gives_the_same_logits(
  consumer, three, tiny_model, logits, tmp_path
):
  want = logits(tiny_model, adapter=three)
  out = tmp_path / 'out'
  consumers.export(three, consumer, str(out), bake=True, model=str(tiny_model))
  for reader in READERS.values():
    got = logits(merged(reader(out), tiny_model, tmp_path / 'merged'))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
  # It is still an adapter to us, and the same one.
  np.testing.assert_allclose(
    logits(tiny_model, adapter=str(out)), want, atol=1e-4, rtol=0
  )
  # Not baked, two of them would have computed something else.
  for name in ('vllm', 'llama.cpp'):
    updates = READERS[name](tmp_path / 'three')
    got = logits(merged(updates, tiny_model, tmp_path / 'merged'))
    assert np.abs(got - want).max() > 0.1
  assert np.abs(logits(tiny_model) - want).max() > 0.1


def test_what_is_baked_is_plain(three, tmp_path):
  out = tmp_path / 'out'
  consumers.export(three, 'vllm', str(out), bake=True)
  config, pairs = of_directory(out)
  before, old = of_directory(tmp_path / 'three')
  assert (config['r'], config['lora_alpha']) == (6, 6)
  for key in ('rank_pattern', 'alpha_pattern', 'use_rslora', 'use_dora'):
    assert not config[key]
  assert config['target_modules'] == sorted(old) == sorted(pairs)
  assert config['base_model_name_or_path'] == before['base_model_name_or_path']
  assert config['peft_type'] == 'LORA'
  for name, (a, b) in pairs.items():
    rank, scale = first(THREE[1], name)
    assert (a.shape[0], b.shape[1]) == (6, 6)
    np.testing.assert_array_equal(a[:rank], old[name][0])
    np.testing.assert_allclose(b[:, :rank], scale * old[name][1], rtol=1e-7)
    assert not a[rank:].any()
    assert not b[:, rank:].any()


# config, {module's end: rank} -> consumers that compute it as it is.
SAME = {
  'plain': ({}, {}, ['peft', 'vllm', 'llama.cpp']),
  'rslora': ({'use_rslora': True}, {}, ['peft', 'vllm']),
  'rank pattern': (
    {'rank_pattern': {'v_proj': 2}},
    {'v_proj': 2},
    ['peft', 'llama.cpp'],
  ),
  'alpha pattern': ({'alpha_pattern': {'v_proj': 2}}, {}, ['peft']),
  'patterns that even out': (
    {'rank_pattern': {'v_proj': 2}, 'alpha_pattern': {'v_proj': 4}},
    {'v_proj': 2},
    ['peft', 'vllm'],
  ),
  'a rank past r': (
    {
      'r': 2,
      'lora_alpha': 4,
      'rank_pattern': {'v_proj': 4},
      'alpha_pattern': {'v_proj': 8},
    },
    {'q_proj': 2},
    ['peft'],
  ),
  'patterns of nothing': (
    {'rank_pattern': {'k_proj': 2}, 'alpha_pattern': {'k_proj': 3}},
    {},
    ['peft', 'vllm', 'llama.cpp'],
  ),
  'an alpha of 0': ({'lora_alpha': 0}, {}, ['peft', 'vllm']),
  'some layers': (
    {'layers_to_transform': [0, 1, 2]},
    {},
    ['peft', 'vllm', 'llama.cpp'],
  ),
}


@pytest.mark.parametrize('consumer', consumers.CONSUMERS)
@pytest.mark.parametrize('case', SAME)
def test_what_a_consumer_computes_as_it_is_is_copied(case, consumer, tmp_path):
  config, ranks, fine = SAME[case]
  modules = names('self_attn.q_proj', 'self_attn.v_proj')
  ranks = {n: ranks.get(n.rpartition('.')[2], 4) for n in modules}
  adapter = write_adapter(tmp_path / 'a', {**PLAIN, **config}, ranks)
  out = tmp_path / 'out'
  if consumer in fine:
    report = consumers.export(adapter, consumer, str(out))
    assert not report['baked']
    for file in (tmp_path / 'a').iterdir():
      assert (out / file.name).read_bytes() == file.read_bytes()
    return
  message = refusal(consumers.export, adapter, consumer, str(out))
  assert message.startswith(f'{tmp_path / "a" / "adapter_config.json"}: ')
  assert message.endswith('--bake mends that: one rank, scales folded into B')
  assert not out.exists()
  consumers.export(adapter, consumer, str(out), bake=True)
  theirs = READERS[consumer](out)
  every = of_directory(tmp_path / 'a')[0]
  for name, (a, b) in of_directory(tmp_path / 'a')[1].items():
    end = name.rpartition('.')[2]
    alpha = every.get('alpha_pattern', {}).get(end, every['lora_alpha'])
    scale = alpha / (math.sqrt(len(a)) if 'use_rslora' in every else len(a))
    np.testing.assert_allclose(theirs[name], scale * b @ a, atol=1e-6)


# A setting -> what the line says of it; None: it makes no difference.
SETTINGS = {
  'use_dora': (True, 'refuses it'),
  'modules_to_save': (['lm_head'], 'refuses it'),
  'bias': ('all', 'refuses it'),
  'lora_bias': (True, 'refuses it'),
  'trainable_token_indices': ([1, 2], 'refuses it'),
  'layer_replication': ([[0, 2]], 'passes over it'),
  'target_parameters': (['mlp.experts.down_proj'], 'passes over it'),
  'fan_in_fan_out': (True, 'passes over it'),
  'use_qalora': (True, 'passes over it'),
  'arrow_config': ({'top_k': 1}, 'passes over it'),
  'init_lora_weights': ('pissa', 'does not change the base by it'),
}


@pytest.mark.parametrize('consumer', ['vllm', 'llama.cpp'])
@pytest.mark.parametrize('bake', [False, True])
@pytest.mark.parametrize('key', SETTINGS)
def test_what_no_baking_mends_is_refused(key, bake, consumer, tmp_path):
  value, words = SETTINGS[key]
  adapter = plain(tmp_path / 'a', {key: value})
  out = tmp_path / 'out'
  message = refusal(consumers.export, adapter, consumer, str(out), bake)
  assert f'{consumers.CONSUMERS[consumer]} {words}' in message
  assert key in message
  assert 'merge the adapter' in message or 'save_pretrained' in message
  assert '--bake' not in message
  assert {p.name for p in tmp_path.iterdir()} == {'a'}


@pytest.mark.parametrize('key', SETTINGS)
def test_peft_reads_every_setting(key, tmp_path):
  adapter = plain(tmp_path / 'a', {key: SETTINGS[key][0]})
  out = tmp_path / 'out'
  report = consumers.export(adapter, 'peft', str(out))
  (found,) = report['findings']
  assert found['what'].startswith(key)
  assert found['kind'] == 'note'
  assert (out / 'adapter_config.json').read_bytes() == (
    tmp_path / 'a' / 'adapter_config.json'
  ).read_bytes()
  # But there is nothing to fold it into.
  message = refusal(
    consumers.export, adapter, 'peft', str(tmp_path / 'baked'), True
  )
  assert f'{key}' in message
  assert 'merge the adapter' in message or 'save_pretrained' in message


def test_alora_which_llama_cpp_reads_is_not_ours_to_judge(tmp_path):
  adapter = plain(tmp_path / 'a', {'alora_invocation_tokens': [5]})
  out = str(tmp_path / 'out')
  assert 'vLLM passes over it' in refusal(
    consumers.export, adapter, 'vllm', out
  )
  message = refusal(consumers.export, adapter, 'llama.cpp', out)
  assert 'not supported: alora_invocation_tokens=[5]' in message


@pytest.mark.parametrize(('consumer', 'lost', 'words'), [
  ('vllm', ['r'], 'r: vLLM stops without'),
  ('vllm', ['target_modules', 'r'], 'r, target_modules: vLLM stops without'),
  ('llama.cpp', ['lora_alpha'], 'lora_alpha: llama.cpp stops without'),
])  # fmt: skip
def test_keys_that_a_consumer_needs(consumer, lost, words, tmp_path):
  config = {k: v for k, v in PLAIN.items() if k not in lost}
  modules = names('self_attn.q_proj', 'self_attn.v_proj')
  ranks = dict.fromkeys(modules, 8 if 'r' in lost else 4)  # PEFT's default
  adapter = write_adapter(tmp_path / 'a', config, ranks)
  out = str(tmp_path / 'out')
  message = refusal(consumers.export, adapter, consumer, out)
  assert words in message
  assert '--bake' in message
  consumers.export(adapter, consumer, out, bake=True)
  config, _ = of_directory(tmp_path / 'out')
  assert all(key in config for key in lost)


@pytest.mark.parametrize(('rank', 'option'), [
  (16, None), (17, 32), (64, 64), (300, 320), (512, 512),
])  # fmt: skip
def test_the_rank_that_vllm_must_be_started_with(rank, option, tmp_path):
  adapter = plain(tmp_path / 'a', {'r': rank}, rank=rank)
  report = consumers.export(adapter, 'vllm', str(tmp_path / 'out'))
  noted = [f for f in report['findings'] if f['what'] == f'rank {rank}']
  assert bool(noted) == bool(option)
  assert ('--max-lora-rank' in report['use']) == bool(option)
  if option:
    assert f'--max-lora-rank {option} ' in report['use']
    assert noted[0]['kind'] == 'note'
    assert f'--max-lora-rank {option}' in consumers.text(report)


def test_a_rank_that_vllm_never_takes(tmp_path):
  adapter = plain(tmp_path / 'a', {'r': 513}, rank=513)
  for bake in (False, True):
    message = refusal(
      consumers.export, adapter, 'vllm', str(tmp_path / 'out'), bake
    )
    assert 'rank 513: vLLM takes ranks up to 512' in message
  consumers.export(adapter, 'llama.cpp', str(tmp_path / 'out'))


def test_factors_of_half_the_width_are_copied_and_baked(tmp_path):
  bf16 = ml_dtypes.bfloat16
  adapter = plain(tmp_path / 'a', {'use_rslora': True}, dtype=bf16)
  report = consumers.export(adapter, 'vllm', str(tmp_path / 'copy'))
  assert report['findings'] == []
  report = consumers.export(adapter, 'vllm', str(tmp_path / 'out'), bake=True)
  assert [f['what'] for f in report['findings']] == ['float32']
  want, got = as_vllm(tmp_path / 'copy'), as_vllm(tmp_path / 'out')
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-6)


def test_embeddings_are_baked_as_linears_are(tmp_path):
  """E A and B are (r, vocab) and (dim, r), by PEFT's keys."""
  rng = np.random.default_rng(1)
  key = f'{PREFIX}model.embed_tokens.lora_embedding_'
  extra = {
    f'{key}A': rng.standard_normal((3, 260)).astype(np.float32),
    f'{key}B': rng.standard_normal((32, 3)).astype(np.float32),
  }
  config = {
    'target_modules': ['q_proj', 'v_proj', 'embed_tokens'],
    'rank_pattern': {'embed_tokens': 3},
    'alpha_pattern': {'embed_tokens': 12},
  }
  adapter = plain(tmp_path / 'a', config, extra=extra)
  model = toys.write_model(tmp_path / 'model')
  consumers.export(
    adapter, 'vllm', str(tmp_path / 'out'), bake=True, model=str(model)
  )
  baked = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert baked[f'{key}A'].shape == (4, 260)
  np.testing.assert_allclose(
    baked[f'{key}B'] @ baked[f'{key}A'],
    12 / 3 * extra[f'{key}B'].astype(np.float64) @ extra[f'{key}A'],
    atol=1e-5,
  )


def test_what_lies_beside_an_adapter_comes_along(three, tmp_path):
  source = tmp_path / 'three'
  toys.write_tokenizer(source)
  for name in ('README.md', 'chat_template.jinja', 'optimizer.pt'):
    (source / name).write_text(name)
  for bake, consumer in ((True, 'vllm'), (False, 'peft')):
    out = tmp_path / consumer
    consumers.export(three, consumer, str(out), bake=bake)
    assert {p.name for p in out.iterdir()} == {
      'README.md', 'adapter_config.json', 'adapter_model.safetensors',
      'chat_template.jinja', 'tokenizer.json', 'tokenizer_config.json',
    }  # fmt: skip
    assert (out / 'README.md').read_text() == 'README.md'


# --- what the base alone can tell


# Changes of the model's config.json -> words of the refusal.
@pytest.mark.parametrize(('changes', 'words'), [
  ({'hidden_size': 16}, 'model.layers.0.self_attn.q_proj [32, 40]'),
  ({'num_hidden_layers': 2}, 'model.layers.2.self_attn.q_proj [32, 40]'),
  ({'num_key_value_heads': 4}, 'model.layers.0.self_attn.v_proj [32, 20]'),
  ({'num_hidden_layers': 4}, 'model.layers.3.self_attn.q_proj'),
])  # fmt: skip
@pytest.mark.parametrize('consumer', consumers.CONSUMERS)
def test_an_adapter_for_another_model(consumer, changes, words, tmp_path):
  adapter = plain(tmp_path / 'a')
  model = toys.write_model(tmp_path / 'model', **changes)
  out = tmp_path / 'out'
  message = refusal(
    consumers.export, adapter, consumer, str(out), True, str(model)
  )
  assert words in message
  assert not out.exists()
  consumers.export(adapter, consumer, str(out), True)


@pytest.mark.parametrize('consumer', ['vllm', 'llama.cpp'])
def test_modules_that_no_mistral_has(consumer, tmp_path):
  key = f'{PREFIX}model.layers.0.self_attn.qkv_proj.lora_'
  extra = {
    f'{key}A.weight': np.zeros((4, 32), np.float32),
    f'{key}B.weight': np.zeros((96, 4), np.float32),
  }
  config = {'target_modules': ['q_proj', 'v_proj', 'qkv_proj']}
  adapter = plain(tmp_path / 'a', config, extra=extra)
  message = refusal(consumers.export, adapter, consumer, str(tmp_path / 'out'))
  assert 'model.layers.0.self_attn.qkv_proj: ' in message
  assert 'finds no such in a Mistral or a Llama' in message
  consumers.export(adapter, 'peft', str(tmp_path / 'out'))


def test_an_adapted_head(tmp_path):
  config = {'target_modules': ['lm_head']}
  adapter = plain(tmp_path / 'a', config, ['lm_head'])
  model = toys.write_model(tmp_path / 'model')
  tied = toys.write_model(tmp_path / 'tied', tie_word_embeddings=True)

  def export(name, consumer, base=None):
    out = str(tmp_path / name)
    return consumers.export(adapter, consumer, out, model=base and str(base))

  for i, consumer in enumerate(consumers.CONSUMERS):
    report = export(f'out{i}', consumer, model)
    assert not [f for f in report['findings'] if f['what'] == 'lm_head']
  report = export('unknown', 'llama.cpp')
  assert [f['kind'] for f in report['findings']] == ['note']
  with pytest.raises(ModelError, match='the model ties its head'):
    export('refused', 'llama.cpp', tied)
  export('taken', 'vllm', tied)


def test_a_base_weight_that_peft_saved_along(tmp_path):
  model = toys.write_model(tmp_path / 'model')
  other = toys.write_model(tmp_path / 'other', seed=1)
  head = load_file(model / 'model.safetensors')['lm_head.weight']
  key = f'{PREFIX}lm_head.base_layer.weight'
  config = {'target_modules': ['lm_head']}
  adapter = plain(tmp_path / 'a', config, ['lm_head'], extra={key: head})

  def message(*args):
    return refusal(consumers.export, adapter, *args)

  for consumer in ('vllm', 'llama.cpp'):
    out = tmp_path / consumer
    assert 'give --model' in message(consumer, str(out))
    assert 'which differs' in message(consumer, str(out), True, str(other))
    consumers.export(adapter, consumer, str(out), True, str(model))
    assert key not in load_file(out / 'adapter_model.safetensors')
  # As it is, only a copy for those who read it or pass over it.
  assert '--bake' in message('vllm', str(tmp_path / 'x'), False, str(model))
  consumers.export(adapter, 'llama.cpp', str(tmp_path / 'x'), False, str(model))
  consumers.export(adapter, 'peft', str(tmp_path / 'y'))
  assert key in load_file(tmp_path / 'y' / 'adapter_model.safetensors')
  assert 'give --model' in message('peft', str(tmp_path / 'z'), True)


# --- what is damaged, or in the way


def edit(directory, change):
  path = directory / 'adapter_model.safetensors'
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


A0, B0 = (
  f'{PREFIX}{names("self_attn.q_proj")[0]}.lora_{x}.weight' for x in 'AB'
)
DAMAGES = {
  'no config': (lambda d: (d / 'adapter_config.json').unlink(), 'is this an adapter?'),
  'half a config': (lambda d: (d / 'adapter_config.json').write_text('{"r"'), 'not JSON'),
  'another kind': (lambda d: (d / 'adapter_config.json').write_text('{"peft_type": "LOHA"}'), 'peft_type is not LORA'),
  'a word for a rank': (lambda d: (d / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": "4"}'), "r='4'"),
  'no weights': (lambda d: (d / 'adapter_model.safetensors').unlink(), 'no such file'),
  'half the weights': (lambda d: (d / 'adapter_model.safetensors').write_bytes(b'x' * 99), 'damaged or not complete'),
  'no tensors': (lambda d: edit(d, lambda t: t.clear()), 'no adapter in it'),
  'half a pair': (lambda d: edit(d, lambda t: t.pop(B0)), 'q_proj: lora_B is missing'),
  'the other half': (lambda d: edit(d, lambda t: t.pop(A0)), 'q_proj: lora_A is missing'),
  'another rank': (lambda d: edit(d, lambda t: t.update({A0: t[A0][:2], B0: t[B0][:, :2].copy()})), 'q_proj: rank 2, by adapter_config.json 4'),
  'ranks that differ': (lambda d: edit(d, lambda t: t.update({A0: t[A0][:2]})), 'do not fit'),
  'not finite': (lambda d: edit(d, lambda t: t[A0].fill(np.nan)), 'q_proj: not finite'),
  'no target': (lambda d: edit(d, lambda t: t.update({k.replace('q_proj', 'k_proj'): v for k, v in t.items()})), 'k_proj: not a target'),
  'other tensors': (lambda d: edit(d, lambda t: t.update({'lm_head.weight': t[A0]})), 'lm_head.weight float32[4, 32] is no factor'),
  'whole numbers': (lambda d: edit(d, lambda t: t.update({A0: t[A0].astype(np.int8)})), f'{A0} int8[4, 32] is no factor'),
}  # fmt: skip


@pytest.mark.parametrize('consumer', consumers.CONSUMERS)
@pytest.mark.parametrize('case', DAMAGES)
def test_a_damaged_adapter(case, consumer, tmp_path):
  damage, words = DAMAGES[case]
  adapter = plain(tmp_path / 'a')
  damage(tmp_path / 'a')
  for bake in (False, True):
    message = refusal(
      consumers.export, adapter, consumer, str(tmp_path / 'out'), bake
    )
    assert words in message
    assert str(tmp_path / 'a') in message
  assert {p.name for p in tmp_path.iterdir()} == {'a'}


def test_a_scale_that_takes_b_past_float32(tmp_path):
  adapter = plain(tmp_path / 'a', {'lora_alpha': 1e40})
  out = str(tmp_path / 'out')
  message = refusal(consumers.export, adapter, 'vllm', out, True)
  assert message.startswith(f'{adapter}/adapter_model.safetensors: ')
  assert 'past float32 in model.layers.0.self_attn.q_proj' in message
  assert {p.name for p in tmp_path.iterdir()} == {'a'}


def test_what_is_at_out_already(tmp_path):
  adapter = plain(tmp_path / 'a')
  full, empty, file = (tmp_path / x for x in ('full', 'empty', 'file'))
  full.mkdir()
  (full / 'mine').write_text('mine')
  empty.mkdir()
  file.write_text('mine')
  (tmp_path / 'link').symlink_to(empty)
  for name in ('full', 'file', 'link', 'a'):
    message = refusal(
      consumers.export, adapter, 'peft', str(tmp_path / name), kind=ConfigError
    )
    assert 'exists already' in message
  consumers.export(adapter, 'peft', str(empty))
  assert (empty / 'adapter_config.json').exists()
  assert (full / 'mine').read_text() == file.read_text() == 'mine'


@pytest.mark.parametrize('bake', [False, True])
def test_a_full_disk_leaves_nothing(bake, tmp_path):
  adapter = plain(tmp_path / 'a')
  with toys.full_disk(2000), pytest.raises(OSError):
    consumers.export(adapter, 'vllm', str(tmp_path / 'out'), bake)
  assert {p.name for p in tmp_path.iterdir()} == {'a'}


def test_a_consumer_that_nobody_knows(tmp_path):
  adapter = plain(tmp_path / 'a')
  message = refusal(
    consumers.export, adapter, 'ollama', str(tmp_path / 'o'), kind=ConfigError
  )
  assert "'ollama' is none of peft, vllm, llama.cpp" in message


# --- the verb


def test_the_verb_says_what_it_did(three, tmp_path, capsys):
  out = tmp_path / 'out'
  argv = ['export', three, '--for', 'vllm', '--out', str(out)]
  assert verbs.cli(argv) == 4
  said, err = capsys.readouterr()
  assert said == ''
  assert err == (
    f'{three}/adapter_config.json: rank_pattern, alpha_pattern: vLLM does not'
    ' read that: 7 of 9 modules would get another scale; --bake mends that: one'
    ' rank, scales folded into B\n'
  )
  assert verbs.cli([*argv, '--bake']) == 0
  said, err = capsys.readouterr()
  assert err == ''
  assert said.splitlines() == [
    f'adapter     {three}',
    'modules     9, ranks 2 to 6',
    'mended      rank_pattern, alpha_pattern: vLLM does not read that: 7 of 9'
    ' modules would get another scale',
    "note        float32: vLLM rounds the factors to the model's dtype, or to"
    ' --lora-dtype',
    f'written     {out}: r 6, lora_alpha 6, every scale folded into B',
    f'use         vllm serve some/base --enable-lora --lora-modules NAME={out}',
  ]
  assert verbs.cli(argv) == 2
  assert 'exists already' in capsys.readouterr().err


def test_the_verb_as_json(three, tmp_path, capsys):
  out = str(tmp_path / 'out')
  argv = ['export', three, '--for', 'llama.cpp', '--out', out, '--json']
  assert verbs.cli([*argv, '--bake']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report == {
    'adapter': three,
    'for': 'llama.cpp',
    'modules': 9,
    'ranks': [2, 6],
    'findings': [
      {
        'what': 'use_rslora, alpha_pattern',
        'text': 'does not read that: 9 of 9 modules would get another scale',
        'kind': 'bake',
      }
    ],
    'baked': True,
    'out': out,
    'use': f'python convert_lora_to_gguf.py --base some/base {out}',
  }


@pytest.mark.parametrize(('changes', 'code', 'words'), [
  ({'--for': None}, 2, 'required: --for'),
  ({'--out': None}, 2, 'required: --out'),
  ({'--for': 'ollama'}, 2, "'ollama' is none of peft, vllm, llama.cpp"),
  ({'--model': './none'}, 4, 'no such directory'),
  ({'--out': '/proc/none/out'}, 74, 'input/output error'),
])  # fmt: skip
def test_errors_of_the_verb(changes, code, words, tmp_path, capsys):
  named = {'--for': 'vllm', '--out': str(tmp_path / 'out'), **changes}
  argv = [x for key, value in named.items() if value for x in (key, value)]
  assert verbs.cli(['export', plain(tmp_path / 'a'), *argv]) == code
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('\n') == 1
  assert words in err
  assert {p.name for p in tmp_path.iterdir()} == {'a'}
