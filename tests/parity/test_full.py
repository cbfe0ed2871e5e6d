"""Runs of all weights against transformers on torch, step by step.

References: torch.optim.AdamW, with the decay groups of transformers' Trainer, and
transformers' Adafactor as the Trainer sets it up; the model directory that is
written, as transformers reads it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import config, parallel
from lorax_train.formats import hf_config
from lorax_train.train import base, export, optim, setup
from lorax_train.train import state as state_lib

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')
pytest.importorskip('peft')

from transformers.optimization import Adafactor  # noqa: E402

from . import reference  # noqa: E402

STEPS, RATE, DECAY = 5, 3e-3, 0.1
# With Adam's usual one, what is rounded of a gradient near 0 is a whole step.
EPSILON = 1e-4
# Of Adafactor the matrices are those that optax takes apart, too.
WIDE = {
  'hidden_size': 128,
  'intermediate_size': 160,
  'num_hidden_layers': 2,
  'num_key_value_heads': 4,
  'vocab_size': 130,
}
RUNS = {
  'adamw': {'tie_word_embeddings': False},
  'adamw, tied': {'tie_word_embeddings': True},
  'adafactor': {'tie_word_embeddings': False, **WIDE},
}


def theirs(model, ids, optimizer):
  """The losses of all steps; trains the model."""
  norms, others = [], []
  for name, weight in model.named_parameters():
    (norms if 'norm' in name else others).append(weight)
  groups = [{'params': others, 'weight_decay': DECAY}, {'params': norms}]
  if optimizer == 'adamw':
    tx = torch.optim.AdamW(groups, RATE, eps=EPSILON, weight_decay=0)
  else:
    tx = Adafactor(groups, RATE, scale_parameter=False, relative_step=False)
  seen = []
  for step in range(STEPS):
    tx.zero_grad()
    loss = reference.loss(model, ids[step])
    loss.backward()
    tx.step()
    seen.append(loss.item())
  return seen


@pytest.mark.parametrize('name', RUNS)
def test_steps_of_all_weights_equal_those_of_torch(name, tmp_path):
  model = reference.make_model(31, **RUNS[name])
  directory = reference.save_model(model, tmp_path / 'model')
  ids = reference.random_ids(32, shape=(STEPS, 3, 17))
  optimizer = name.partition(',')[0]
  mapping = config.defaults()
  mapping.update(run_dir=str(tmp_path / 'run'), method='full')
  mapping['model'].update(
    path=str(directory), dtype='float32', param_dtype='float32'
  )
  mapping['data'].update(path='unused')
  mapping['train'].update(
    steps=STEPS, learning_rate=RATE, weight_decay=DECAY, schedule='constant',
    optimizer=optimizer, clip_norm=0.0, epsilon=EPSILON,
  )  # fmt: skip
  cfg = config.from_mapping(mapping)
  model_cfg = hf_config.read_config(directory)
  adapters = setup.plan_adapters(cfg, model_cfg)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  tx = optim.make_optimizer(setup.optim_config(cfg))
  with jax.set_mesh(mesh):
    frozen, trainable = base.halves(cfg, directory, adapters, mesh)
    like = state_lib.abstract_state(tx, frozen, trainable, mesh)
    state = state_lib.init_state(tx, trainable, like)
    step = setup.make_step(cfg, model_cfg, tx, frozen, like, mesh, 'xla')
    got = []
    for each in ids:
      state, out = step(
        state, frozen, {'ids': each[None], 'labels': each[None]}
      )
      got.append(float(out['loss']))
  want = theirs(model, ids, optimizer)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert abs(want[-1] - want[0]) > 0.01

  out = tmp_path / 'run' / 'model'
  export.write_model(
    out, frozen, state.trainable, directory, cfg, None, 'no rows held out'
  )
  written = reference.load_model(out)
  np.testing.assert_allclose(
    reference.logits(written, ids[0]), reference.logits(model, ids[0]),
    atol=2e-3,
  )  # fmt: skip
  for key, mine in written.state_dict().items():
    other = model.state_dict()[key].detach().numpy()
    np.testing.assert_allclose(
      np.asarray(mine, jnp.float32), other, atol=1e-4, err_msg=key
    )
