"""Noise on embeddings. Reference: the paper's bound, and the plain look-up."""

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.train import neftune
from lorax_train.train import step as step_lib

V, D, B, T = 11, 32, 4, 25
IDS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
W = jax.random.normal(jax.random.key(0), (V, D))


def test_the_noise_is_uniform_within_its_bound():
  params = {'embed_tokens': W, 'norm': jnp.ones(D)}
  noisy = neftune.with_noise(params, jax.random.key(1), 5.0)
  assert noisy['norm'] is params['norm']
  noise = np.asarray(noisy['embed_tokens'][IDS] - W[IDS])
  bound = 5 / np.sqrt(T * D)
  assert np.abs(noise).max() <= bound * 1.0001
  assert abs(noise.mean()) < 4 * bound / np.sqrt(3 * noise.size)
  np.testing.assert_allclose(noise.std(), bound / np.sqrt(3), rtol=0.03)
  # Two tokens of the same id have noise of their own.
  assert len(np.unique(noise[..., 0])) == B * T


def test_a_tied_head_sees_none():
  noisy = neftune.NoisyEmbedding(W, jax.random.key(1), jnp.float32(5))
  np.testing.assert_array_equal(noisy.T, W.T)
  assert (noisy.shape, noisy.dtype) == (W.shape, W.dtype)


def test_evaluation_sees_none_and_each_key_its_own():
  def apply(params, ids):
    return params['embed_tokens'][ids] @ params['embed_tokens'].T

  frozen, trainable = {'embed_tokens': W}, {'embed_tokens': None}
  batch = {'ids': IDS, 'labels': IDS}
  loss = step_lib.make_loss(apply, 5.0)
  plain, _ = step_lib.make_loss(apply)(trainable, frozen, batch, None)
  silent, _ = loss(trainable, frozen, batch, None)
  one, _ = loss(trainable, frozen, batch, jax.random.key(1))
  again, _ = loss(trainable, frozen, batch, jax.random.key(1))
  two, _ = loss(trainable, frozen, batch, jax.random.key(2))
  assert silent == plain
  assert one == again
  assert len({float(plain), float(one), float(two)}) == 3
