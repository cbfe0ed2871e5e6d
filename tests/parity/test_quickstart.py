"""An adapter of the quickstart in real PEFT, on what the GGUF file became.

Reference: PeftModel.from_pretrained on transformers' model, float32.
"""

import jax
import numpy as np
import pytest

from lorax_train import load, main
from lorax_train.formats import find
from tests.formats import smollm2
from tests.test_quickstart import CONFIG


def test_peft_loads_it(tmp_path):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  from transformers import AutoModelForCausalLM

  code = main.main(
    [
      'main',
      f'--config={CONFIG}',
      f'--config.model.path={smollm2.find()}',
      f'--config.run_dir={tmp_path / "run"}',
      '--config.train.steps=3',
      '--config.train.warmup_steps=0',
      '--config.eval.rows=0',
    ]
  )
  assert code == 0
  adapter = str(tmp_path / 'run' / 'adapter')
  base = find.find_model(str(smollm2.find()))
  plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  tuned = peft.PeftModel.from_pretrained(plain, adapter).eval()
  apply, params, tokenizer = load(str(base), adapter=adapter)
  ids = np.array(tokenizer.encode(['The sky is blue because of Rayleigh.']))
  with torch.no_grad():
    want = tuned(torch.from_numpy(ids)).logits.numpy()
    with tuned.disable_adapter():
      before = tuned(torch.from_numpy(ids)).logits.numpy()
  got = jax.jit(apply)(params, ids.astype(np.int32))
  np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)
  assert np.abs(before - want).max() > 1e-1
