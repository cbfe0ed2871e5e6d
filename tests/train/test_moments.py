"""lora.init=whitened and qera in a run: what they look at, where they start.

Reference: the first layer's inputs by numpy, from the test's own weights and rows.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import __main__ as verbs
from lorax_train import lora
from lorax_train.errors import ResumeError
from lorax_train.formats import hf_config
from lorax_train.quant import nf4, quantise
from lorax_train.train import base, loop, reading, replay, setup
from tests.toys import random_tensors, write_model
from tests.train.test_loop import make_config


def whitened(model, rows, run_dir, **sections):
  own = {'targets': 'q_proj,lm_head', 'rank': 4, 'init': 'whitened',
         'variant': 'lora_fa', **sections.pop('lora', {})}  # fmt: skip
  sections = {'data': {'template': 'tokens'}, **sections}
  return make_config(model, rows, run_dir, lora=own, **sections)


def begun(cfg, model):
  """(frozen, trainable, inputs of the first layer's q_proj [N, in] by numpy)."""
  adapters = setup.plan_adapters(cfg, hf_config.read_config(model))
  mesh = setup.make_mesh(cfg)
  with jax.set_mesh(mesh):
    rows = reading.read_rows(cfg, model, adapters.model_cfg)
    frozen, trainable = base.halves(cfg, model, adapters, mesh, rows)
    batches = (rows.batch(cfg, mesh, step)[0] for step in range(32))
  tensors = random_tensors(json.loads((model / 'config.json').read_text()))
  embed = tensors['model.embed_tokens.weight'].astype(np.float64)
  gain = tensors['model.layers.0.input_layernorm.weight']
  taken = []
  for batch in batches:
    ids, labels = (np.asarray(batch[k])[0] for k in ('ids', 'labels'))
    # The last token of a row is read by nobody.
    taken += [row[: (own != -100).sum() - 1] for row, own in zip(ids, labels, strict=True)]  # fmt: skip
    if sum(map(len, taken)) >= 4 * embed.shape[1]:
      break
  x = embed[np.concatenate(taken)]
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain
  return frozen, trainable, x


def test_a_run_begins_along_its_inputs(tokens_file, tmp_path):
  model = write_model(tmp_path / 'model')
  cfg = whitened(model, tokens_file, tmp_path / 'run')
  frozen, trainable, x = begun(cfg, model)
  assert trainable['lm_head'].a is None  # LoRA-FA: it stays
  features = x @ np.asarray(frozen['layers']['self_attn']['q_proj'].a)[0].T
  np.testing.assert_allclose(features.T @ features / len(x), np.eye(4), atol=5e-3)  # fmt: skip


@pytest.mark.slow
def test_a_quantised_base_begins_with_what_its_outputs_lost(
  tokens_file, tmp_path
):
  model = write_model(tmp_path / 'model')
  own = {'init': 'qera', 'targets': 'q_proj', 'variant': 'lora'}
  cfg = whitened(model, tokens_file, tmp_path / 'run', lora=own)
  cfg = dataclasses.replace(
    cfg, model=dataclasses.replace(cfg.model, quant='nf4')
  )
  frozen, trainable, x = begun(cfg, model)
  w = random_tensors(json.loads((model / 'config.json').read_text()))
  w = w['model.layers.0.self_attn.q_proj.weight']
  q = nf4.from_bitsandbytes(quantise(w)).dequantised('float32')
  lost = x @ (w.T - np.asarray(q))
  u, s, vt = np.linalg.svd(lost, full_matrices=False)
  got = lora.merge(frozen, trainable)['layers']['self_attn']['q_proj'][0] - q
  best = (u[:, :4] * s[:4]) @ vt[:4]
  np.testing.assert_allclose(x @ np.asarray(got), best, atol=2e-3 * s[0])
  assert np.linalg.norm(lost - x @ np.asarray(got)) < np.linalg.norm(lost)


@pytest.mark.slow
def test_a_run_of_mezo_is_replayed_from_its_rows(tokens_file, tmp_path):
  model, run_dir = write_model(tmp_path / 'model'), tmp_path / 'run'
  cfg = whitened(model, tokens_file, run_dir)
  cfg = dataclasses.replace(cfg, method='mezo')
  loop.run(cfg)
  out = tmp_path / 'again'
  assert verbs.cli(['replay', str(run_dir), '--out', str(out)]) == 0
  made, again = (load_file(d / 'adapter_model.safetensors') for d in (run_dir / 'adapter', out))  # fmt: skip
  assert made.keys() == again.keys()
  assert any(made[name].any() for name in made if 'lora_B' in name)
  for name in made:
    np.testing.assert_array_equal(made[name], again[name])

  fewer = tokens_file.read_text().splitlines()[1:]
  tokens_file.write_text('\n'.join(fewer))
  with pytest.raises(ResumeError, match='the rows are not those'):
    replay.replay(str(run_dir), str(tmp_path / 'other'))
