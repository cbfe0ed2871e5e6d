"""Every variant against PEFT: logits, gradients, ten steps of AdamW.

Reference: PEFT on torch from its own initial state, float32. Inits that PEFT
draws are compared by what defines them; those it takes from the base by the
product B A (signs are free).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_train import lora, parallel
from lorax_train.formats import hf, hf_config, peft
from lorax_train.lora import Adapter, Fixed
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.train import step as step_lib

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from . import reference  # noqa: E402

# Of what PEFT can't convert any more; we read its first numbers only.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Using Rank-Stabilized LoRA:UserWarning'
)
STEPS, LEARNING_RATE, DECAY = 10, 1e-2, 0.01
LINEAR = [
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
]
PATTERNS = {
  'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 6},
  'alpha_pattern': {'v_proj': 3, 'layers.2.*': 20},
}
# name: (LoraConfig keywords, our variant, our init)
CASES = {
  'lora': ({}, 'lora', 'default'),
  'rslora': ({'use_rslora': True}, 'rslora', 'default'),
  'dora': ({'use_dora': True}, 'dora', 'default'),
  'dora, rslora': (
    {'use_dora': True, 'use_rslora': True},
    'dora+rslora',
    'default',
  ),
  'dora, patterns': ({'use_dora': True, **PATTERNS}, 'dora', 'default'),
  'dora, one layer': (
    {'use_dora': True, 'layers_to_transform': [1]},
    'dora',
    'default',
  ),
  'pissa': ({'init_lora_weights': 'pissa'}, 'lora', 'pissa'),
  'pissa, rslora, patterns': (
    {'init_lora_weights': 'pissa', 'use_rslora': True, **PATTERNS},
    'rslora',
    'pissa',
  ),
  'olora': ({'init_lora_weights': 'olora'}, 'lora', 'olora'),
  'olora, patterns': (
    {'init_lora_weights': 'olora', **PATTERNS},
    'lora',
    'olora',
  ),
  'orthogonal': (
    {'init_lora_weights': 'orthogonal'},
    'lora',
    'orthogonal',
  ),
  'gaussian': ({'init_lora_weights': 'gaussian'}, 'lora', 'gaussian'),
  'lora_fa': ({}, 'lora_fa', 'default'),
  'lora_fa, dora': ({'use_dora': True}, 'lora_fa+dora', 'default'),
  'exclude': ({'exclude_modules': ['v_proj']}, 'lora', 'default'),
  'patterns': (PATTERNS, 'lora', 'default'),
}
IDS = reference.random_ids(5, shape=(2, 12))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  model = reference.make_model(11, sliding_window=5)
  return reference.save_model(model, tmp_path_factory.mktemp('base'))


def their_adapter(directory, config, variant):
  """PEFT's model at its start; A frozen by hand for LoRA-FA."""
  keywords = {'r': 4, 'lora_alpha': 8, 'target_modules': LINEAR, **config}
  torch.manual_seed(3)
  model = their_peft.get_peft_model(
    reference.load_model(directory),
    their_peft.LoraConfig(task_type='CAUSAL_LM', **keywords),
  )
  for name, weight in model.named_parameters():
    if 'lora_fa' in variant and 'lora_A' in name:
      weight.requires_grad_(False)
  return model


def named(model, value=lambda w: w):
  """{name without PEFT's adapter name: array} of what has one."""
  found = {}
  for name, weight in model.named_parameters():
    if 'lora_' in name and value(weight) is not None:
      key = name.replace('.default', '').removesuffix('_vector.weight')
      found[key.removeprefix(peft.PREFIX)] = value(weight).detach().numpy()
  return found


class Ours:
  """Our model under the same adapter, started from PEFT's numbers."""

  def __init__(self, directory, config, variant, init, start):
    cfg = hf_config.read_config(directory)
    self.names = params_lib.module_names(cfg)
    self.spec = lora.LoraSpec(
      targets=','.join(LINEAR),
      rank=4,
      alpha=8.0,
      variant=variant,
      init=init,
      exclude=','.join(config.get('exclude_modules', ())),
      rank_pattern=config.get('rank_pattern', {}),
      alpha_pattern=config.get('alpha_pattern', {}),
      layers_to_transform=tuple(config.get('layers_to_transform', ())),
    )
    self.params = hf.load_params(
      directory,
      cfg,
      jnp.float32,
      parallel.make_mesh(devices=jax.devices()[:1]),
    )
    self.fresh = lora.split(
      jax.random.key(0), self.params, self.spec, self.names
    )
    self.frozen, self.trainable = self.filled(*self.fresh, start)
    model = Decoder(cfg)
    self.apply = lambda params, ids: model.apply({'params': params}, ids)

  def filled(self, frozen, trainable, start):
    """Both halves with PEFT's numbers in place of our own."""

    def put(path, fixed, adapter):
      if adapter is None:
        return fixed, adapter
      of_path = self.names[lora.path_of(path)]

      def stacked(like, part, turn=lambda x: x):
        if like is None:
          return None
        out = np.zeros(like.shape, np.float32)
        for i, (name, rank) in enumerate(
          zip(of_path, fixed.ranks, strict=True)
        ):
          if rank:
            x = turn(start[f'{name}.{part}'])
            out[i][tuple(slice(n) for n in x.shape)] = x
        return jnp.asarray(out)

      every_a = fixed.a if adapter.a is None else adapter.a
      a = stacked(every_a, 'lora_A.weight')
      b = stacked(adapter.b, 'lora_B.weight', np.transpose)
      m = stacked(adapter.m, 'lora_magnitude')
      changes = {}
      if adapter.a is None:
        changes['a'] = a
      if fixed.a0 is not None:
        changes |= {'a0': a, 'b0': b}
      return (
        dataclasses.replace(fixed, **changes),
        Adapter(None if adapter.a is None else a, b, m),
      )

    both = jax.tree_util.tree_map_with_path(
      put, frozen, trainable, is_leaf=lambda x: isinstance(x, Fixed)
    )
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    return tuple(
      jax.tree.map(lambda pair, k=k: pair[k], both, is_leaf=is_pair)
      for k in (0, 1)
    )

  def named(self, trainable):
    """As `named` of theirs."""
    found = {}
    halves = jax.tree_util.tree_leaves_with_path(
      self.frozen, is_leaf=lambda x: isinstance(x, Fixed)
    )
    adapters = dict(
      (lora.path_of(path), leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        trainable, is_leaf=lambda x: isinstance(x, Adapter)
      )
    )
    for path, fixed in halves:
      if not isinstance(fixed, Fixed):
        continue
      adapter = adapters[lora.path_of(path)]
      for i, (name, rank) in enumerate(
        zip(self.names[lora.path_of(path)], fixed.ranks, strict=True)
      ):
        if not rank:
          continue
        if adapter.a is not None:
          found[f'{name}.lora_A.weight'] = np.asarray(adapter.a[i][:rank])
        found[f'{name}.lora_B.weight'] = np.asarray(adapter.b[i][:rank]).T
        if adapter.m is not None:
          found[f'{name}.lora_magnitude'] = np.asarray(adapter.m[i])
    return found

  def loss(self, trainable):
    params = lora.bind(self.frozen, trainable)
    total, n = step_lib.next_token_loss(self.apply(params, IDS), IDS)
    return total / n


@pytest.mark.parametrize('case', CASES)
def test_a_variant_computes_and_learns_as_pefts(case, directory):
  config, variant, init = CASES[case]
  model = their_adapter(directory, config, variant)
  start = named(model)
  ours = Ours(directory, config, variant, init, start)

  # --- the function and its gradients
  step = jax.jit(jax.value_and_grad(ours.loss))
  logits = ours.apply(lora.bind(ours.frozen, ours.trainable), IDS)
  np.testing.assert_allclose(
    logits, reference.logits(model, IDS), atol=1e-4, rtol=0
  )
  reference.loss(model, IDS).backward()
  want = named(model, lambda w: w.grad)
  _, grads = step(ours.trainable)
  got = ours.named(grads)
  assert got.keys() == want.keys()
  for name in want:
    error = np.linalg.norm(got[name] - want[name])
    assert error <= 1e-4 * np.linalg.norm(want[name]) + 1e-7, name

  # --- ten steps
  reference.train(model, IDS, STEPS, LEARNING_RATE, DECAY)
  tx = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
  trainable, state = ours.trainable, tx.init(ours.trainable)
  for _ in range(STEPS):
    _, grads = step(trainable)
    updates, state = tx.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
  want = named(model, lambda w: w if w.requires_grad else None)
  got = ours.named(trainable)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-3, err_msg=name)
  after = reference.logits(model, IDS)
  bound = ours.apply(lora.bind(ours.frozen, trainable), IDS)
  merged = ours.apply(lora.merge(ours.frozen, trainable), IDS)
  np.testing.assert_allclose(bound, after, atol=2e-3)
  np.testing.assert_allclose(merged, bound, atol=1e-4)


@pytest.mark.parametrize(
  'case', [c for c in CASES if CASES[c][2] in ('pissa', 'olora')]
)
def test_what_begins_from_the_base_begins_as_pefts(case, directory):
  config, variant, init = CASES[case]
  start = named(their_adapter(directory, config, variant))
  ours = Ours(directory, config, variant, init, start)
  # The same product, and the function of the base alone.
  mine = ours.named(ours.fresh[1])
  for name in mine:
    if not name.endswith('lora_A.weight'):
      continue
    other = name.replace('lora_A', 'lora_B')
    np.testing.assert_allclose(
      mine[other] @ mine[name], start[other] @ start[name], atol=1e-5
    )
  np.testing.assert_allclose(
    ours.apply(lora.bind(*ours.fresh), IDS),
    ours.apply(ours.params, IDS),
    atol=1e-4,
  )


@pytest.mark.parametrize('case', CASES)
def test_peft_reads_what_we_write(case, directory, tmp_path):
  config, variant, init = CASES[case]
  start = named(their_adapter(directory, config, variant))
  ours = Ours(directory, config, variant, init, start)
  grads = jax.grad(ours.loss)(ours.trainable)
  moved = jax.tree.map(lambda x, g: x - g, ours.trainable, grads)
  want = ours.apply(lora.bind(ours.frozen, moved), IDS)
  plain = ours.apply(ours.params, IDS)
  assert np.abs(want - plain).max() > 0.1
  peft.save_adapter(
    tmp_path, ours.frozen, moved, ours.names, ours.spec, str(directory)
  )
  theirs = their_peft.PeftModel.from_pretrained(
    reference.load_model(directory), tmp_path
  ).eval()
  np.testing.assert_allclose(reference.logits(theirs, IDS), want, atol=1e-4)

  # And so do we, without the base that it began from.
  loaded = peft.load_adapter(tmp_path)
  placed = peft.placement(loaded, ours.names)
  frozen, fresh = lora.split(jax.random.key(1), ours.params, placed, ours.names)
  again = peft.fill(loaded, frozen, fresh, ours.names)
  got = ours.apply(lora.bind(frozen, again), IDS)
  np.testing.assert_allclose(got, want, atol=1e-4)
