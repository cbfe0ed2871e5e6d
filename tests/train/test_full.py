"""Runs that train every weight.

References: the loss that the run itself logged; `score` on the model that it
wrote; the uninterrupted run for a resumed one; one device for meshes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import config, lora, parallel
from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import hf_config
from lorax_train.infer.score import score
from lorax_train.train import base, evaluate, inspection, loop, optim, setup
from lorax_train.train import state as state_lib
from tests.toys import CONFIG, write_model, write_tokenizer


def make_config(directory, rows, run_dir, **sections):
  """A small float32 run of all weights; `sections` override keys."""
  mapping = config.defaults()
  mapping.update(run_dir=str(run_dir), method='full')
  mapping['model'].update(
    path=str(directory), dtype='float32', param_dtype='float32', remat='none'
  )
  mapping['data'].update(
    path=str(rows), template='alpaca', max_length=64, truncation='left'
  )
  mapping['train'].update(
    steps=4, batch_size=8, learning_rate=1e-3, schedule='constant'
  )
  mapping['eval'].update(rows=4, every=2, samples=0)
  mapping['checkpoint'].update(every=2)
  for name, values in sections.items():
    mapping[name].update(values)
  return config.from_mapping(mapping)


def metrics(run_dir, key):
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  return {v['step']: v[key] for v in map(json.loads, lines) if key in v}


@pytest.fixture
def two_devices(monkeypatch):
  """For runs: each step of all weights has many sums over the mesh."""
  devices = jax.devices()[:2]
  monkeypatch.setattr(jax, 'devices', lambda: devices)


@pytest.mark.slow
@pytest.mark.compat
def test_a_run_writes_the_model_that_it_trained(
  tmp_path, rows_file, capsys, two_devices
):
  """Of a tied model, stopped on the way, in bfloat16 as the base was loaded."""
  base_dir = write_model(tmp_path / 'model', tie_word_embeddings=True)

  def run(name, steps):
    return loop.run(
      make_config(
        base_dir, rows_file, tmp_path / name, train={'steps': steps},
        model={'param_dtype': 'bfloat16'},
      )
    )  # fmt: skip

  model = run('parts', 2)
  assert model == tmp_path / 'parts' / 'model'
  first = load_file(model / 'model.safetensors')
  run('parts', 4)
  assert 'resumed    at step 2' in capsys.readouterr().out
  run('parts', 4)
  said = capsys.readouterr().out
  assert 'already done: 4 steps' in said
  assert f'generate --model {model}' in said
  whole = run('whole', 4)
  assert not (tmp_path / 'whole' / 'adapter').exists()
  written, other = (load_file(d / 'model.safetensors') for d in (model, whole))
  assert written.keys() == load_file(base_dir / 'model.safetensors').keys()
  for name, x in written.items():
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, other[name])
    assert (x != first[name]).any(), name
  held_out = metrics(tmp_path / 'parts', 'eval_loss')
  assert held_out == metrics(tmp_path / 'whole', 'eval_loss')
  assert held_out[4] < held_out[2] < held_out[0]

  report = evaluate.evaluate_run(str(tmp_path / 'parts'))
  assert report['base']['loss'] == pytest.approx(held_out[0], abs=1e-6)
  assert report['adapted']['loss'] == pytest.approx(held_out[4], abs=1e-6)
  facts, text = inspection.inspect(str(tmp_path / 'parts'))
  assert facts['model']['path'] == str(model)
  assert 'method      all weights, adamw' in text
  card = (model / 'README.md').read_text()
  assert 'library_name: transformers' in card
  assert json.loads((model / 'config.json').read_text())['torch_dtype'] == 'bfloat16'  # fmt: skip


def write_sizes(directory, **overrides):
  """A model directory without weights."""
  directory.mkdir()
  (directory / 'config.json').write_text(json.dumps(CONFIG | overrides))
  write_tokenizer(directory)
  return directory


def test_random_weights_are_those_of_the_seed_on_any_mesh(one_device):
  cfg = hf_config.config_from_hf(CONFIG | {'initializer_range': 0.1})
  key = jax.random.key(3)
  alone = base.random_params(key, cfg, one_device)
  cut = base.random_params(key, cfg, parallel.make_mesh(2, 2, 2))
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(cut), strict=True
  ):  # fmt: skip
    np.testing.assert_array_equal(x, y)
    assert x.dtype == np.float32
    if 'norm' in path[-1].key:
      assert (np.asarray(x) == 1).all()
    else:
      assert np.std(x) == pytest.approx(0.1, rel=0.1)
  up, gate = (np.asarray(cut['layers']['mlp'][n]) for n in ('up_proj', 'gate_proj'))  # fmt: skip
  assert (up[0] != up[1]).all() and (up != gate).all()
  up = cut['layers']['mlp']['up_proj']
  assert up.sharding.shard_shape(up.shape) == (3, 16, 24)


@pytest.mark.slow
def test_text_trains_a_model_that_has_no_weights(tmp_path, two_devices):
  model = write_sizes(tmp_path / 'model')
  text = tmp_path / 'stories.txt'
  text.write_text('\n<|endoftext|>\n'.join(f'A story of {n}.' for n in range(50)))  # fmt: skip
  keys = {
    'data': {'template': 'text', 'packing': True},
    'train': {'steps': 2},
  }
  with pytest.raises(ModelError, match=r'no model\.safetensors'):
    loop.run(make_config(model, text, tmp_path / 'run', **keys))
  cfg = make_config(
    model, text, tmp_path / 'run', model={'init': 'random'}, **keys
  )
  out = loop.run(cfg)
  held_out = metrics(tmp_path / 'run', 'eval_loss')
  assert held_out[0] == pytest.approx(np.log(260), abs=0.1)
  assert held_out[2] < held_out[0]
  report = evaluate.evaluate_run(str(tmp_path / 'run'))
  assert report['base']['loss'] == pytest.approx(held_out[0], abs=1e-5)
  ids = np.arange(40).reshape(2, 20)
  np.savez(tmp_path / 'in.npz', ids=ids, labels=ids)
  done = score(str(out), tmp_path / 'in.npz', tmp_path / 'out.npz')
  assert np.isfinite(done['loss'])


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'muon'])
def test_what_is_trained_is_cut_as_the_weights_are(name, tmp_path):
  """Master weights and moments over fsdp, as `plan` has them."""
  model = write_sizes(tmp_path / 'model')
  cfg = make_config(
    model, 'unused', 'unused', train={'optimizer': name},
    model={'init': 'random'},
  )  # fmt: skip
  model_cfg = hf_config.read_config(model)
  adapters = setup.plan_adapters(cfg, model_cfg)
  mesh = parallel.make_mesh(1, 4, 2)
  tx = optim.make_optimizer(setup.optim_config(cfg))
  halves = base.halves(cfg, model, adapters, mesh)
  shapes = setup.abstract(cfg, adapters, mesh)
  real, planned = (
    state_lib.abstract_state(tx, *each, mesh) for each in (halves, shapes)
  )
  assert jax.tree.structure(real) == jax.tree.structure(planned)
  for one, other in zip(*map(jax.tree.leaves, (real, planned)), strict=True):
    assert one.shape == other.shape
    assert one.sharding.is_equivalent_to(other.sharding, len(one.shape))
  state = state_lib.init_state(tx, halves[1], real)
  up = state.trainable['layers']['mlp']['up_proj']
  assert up.sharding.shard_shape(up.shape) == (3, 8, 24)
  for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
    if path[-1] == jax.tree_util.DictKey('up_proj') and x.shape == up.shape:
      assert x.sharding.is_equivalent_to(up.sharding, 3)
  count, base_count = lora.count(halves[0])
  assert count == base_count == sum(x.size for x in jax.tree.leaves(halves[1]))


@pytest.mark.parametrize(('method', 'keys', 'message'), [
  ('full', {'lora': {'rank': 4, 'targets': 'norm'}},
   r'lora\.targets, lora\.rank: method=full of all weights has no adapter'),
  ('full', {'train': {'lora_plus_ratio': 2.0}}, r'train\.lora_plus_ratio: meth'),
  ('lora', {'model': {'init': 'random'}}, r'model\.init=random: .* method=full'),
  ('lora', {'train': {'optimizer': 'muon'}}, r'train\.optimizer=muon makes'),
  ('full', {'train': {'optimizer': 'adam'}}, r'did you mean adamw\?'),
])  # fmt: skip
def test_keys_that_a_method_has_no_ear_for(method, keys, message):
  mapping = config.defaults()
  mapping['method'] = method
  mapping['model']['path'] = mapping['data']['path'] = 'x'
  for section, values in keys.items():
    mapping[section].update(values)
  with pytest.raises(ConfigError, match=message):
    config.from_mapping(mapping)
