"""The decoder with a cache of what went before.

Reference: its own logits without one, which tests/models/test_mistral.py holds
against transformers'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Cache, Decoder, empty_cache, extend

pytestmark = [pytest.mark.usefixtures('strict'), pytest.mark.compat]

ATOL = 1e-5
LENGTH = 12
IDS = np.random.default_rng(0).integers(0, 61, (3, LENGTH), np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), IDS.shape)


def small(**changes):
  return params_lib.DecoderConfig(
    **{
      'vocab': 61, 'hidden': 32, 'layers': 3, 'heads': 4, 'kv_heads': 2,
      'head_dim': 12, 'mlp': 48, 'init_std': 0.2, **changes,
    }
  )  # fmt: skip


def random_params(cfg):
  init = jax.jit(Decoder(cfg).init)
  return init(jax.random.key(0), jnp.asarray(IDS))['params']


def whole(model, params, ids=IDS):
  apply = jax.jit(lambda params, ids: model.apply({'params': params}, ids))
  return apply(params, ids)


def in_pieces(model, params, pieces, slots=LENGTH, positions=POSITIONS):
  """Logits of IDS, fed in pieces of these lengths through one cache."""
  step = jax.jit(
    lambda params, ids, positions, cache: model.apply(
      {'params': params}, ids, positions, cache=cache
    )
  )
  cache = empty_cache(model.cfg, len(IDS), slots, model.dtype)
  logits, slot = [], 0
  for n in pieces:
    piece = slice(slot, slot + n)
    one, new = step(params, IDS[:, piece], positions[:, piece], cache)
    assert isinstance(new, Cache)
    cache = extend(cache, new, slot)
    logits.append(one)
    slot += n
  assert slot == LENGTH
  return np.concatenate(logits, axis=1)


# Changes of the configuration.
CASES = {
  'grouped heads': {},
  'one kv head, tied': {'kv_heads': 1, 'tied': True},
  'as many kv heads': {'kv_heads': 4},
  'window of itself': {'window': 1},
  'window': {'window': 5},
  'window of all': {'window': LENGTH},
}


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_those_without_a_cache(case):
  cfg = small(**CASES[case])
  model, params = Decoder(cfg), random_params(cfg)
  want = whole(model, params)
  at_once = in_pieces(model, params, [LENGTH])
  np.testing.assert_allclose(at_once, want, atol=ATOL, rtol=0)
  # With slots that are never filled.
  by_token = in_pieces(model, params, [1] * LENGTH, slots=LENGTH + 9)
  np.testing.assert_allclose(by_token, want, atol=ATOL, rtol=0)


def test_adapted_weights_go_through_a_cache_as_well():
  cfg = small(window=5)
  frozen, trainable = lora.split(
    jax.random.key(1),
    random_params(cfg),
    lora.LoraSpec('all-linear', rank=3),
    params_lib.module_names(cfg),
  )
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)
  params, model = lora.bind(frozen, trainable), Decoder(cfg)
  want = whole(model, params)
  got = in_pieces(model, params, [6, 6])
  np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize('window', [None, 4])
def test_padding_is_not_there(window):
  """Rows padded on the left, or in their middle, give what they give alone."""
  cfg = small(window=window)
  model, params = Decoder(cfg), random_params(cfg)
  real = np.ones(IDS.shape, bool)
  real[1, :5] = real[2, 3:6] = False
  positions = np.where(real, np.cumsum(real, axis=1) - 1, -1).astype(np.int32)
  positions[1, :5] = np.arange(-5, 0)  # any negative number will do
  got = in_pieces(model, params, [8, 1, 1, 1, 1], positions=positions)
  for row in range(len(IDS)):
    want = whole(model, params, IDS[row][real[row]][None])[0]
    np.testing.assert_allclose(got[row][real[row]], want, atol=ATOL, rtol=0)


def test_a_cache_is_in_the_compute_dtype():
  cfg = small()
  model = Decoder(cfg, jnp.bfloat16)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(cfg))
  cache = empty_cache(cfg, 3, 0, jnp.bfloat16)
  logits, new = jax.eval_shape(
    lambda params: model.apply({'params': params}, IDS, POSITIONS, cache=cache),
    params,
  )
  assert logits.dtype == jnp.float32
  assert {new.k_LBSKH.dtype, new.v_LBSKH.dtype} == {jnp.dtype('bfloat16')}
  assert new.k_LBSKH.shape == (3, 3, LENGTH, 2, 12)
  want = whole(model, params)
  gap = 0.03 * float(jnp.abs(want).max())  # 2^-8, a few roundings deep
  got = in_pieces(model, params, [6, 6])
  np.testing.assert_allclose(got, want, atol=gap, rtol=0)


def test_training_makes_no_keys_and_values_to_keep():
  """Without a cache nothing is stacked over layers but what backward wants."""
  cfg = small()
  params = params_lib.abstract(cfg, jnp.float32)
  jaxpr = jax.make_jaxpr(
    lambda params, ids: Decoder(cfg).apply({'params': params}, ids)
  )(params, IDS)
  scans = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == 'scan']
  assert [len(scan.outvars) for scan in scans] == [1]
