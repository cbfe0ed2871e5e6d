"""Runs that train more than adapters of linears: embedding, norms, rows, heads.

References: the loss that the run itself logged, at step 0 and at its last;
`hf.load_params` and `load_model` on what it wrote; one device for the mesh.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train import config
from lorax_train.errors import ConfigError, ModelError
from lorax_train.infer import fidelity
from lorax_train.infer.load import load_model, load_params
from lorax_train.train import evaluate, loop
from tests.toys import random_ids, write_model

IDS = random_ids()


def make_config(model, rows, run_dir, lora, **model_keys):
  mapping = config.defaults()
  mapping['run_dir'] = str(run_dir)
  mapping['model'].update(
    path=str(model), dtype='float32', param_dtype='float32', **model_keys
  )
  mapping['lora'].update(rank=4, alpha=8.0, **lora)
  mapping['data'].update(
    path=str(rows), template='alpaca', max_length=64, truncation='left'
  )
  mapping['train'].update(
    steps=2, batch_size=8, learning_rate=1e-2, schedule='constant'
  )
  mapping['eval'].update(rows=4, every=2, samples=0)
  return config.from_mapping(mapping)


# name: (the base ties its head, keys of model, keys of lora, parts in the end)
RUNS = {
  'norms, a layer and the head': (
    False,
    {},
    {
      'targets': 'q_proj',
      'modules_to_save': 'norm,layers.1.mlp.up_proj,lm_head',
    },
    False,
  ),
  'tied, embedding and norms': (
    True,
    {},
    {'targets': 'q_proj,embed_tokens', 'modules_to_save': 'model.norm'},
    False,
  ),
  'tied, rows': (
    True,
    {},
    {'targets': 'v_proj', 'trainable_token_indices': '97,65,101'},
    False,
  ),
  'parted, the head alone': (
    True,
    {'untie': True},
    {'targets': 'q_proj,lm_head'},
    True,
  ),
}


# Each is a run of its own: one stands for all, but for the slow tests.
@pytest.mark.parametrize(
  'name',
  [
    *list(RUNS)[:1],
    *(pytest.param(n, marks=pytest.mark.slow) for n in list(RUNS)[1:]),
  ],
)
def test_what_was_trained_is_what_is_written_and_read(
  name, tmp_path, rows_file, capsys
):
  tied, model_keys, keys, parts = RUNS[name]
  model = write_model(tmp_path / 'model', tie_word_embeddings=tied)
  run_dir = tmp_path / 'run'
  cfg = make_config(model, rows_file, run_dir, keys, **model_keys)
  # On a mesh that cuts every leaf, if its sizes allow it.
  mapping = config.to_mapping(cfg)
  mapping['mesh'].update(data=2, fsdp=2, tensor=2)
  adapter = loop.run(config.from_mapping(mapping))
  lines = map(json.loads, (run_dir / 'metrics.jsonl').read_text().splitlines())
  held_out = {v['step']: v['eval_loss'] for v in lines if 'eval_loss' in v}
  assert held_out[2] < held_out[0]

  # The run again, on the adapter as written: the base's loss and its own.
  report = evaluate.evaluate_run(str(run_dir))
  assert report['base']['loss'] == pytest.approx(held_out[0], abs=1e-5)
  assert report['adapted']['loss'] == pytest.approx(held_out[2], abs=1e-5)

  # Counted by the banner as it stands in the file.
  size = sum(
    x.size
    for key, x in load_file(adapter / 'adapter_model.safetensors').items()
    if 'lm_head' not in key or not tied or parts
  )
  assert f'trainable  {size:,} of' in capsys.readouterr().out

  # Merged, which parts a tied head where it has to.
  out = tmp_path / 'merged'
  done = fidelity.merge(str(model), str(adapter), str(out))
  assert done['untied'] == parts
  assert ('untied' in fidelity.text(done)) == parts
  loaded = load_model(model, adapter=str(adapter))
  apply, merged = load_params(out)
  want = np.asarray(loaded.apply(loaded.params, IDS))
  np.testing.assert_allclose(apply(merged, IDS), want, atol=1e-4)
  base = np.asarray(loaded.apply(loaded.base, IDS))
  assert np.abs(base - want).max() > 1e-3


def test_a_mesh_changes_nothing(tmp_path, rows_file):
  keys = {
    'targets': 'q_proj,embed_tokens',
    'modules_to_save': 'norm,down_proj',
  }
  model = write_model(tmp_path / 'model')
  written = []
  for n, sizes in enumerate(((2, 2, 2), (1, 1, 1))):
    mapping = config.to_mapping(
      make_config(model, rows_file, tmp_path / f'run{n}', keys)
    )
    mapping['mesh'] = dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
    with pytest.MonkeyPatch.context() as patch:
      devices = jax.devices()[: np.prod(sizes)]
      patch.setattr(jax, 'devices', lambda devices=devices: devices)
      adapter = loop.run(config.from_mapping(mapping))
    written.append(load_file(adapter / 'adapter_model.safetensors'))
  assert written[0].keys() == written[1].keys()
  for key, x in written[0].items():
    np.testing.assert_allclose(x, written[1][key], atol=1e-4, err_msg=key)


@pytest.mark.parametrize(('keys', 'message'), [
  ({'targets': 'lm_head'}, 'model.untie=True parts them'),
  ({'targets': 'embed_tokens', 'variant': 'dora'}, 'DoRA of an embedding'),
  ({'targets': 'embed_tokens', 'init': 'pissa'}, 'is not for an embedding'),
  ({'targets': 'q_proj', 'trainable_token_indices': '260'}, 'past the last'),
  ({'targets': 'norm'}, 'which modules_to_save could train'),
  ({'targets': 'lm_head', 'untie': True, 'trainable_token_indices': '5'},
   'model.untie with lora.trainable_token_indices'),
])  # fmt: skip
def test_what_a_tied_model_cannot_have(keys, message, tmp_path, rows_file):
  model = write_model(tmp_path / 'model', tie_word_embeddings=True)
  untie = keys.pop('untie', False)
  cfg = make_config(model, rows_file, tmp_path / 'run', keys, untie=untie)
  with pytest.raises(ConfigError, match=message):
    loop.run(cfg)
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_model_of_one_layer(tmp_path, rows_file):
  model = write_model(tmp_path / 'model', num_hidden_layers=1)
  keys = {'targets': 'q_proj', 'modules_to_save': 'norm'}
  adapter = loop.run(make_config(model, rows_file, tmp_path / 'run', keys))
  tensors = load_file(adapter / 'adapter_model.safetensors')
  norms = {key: x.shape for key, x in tensors.items() if 'norm' in key}
  assert len(norms) == 3
  assert set(norms.values()) == {(32,)}
  loaded = load_model(model, adapter=str(adapter))
  assert np.isfinite(loaded.apply(loaded.params, IDS)).all()


def test_a_tied_model_stored_under_the_heads_name(tmp_path, rows_file):
  model = write_model(tmp_path / 'model', tie_word_embeddings=True)
  file = model / 'model.safetensors'
  tensors = load_file(file)
  tensors['lm_head.weight'] = tensors.pop('model.embed_tokens.weight')
  save_file(tensors, file)
  cfg = make_config(
    model, rows_file, tmp_path / 'run', {'targets': 'lm_head'}, untie=True
  )
  adapter = loop.run(cfg)
  base, adapted = (load_model(model, adapter=a) for a in (None, str(adapter)))
  np.testing.assert_array_equal(
    base.apply(base.params, IDS), adapted.apply(adapted.base, IDS)
  )


def test_an_adapter_that_one_leaf_cannot_hold_is_one_line(tmp_path):
  model = write_model(tmp_path / 'model')
  adapter = tmp_path / 'adapter'
  adapter.mkdir()
  config = {
    'peft_type': 'LORA', 'target_modules': ['q_proj'], 'r': 1,
    'modules_to_save': ['layers.2.self_attn.q_proj'],
  }  # fmt: skip
  (adapter / 'adapter_config.json').write_text(json.dumps(config))
  prefix = 'base_model.model.model.layers'
  tensors = {f'{prefix}.2.self_attn.q_proj.weight': np.ones((40, 32))}
  for layer in range(2):
    key = f'{prefix}.{layer}.self_attn.q_proj.lora_'
    tensors |= {
      f'{key}A.weight': np.ones((1, 32)), f'{key}B.weight': np.ones((40, 1))
    }  # fmt: skip
  save_file(
    {k: x.astype(np.float32) for k, x in tensors.items()},
    adapter / 'adapter_model.safetensors',
  )
  with pytest.raises(ModelError, match='does not fit the model: layers/self_'):
    load_model(model, adapter=str(adapter))
