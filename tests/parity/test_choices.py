"""Scores of choices against transformers', live, as MeZO makes them.

Reference: each choice by itself through a torch model, the mean of the
log-likelihoods of its last tokens as its score, torch's cross-entropy over the
scores of a row; and of PEFT's adapter the gradients of that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora, parallel
from lorax_train.data import sequences
from lorax_train.data.encoded import Sizes
from lorax_train.data.sequences import EncodedChoices
from lorax_train.data.tokenized import Report, TokenizedSet
from lorax_train.formats import hf, hf_config, peft
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.train import step as step_lib

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('peft')

from . import reference  # noqa: E402

SIZES = Sizes(choices=3, length=16, choice=5)


def rows(n=6):
  """(prompt, choices), the right one first, some rows with two."""
  rng = np.random.default_rng(1)
  ids = lambda low, high: rng.integers(3, 83, rng.integers(low, high)).tolist()  # noqa: E731
  return [(ids(1, 11), [ids(1, 6) for _ in range(2 + i % 2)]) for i in range(n)]


def tokenized(examples):
  encoded = [
    sequences.fitted(EncodedChoices(prompt, texts, 0, False), 16, 'drop')
    for prompt, texts in examples
  ]
  columns = ([np.array(getattr(e, name)) for e in encoded] for name in ('ids', 'labels'))  # fmt: skip
  report = Report(6, 6, {}, 0, 0, 0, 0, 0, 16)
  return TokenizedSet(*columns, [''] * len(encoded), report, '')


def torch_scores(model, prompt, texts):
  scores = []
  for text in texts:
    ids = torch.tensor([prompt + text])
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    own = log_p[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
    scores.append(own[-len(text) :].mean())
  return torch.stack(scores)


def test_loss_accuracy_and_gradients(tmp_path):
  model = reference.make_model(11)
  reference.save_model(model, tmp_path / 'base')
  model = reference.make_adapter(
    reference.load_model(tmp_path / 'base'), 12, target_modules=['q_proj', 'v_proj']
  )  # fmt: skip
  model.save_pretrained(tmp_path / 'adapter')
  every = [torch_scores(model, *row) for row in rows()]
  right = torch.tensor([0])
  want = sum(torch.nn.functional.cross_entropy(s[None], right) for s in every)
  want.backward()
  hits = sum(int(s.argmax()) == 0 for s in every)
  norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))  # fmt: skip
  assert 0 < hits < len(every)

  cfg = hf_config.read_config(tmp_path / 'base')
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = hf.load_params(tmp_path / 'base', cfg, jnp.float32, mesh)
  loaded = peft.load_adapter(tmp_path / 'adapter')
  names = params_lib.module_names(cfg)
  frozen, trainable = lora.split(
    jax.random.key(0), params, peft.placement(loaded, names), names
  )
  trainable = peft.fill(loaded, frozen, trainable, names)
  decoder = Decoder(cfg, head=False)
  apply = lambda p, ids: decoder.apply({'params': p}, ids)  # noqa: E731
  micro = sequences.take(tokenized(rows()), range(6), SIZES, 16, 0)
  loss = jax.value_and_grad(step_lib.make_loss(apply), has_aux=True)
  (total, n), grads = jax.jit(loss)(trainable, frozen, micro, None)
  found = jax.jit(step_lib.make_eval_step(apply))(trainable, frozen, micro)
  assert int(n) == int(found['accuracy'][1]) == 6
  np.testing.assert_allclose(total, want.item(), rtol=1e-4)
  np.testing.assert_allclose(found['loss'][0], want.item(), rtol=1e-4)
  assert int(found['accuracy'][0]) == hits
  squares = sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
  np.testing.assert_allclose(squares**0.5, norm.item(), rtol=1e-3)
