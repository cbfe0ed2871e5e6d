"""Logits against transformers' (golden files), and the model's own contracts.

Reference: tests/golden, written by scripts/make_golden.py from transformers
and PEFT in float32; ../shared/golden for real weights.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import lora
from lorax_train.formats import hf, hf_config
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.models.remat import POLICIES
from lorax_train.train.step import next_token_loss

pytestmark = pytest.mark.usefixtures('strict')

CASES = [
  'mistral_window',
  'mistral_wide_heads',
  'mistral_tied',
  'llama',
  'llama3_rope',
  'llama_linear_rope',
]
ATOL = 1e-4


def load(directory, mesh, **changes):
  cfg = hf_config.read_config(directory)
  cfg = type(cfg)(**{**cfg.__dict__, **changes})
  return cfg, hf.load_params(directory, cfg, jnp.float32, mesh)


@pytest.mark.compat
@pytest.mark.parametrize('case', CASES)
def test_logits_and_loss_equal_transformers(case, golden, one_device):
  cfg, params = load(golden / case / 'model', one_device)
  want = load_file(golden / case / 'reference.safetensors')
  facts = json.loads((golden / case / 'reference.json').read_text())
  logits = Decoder(cfg).apply({'params': params}, jnp.asarray(want['ids']))
  np.testing.assert_allclose(logits, want['logits'], atol=ATOL, rtol=0)
  total, count = next_token_loss(logits, jnp.asarray(want['labels']))
  assert float(total) / int(count) == pytest.approx(facts['loss'], abs=1e-5)
  assert params_lib.total(cfg) == facts['params']


def test_a_mask_hides_padding_on_either_side(golden, one_device):
  cfg, params = load(golden / 'mistral_tied' / 'model', one_device)
  want = load_file(golden / 'mistral_tied' / 'reference.safetensors')
  mask = want['mask'].astype(bool)
  assert not mask[:, 0].all()
  assert not mask[:, -1].all()
  logits = Decoder(cfg).apply(
    {'params': params}, jnp.asarray(want['ids']), mask_BS=jnp.asarray(mask)
  )
  # Only what is not padding is compared: transformers leaves the rest open.
  np.testing.assert_allclose(
    np.asarray(logits)[mask], want['logits_masked'][mask], atol=ATOL, rtol=0
  )


@pytest.mark.parametrize('window', [None, 16])
def test_real_weights(window, shared, one_device):
  directory = shared / 'models' / 'stories260K-mistral'
  want = load_file(shared / 'golden' / 'stories260K-mistral.safetensors')
  facts = json.loads(
    (shared / 'golden' / 'stories260K-mistral.json').read_text()
  )
  cfg, params = load(directory, one_device, window=window)
  logits = Decoder(cfg).apply(
    {'params': params}, jnp.asarray(want['input_ids'])
  )
  # The file holds the logits of rows 0 and 3 of the eight.
  kept = [0, 3]
  mask = want['attention_mask'][kept].astype(bool)
  np.testing.assert_allclose(
    np.asarray(logits)[kept][mask],
    want[f'logits_window_{window}'][mask],
    atol=ATOL,
    rtol=0,
  )
  if window is None:
    total, count = next_token_loss(
      logits, jnp.asarray(want['labels'], jnp.int32)
    )
    assert int(count) == facts['label_tokens']
    assert float(total) / int(count) == pytest.approx(1.181842, abs=1e-5)


def test_a_tied_matrix_stored_as_lm_head_loads(shared, one_device):
  cfg, params = load(shared / 'models' / 'tinystories-656k', one_device)
  assert cfg.tied
  assert params['embed_tokens'].shape == (2048, 128)
  ids = jnp.asarray([[1, 403, 407, 261, 378]], jnp.int32)
  logits = Decoder(cfg).apply({'params': params}, ids)
  assert bool(jnp.isfinite(logits).all())


def small(**changes):
  return params_lib.DecoderConfig(
    **{
      'vocab': 61, 'hidden': 32, 'layers': 3, 'heads': 4, 'kv_heads': 2,
      'head_dim': 12, 'mlp': 48, 'window': 4, **changes,
    }
  )  # fmt: skip


def random_params(cfg, key=0):
  ids = jnp.zeros((1, 4), jnp.int32)
  return Decoder(cfg).init(jax.random.key(key), ids)['params']


@pytest.mark.parametrize('tied', [False, True])
def test_initialisation_has_the_shapes_of_the_table(tied):
  cfg = small(tied=tied)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_params(cfg)
  )
  assert shapes == params_lib.abstract(cfg, jnp.float32)


@pytest.mark.compat
@pytest.mark.parametrize('remat', POLICIES)
def test_remat_changes_neither_value_nor_gradient(remat):
  cfg, ids = small(), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
  frozen, trainable = lora.split(
    jax.random.key(1),
    random_params(cfg),
    lora.LoraSpec('all-linear', rank=3),
    params_lib.module_names(cfg),
  )

  def loss(trainable, remat):
    params = lora.bind(frozen, trainable)
    logits = Decoder(cfg, remat=remat).apply({'params': params}, ids)
    return jnp.mean(jnp.square(logits))

  value, grads = jax.value_and_grad(loss)(trainable, remat)
  value_none, grads_none = jax.value_and_grad(loss)(trainable, 'none')
  np.testing.assert_allclose(value, value_none, rtol=1e-6)
  jax.tree.map(
    lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-4, atol=1e-6),
    grads,
    grads_none,
  )


def test_bfloat16_gives_float32_logits_near_those_of_float32():
  cfg, ids = small(), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
  params = random_params(cfg)
  full = Decoder(cfg).apply({'params': params}, ids)
  half = Decoder(cfg, jnp.bfloat16).apply(
    {'params': jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}, ids
  )
  assert half.dtype == jnp.float32
  # bfloat16 has 8 bits: 2^-8 of the largest logit, a few roundings deep.
  np.testing.assert_allclose(half, full, atol=0.03 * float(jnp.abs(full).max()))


def test_weights_stored_in_another_dtype_are_cast_for_the_product():
  cfg, ids = small(), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
  params = random_params(cfg)
  stored_half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), stored_half)
  got = Decoder(cfg).apply({'params': stored_half}, ids)
  want = Decoder(cfg).apply({'params': rounded}, ids)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('window', [1, 3, 12, 50])
def test_a_query_sees_window_tokens_and_none_ahead(window):
  cfg = small(window=window, layers=1)
  params = random_params(cfg)
  ids = jnp.arange(12, dtype=jnp.int32)[None]
  apply = jax.jit(lambda ids: Decoder(cfg).apply({'params': params}, ids))
  base = apply(ids)
  for changed in range(12):
    other = apply(ids.at[0, changed].set(60))
    moved = np.abs(np.asarray(other - base)).max(axis=-1)[0] > 1e-7
    want = [changed <= t < changed + window for t in range(12)]
    assert moved.tolist() == want


@pytest.mark.compat
@pytest.mark.parametrize('window', [None, 2, 4])
def test_a_query_sees_its_own_segment_alone(window):
  cfg = small(window=window, layers=1)
  params = random_params(cfg)
  ids = jnp.arange(12, dtype=jnp.int32)[None]
  segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]], jnp.int32)
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 0]], jnp.int32)
  apply = jax.jit(
    lambda ids: Decoder(cfg).apply(
      {'params': params}, ids, positions, segments_BT=segments
    )
  )
  base = apply(ids)
  assert bool(jnp.isfinite(base).all())
  of = segments[0].tolist()
  for changed in range(12):
    other = apply(ids.at[0, changed].set(60))
    moved = np.abs(np.asarray(other - base)).max(axis=-1)[0] > 1e-7
    want = [
      changed <= t < changed + (window or 12) and of[t] == of[changed]
      for t in range(12)
    ]
    assert moved.tolist() == want
