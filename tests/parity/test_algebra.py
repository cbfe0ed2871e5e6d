"""Adapters combined by us and by PEFT: the same dW in every module.

Reference: PEFT's own `add_weighted_adapter` on adapters with random B; what it
draws for DARE is recorded and handed to us.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train.lora import algebra, mixing
from lorax_train.lora.algebra import Update

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('peft')

from . import reference  # noqa: E402

ATOL = 1e-5
RANK = 4
# Ranks of the three adapters where PEFT lets them differ, and where not.
RANKS = {True: (4, 2, 3), False: (RANK,) * 3}
TARGETS = (
  ['q_proj', 'v_proj', 'down_proj'],
  ['q_proj', 'down_proj'],
  ['q_proj', 'v_proj'],
)
ALPHAS = (8, 3, 5)
ADAPTERS = ('one', 'two', 'three')
WEIGHTS = {
  'positive': (0.7, 0.4, 1.2),
  'negative': (0.7, -1.1, 0.5),
}


def their_model(ranks):
  """A tiny Mistral under three adapters, B random."""
  model = reference.make_model(3)
  configs = [
    {'r': r, 'lora_alpha': alpha, 'target_modules': targets, 'use_rslora': rs}
    for r, alpha, targets, rs in zip(
      ranks, ALPHAS, TARGETS, (False, True, False), strict=True
    )
  ]
  model = reference.make_adapter(model, 5, **configs[0])
  model.add_adapter('one', reference.peft.LoraConfig(**configs[0]))
  for name, config in zip(ADAPTERS[1:], configs[1:], strict=True):
    model.add_adapter(name, reference.peft.LoraConfig(**config))
  torch.manual_seed(6)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_B' in name:
        weight.normal_(0.0, 0.3)
  return model


def modules_of(model):
  """(path, layer, module) of each linear with adapters, in PEFT's order."""
  for name, module in model.named_modules():
    found = re.search(r'layers\.(\d+)\.\w+\.(\w+)$', name)
    if found and hasattr(module, 'lora_A'):
      yield found[2], int(found[1]), module


def update_of(model, adapter):
  """Its factors, the layers stacked as in our models."""
  factors = {}
  for path, _, module in modules_of(model):
    here = factors.setdefault(path, [])
    if adapter in module.lora_A:
      a, b = (
        m[adapter].weight.detach().numpy()
        for m in (module.lora_A, module.lora_B)
      )
      here.append((a, b.T, module.scaling[adapter]))
  return {
    path: Update(
      *(jnp.asarray(np.stack(x), jnp.float32) for x in zip(*rows, strict=True)),
      ranks=(len(rows[0][0]),) * len(rows),
    )
    if rows
    else None
    for path, rows in factors.items()
  }


def masks_of(model, drawn, dense):
  """Masks that PEFT drew, module by module, as `mixing.dare` takes them."""
  drawn = iter(drawn)
  trees = [{} for _ in ADAPTERS]
  for path, _, module in modules_of(model):
    have = [i for i, name in enumerate(ADAPTERS) if name in module.lora_A]
    # All the adapters' A before all their B; or each one's dW.
    parts = [
      [next(drawn).numpy().astype(bool) for _ in have]
      for _ in range(1 if dense else 2)
    ]
    for i, tree in enumerate(trees):
      rows = tree.setdefault(path, [])
      if i in have:
        own = [part[have.index(i)] for part in parts]
        # dW and B are [out, ...] there; the masks are compared as we lay out.
        rows.append((own[0].T,) if dense else (own[0], own[1].T))
  assert next(drawn, None) is None
  return [
    {
      path: tuple(np.stack(x) for x in zip(*rows, strict=True))
      if rows
      else None
      for path, rows in tree.items()
    }
    for tree in trees
  ]


# kind: (arguments of add_weighted_adapter, ours of the same meaning).
KINDS = {
  'cat': ({}, lambda u, w, m: algebra.cat(u, w)),
  'svd': ({'svd_rank': 3}, lambda u, w, m: algebra.svd(u, w, 3)),
  'linear': ({}, lambda u, w, m: mixing.mix_factors(u, w)),
  'magnitude_prune': (
    {'density': 0.37},
    lambda u, w, m: mixing.magnitude_prune(u, w, 0.37),
  ),
  'ties': ({'density': 0.43}, lambda u, w, m: mixing.ties(u, w, 0.43)),
  'ties, frequency': (
    {'density': 0.6, 'majority_sign_method': 'frequency'},
    lambda u, w, m: mixing.ties(u, w, 0.6, 'frequency'),
  ),
  'dare_linear': (
    {'density': 0.5},
    lambda u, w, m: mixing.dare(u, w, 0.5, masks=m),
  ),
  'dare_ties': (
    {'density': 0.7},
    lambda u, w, m: mixing.dare(u, w, 0.7, masks=m, majority='total'),
  ),
  'magnitude_prune_svd': (
    {'density': 0.37, 'svd_rank': 6},
    lambda u, w, m: mixing.magnitude_prune(u, w, 0.37, rank=6),
  ),
  'ties_svd': (
    {'density': 0.43, 'svd_rank': 5},
    lambda u, w, m: mixing.ties(u, w, 0.43, rank=5),
  ),
  'ties_svd, frequency': (
    {'density': 0.6, 'svd_rank': 5, 'majority_sign_method': 'frequency'},
    lambda u, w, m: mixing.ties(u, w, 0.6, 'frequency', rank=5),
  ),
  'dare_linear_svd': (
    {'density': 0.5, 'svd_rank': 7},
    lambda u, w, m: mixing.dare(u, w, 0.5, masks=m, rank=7),
  ),
  'dare_ties_svd': (
    {'density': 0.7, 'svd_rank': 7, 'majority_sign_method': 'frequency'},
    lambda u, w, m: mixing.dare(
      u, w, 0.7, masks=m, majority='frequency', rank=7
    ),
  ),
}


@pytest.mark.parametrize('signs', WEIGHTS)
@pytest.mark.parametrize('kind', KINDS)
def test_combined_as_peft_combines(kind, signs, monkeypatch):
  theirs, ours = KINDS[kind]
  name = kind.partition(',')[0]
  dense = name.endswith('svd')
  weights = WEIGHTS[signs]
  model = their_model(RANKS[dense or name == 'cat'])
  updates = [update_of(model, adapter) for adapter in ADAPTERS]

  drawn = []
  bernoulli = torch.bernoulli

  def recorded(*args, **kwargs):
    drawn.append(bernoulli(*args, **kwargs))
    return drawn[-1]

  monkeypatch.setattr(torch, 'bernoulli', recorded)
  model.add_weighted_adapter(
    list(ADAPTERS), list(weights), 'sum', combination_type=name, **theirs
  )
  assert bool(drawn) == name.startswith('dare')
  masks = masks_of(model, drawn, dense) if drawn else None

  got = ours(updates, weights, masks)
  seen = set()
  for path, layer, module in modules_of(model):
    want = module.get_delta_weight('sum').detach().numpy().T
    u = got[path]
    dw = u.scale[layer] * (u.a[layer].T @ u.b[layer])
    assert np.abs(want).max() > 0.02
    np.testing.assert_allclose(dw, want, atol=ATOL, rtol=0)
    seen.add((path, layer))
  assert len(seen) == 9
