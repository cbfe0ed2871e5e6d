"""The main job on real weights and rows, and real PEFT on what comes out.

Reference: PeftModel.from_pretrained on transformers' model, float32.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest


def test_the_reference_run_trains_an_adapter_that_peft_loads(shared, tmp_path):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  from transformers import AutoModelForCausalLM

  from lorax_train import load, main

  model_dir = str(shared / 'models' / 'stories260K-mistral')
  run_dir = tmp_path / 'run'
  code = main.main(
    [
      'main',
      '--config=configs/mistral_lora.py',
      f'--config.model.path={model_dir}',
      f'--config.data.path={shared / "data" / "alpaca_gpt4_999.json"}',
      '--config.train.steps=8',
      '--config.train.batch_size=8',
      '--config.train.grad_accum=2',
      '--config.eval.rows=16',
      f'--config.run_dir={run_dir}',
    ]
  )
  assert code == 0
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  held_out = [
    line['eval_loss'] for line in map(json.loads, lines) if 'eval_loss' in line
  ]
  assert len(held_out) == 2
  assert held_out[1] < held_out[0] - 0.01

  adapter = str(run_dir / 'adapter')
  base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
  tuned = peft.PeftModel.from_pretrained(base, adapter).eval()
  apply, params, tokenizer = load(model_dir, adapter=adapter)
  ids = np.array([[1, *tokenizer.encode(['Once upon a time'])[0]]])
  with torch.no_grad():
    want = tuned(torch.from_numpy(ids)).logits.numpy()
    with tuned.disable_adapter():
      plain = tuned(torch.from_numpy(ids)).logits.numpy()
  got = apply(params, jnp.asarray(ids, jnp.int32))
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
  assert np.abs(plain - want).max() > 1e-2
