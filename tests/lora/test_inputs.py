"""Second moments of inputs, and factors that begin along them.

Reference: the inputs themselves, in numpy, from the function written out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import LoraSpec, inputs

L, D, N = 3, 6, 40


@pytest.fixture
def params():
  normal = np.random.default_rng(0).standard_normal
  return {
    'stack': jnp.asarray(normal((L, D, D)), jnp.float32),
    'head': jnp.asarray(normal((D, 4)), jnp.float32),
  }


def rows():
  """[2, N, D], correlated, of which the last ten of each row are padding."""
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, N, D)) @ rng.standard_normal((D, D)) + 1.0
  return np.float32(x)


def loss(params):
  """Of the first thirty of a row alone; layers in a scan, made again."""

  @jax.checkpoint
  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, _ = jax.lax.scan(layer, jnp.asarray(rows()), params['stack'])
  return jnp.sum(jnp.square(x @ params['head'])[:, :30])


def written_out(params):
  """Inputs [60, D] of each layer and of the head."""
  x = rows().astype(np.float64)[:, :30].reshape(-1, D)
  found = [x]
  for w in np.asarray(params['stack'], np.float64):
    found.append(np.tanh(found[-1] @ w))
  return found


def moments_of(params):
  zeros = inputs.no_moments(params, {'stack', 'head'})
  got = jax.jit(jax.grad(lambda m: loss(inputs.watched(params, m))))(zeros)
  assert loss(inputs.watched(params, zeros)) == loss(params)
  return got


def one_of(tree, i):
  """What a tree has of layer i, or of the head behind them."""
  return tree['head'] if i == L else jax.tree.map(lambda x: x[i], tree['stack'])


@pytest.mark.usefixtures('strict')
def test_moments_are_those_of_the_inputs_that_matter(params):
  got = moments_of(params)
  for i, x in enumerate(written_out(params)):
    total, count = one_of(got, i)
    np.testing.assert_allclose(total, x.T @ x, rtol=1e-4, atol=1e-4)
    assert int(count) == 60


def test_features_are_uncorrelated_and_of_one_size(params):
  got = moments_of(params)

  def mean(path, index):
    total, count = got[path]
    return total[index] / count[index] if path == 'stack' else total / count

  spec = LoraSpec('stack,head', rank=4, init='whitened')
  frozen, trainable = lora.split(jax.random.key(0), params, spec, givens=mean)
  for i, x in enumerate(written_out(params)):
    own = one_of(trainable, i)
    features = x @ np.asarray(own.a).T
    np.testing.assert_allclose(
      features.T @ features / len(x), np.eye(4), atol=2e-3
    )
    # Of all such features those of the largest part of x: the others are left.
    squares = np.linalg.eigvalsh(x.T @ x / len(x))
    kept = np.linalg.pinv(np.asarray(own.a, np.float64))
    left = x - features @ kept.T
    np.testing.assert_allclose(
      np.mean(np.sum(left**2, -1)), squares[:2].sum(), rtol=1e-2
    )
    assert not own.b.any()
  np.testing.assert_array_equal(
    lora.merge(frozen, trainable)['head'], params['head']
  )


def test_directions_that_no_input_has_are_left_at_zero(params):
  x = np.zeros((5, D), np.float32)
  x[:, :2] = np.random.default_rng(0).standard_normal((5, 2))
  spec = LoraSpec('head', rank=4, init='whitened')
  _, own = lora.split(
    jax.random.key(0), params, spec, givens=lambda *_: jnp.asarray(x.T @ x / 5)
  )
  features = x @ np.asarray(own['head'].a).T
  np.testing.assert_allclose(
    features.T @ features / 5, np.diag([1, 1, 0, 0]), atol=1e-4
  )
  assert np.isfinite(own['head'].a).all()


@pytest.mark.parametrize(('rank', 'givens', 'message'), [
  (2, None, 'head: init whitened wants the second moments'),
  (7, lambda *_: jnp.eye(D), 'head: init whitened: rank 7 is above the 6 inputs'),
])  # fmt: skip
def test_refuses(rank, givens, message, params):
  spec = LoraSpec('head', rank=rank, init='whitened')
  with pytest.raises(ValueError, match=message):
    lora.split(jax.random.key(0), params, spec, givens=givens)
