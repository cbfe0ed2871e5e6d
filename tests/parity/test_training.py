"""Our train step against PEFT and torch's AdamW, from the same adapter.

Reference: PEFT under torch.optim.AdamW with transformers' schedules. Loss and
gradient of a step are sums over all its micro-batches, divided once by the
number of tokens that are learned in all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora, parallel
from lorax_train.formats import hf, hf_config, peft
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.train import optim
from lorax_train.train import step as step_lib

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from . import reference  # noqa: E402

STEPS, MICRO, ROWS, LENGTH = 5, 2, 2, 12

RUNS = {
  'plain': {},
  'decay and clipping': {'weight_decay': 0.1, 'clip_norm': 0.5},
  'betas and a schedule': {
    'beta1': 0.8,
    'beta2': 0.95,
    'schedule': 'cosine',
    'warmup_steps': 2,
  },
  'linear': {'schedule': 'linear', 'warmup_steps': 1, 'epsilon': 1e-6},
  'LoRA+': {'lora_plus_ratio': 8.0, 'weight_decay': 0.1},
}


def make_batches(seed):
  """{ids, labels} [steps, micro, rows, T]; micro-batches learn 2 to 20 each."""
  rng = np.random.default_rng(seed)
  shape = (STEPS, MICRO, ROWS, LENGTH)
  ids = rng.integers(0, reference.DIMS['vocab_size'], shape, np.int32)
  labels = ids.copy()
  labels[:, 0, :, :2] = -100  # a prompt
  labels[:, 1, 0, 1:] = -100  # nothing but a label that nobody predicts
  labels[:, 1, 1, :-2] = -100  # two tokens
  counts = (labels[..., 1:] != -100).sum((2, 3))
  assert counts.tolist() == [[20, 2]] * STEPS
  return {'ids': ids, 'labels': labels}


def theirs(model, batches, cfg):
  """[(loss, gradient norm, learned tokens)] of each step; trains the model."""
  weights = [w for w in model.parameters() if w.requires_grad]
  # LoRA+ as PEFT's create_loraplus_optimizer groups it.
  named = dict(model.named_parameters())
  groups = [
    {
      'params': [
        w for n, w in named.items() if w.requires_grad and ('lora_B' in n) == b
      ],
      'lr': cfg.learning_rate * (cfg.lora_plus_ratio if b else 1.0),
    }
    for b in (False, True)
  ]
  tx = torch.optim.AdamW(
    groups,
    betas=(cfg.beta1, cfg.beta2),
    eps=cfg.epsilon,
    weight_decay=cfg.weight_decay,
  )
  schedule = transformers.get_scheduler(
    'constant_with_warmup' if cfg.schedule == 'constant' else cfg.schedule,
    tx,
    cfg.warmup_steps,
    cfg.steps,
  )
  seen = []
  for ids, labels in zip(batches['ids'], batches['labels'], strict=True):
    tokens = int((labels[..., 1:] != -100).sum())
    total = 0.0
    for micro in range(MICRO):
      logits = model(torch.tensor(ids[micro].astype(np.int64))).logits
      loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        torch.tensor(labels[micro, :, 1:].astype(np.int64)).flatten(),
        ignore_index=-100,
        reduction='sum',
      )
      (loss / tokens).backward()
      total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(
      weights, cfg.clip_norm or float('inf')
    )
    tx.step()
    schedule.step()
    tx.zero_grad()
    seen.append((total / tokens, norm.item(), tokens))
  return seen


def ours(directory, adapter, batches, cfg):
  """The same of our step, and the adapter at the end."""
  model_cfg = hf_config.read_config(directory)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  names = params_lib.module_names(model_cfg)
  loaded = peft.load_adapter(adapter)
  frozen, trainable = lora.split(
    jax.random.key(0),
    hf.load_params(directory, model_cfg, jnp.float32, mesh),
    peft.placement(loaded, names),
    names,
  )
  tx = optim.make_optimizer(cfg)
  state = step_lib.init_state(peft.fill(loaded, frozen, trainable, names), tx)
  apply = Decoder(model_cfg, remat='full').apply
  train_step = jax.jit(
    step_lib.make_train_step(lambda p, ids: apply({'params': p}, ids), tx)
  )
  seen = []
  for ids, labels in zip(batches['ids'], batches['labels'], strict=True):
    state, metrics = train_step(state, frozen, {'ids': ids, 'labels': labels})
    seen.append(
      tuple(float(metrics[k]) for k in ('loss', 'grad_norm', 'tokens'))
    )
  return seen, peft.to_tensors(frozen, state.trainable, names)


@pytest.mark.parametrize('run', RUNS)
def test_five_steps_equal_pefts(run, tmp_path):
  cfg = optim.OptimConfig(
    **{'steps': STEPS, 'learning_rate': 5e-3, **RUNS[run]}
  )
  base = tmp_path / 'base'
  reference.save_model(reference.make_model(21, sliding_window=5), base)
  model = reference.make_adapter(
    reference.load_model(base),
    22,
    target_modules='all-linear',
    rank_pattern={'q_proj': 2},
    use_rslora=True,
  )
  model.save_pretrained(tmp_path / 'start')
  start = model.state_dict()
  start = {k: v.clone() for k, v in start.items() if 'lora_' in k}
  batches = make_batches(23)
  want = theirs(model, batches, cfg)
  got, end = ours(base, tmp_path / 'start', batches, cfg)
  for mine, other in zip(got, want, strict=True):
    assert mine[0] == pytest.approx(other[0], abs=1e-4)
    assert mine[1] == pytest.approx(other[1], rel=1e-4)
    assert mine[2] == other[2]
  assert len(end) == len(start)
  for key, tensor in model.state_dict().items():
    if 'lora_' not in key:
      continue
    mine = end[key.replace('.default', '')]
    np.testing.assert_allclose(mine, tensor.numpy(), atol=1e-4, rtol=0)
    # It went somewhere: five steps of at most the learning rate each.
    moved = float((tensor - start[key]).abs().max())
    assert 1e-3 < moved < 0.05 * cfg.lora_plus_ratio
