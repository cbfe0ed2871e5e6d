"""LoRA over quantised weights is LoRA over the arrays that they stand for.

References: the same adapters over the plain arrays, and for LoftQ the best
approximation by numpy's SVD.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import LoraSpec, algebra, starts
from lorax_train.quant import QuantWeight, int8, nf4, quantise

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures('strict')]

L, IN, OUT = 2, 64, 24
merge = jax.jit(lora.merge)


def matrices():
  """float32 [L, in, out]."""
  rng = np.random.default_rng(3)
  return rng.standard_normal((L, IN, OUT)).astype(np.float32)


def stacked(weights):
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *weights)


@pytest.fixture(scope='module')
def trees():
  """(quantised, plain): an NF4 stack, an int8 one, and a norm."""
  w = matrices()
  quantised = {
    'q': stacked([nf4.from_bitsandbytes(quantise(m.T)) for m in w]),
    'v': stacked([int8.quantise(m.T) for m in w]),
    'norm': jnp.ones((L, IN)),
  }
  plain = jax.jit(lambda tree: {k: whole(w) for k, w in tree.items()})
  return quantised, plain(quantised)


def whole(w):
  return w.dequantised() if isinstance(w, QuantWeight) else w


def forward(params, x):
  """A scan over the layers that uses weights by `@` alone."""

  def layer(x, w):
    x = x * w['norm'][None, :]
    return x + jnp.tanh(x @ w['q']).sum(-1, keepdims=True), x @ w['v']

  x, ys = jax.lax.scan(layer, x, params)
  return x.sum() + (ys**2).sum()


def adapters(trainable):
  """Random factors in place of the first ones."""

  def noise(x):
    rng = np.random.default_rng(x.size)
    return x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)

  return jax.tree.map(noise, trainable)


SPECS = {
  'dropout': LoraSpec('q,v', rank=3, dropout=0.5),
  'pissa, dora': LoraSpec('q', rank=2, init='pissa', variant='dora+rslora'),
}


@pytest.mark.parametrize('name', SPECS)
def test_equals_lora_over_plain_arrays(name, trees):
  spec, x = SPECS[name], jnp.asarray(matrices()[0].T[:4] * 0.1)
  key = jax.random.key(1) if spec.dropout else None

  def loss(trainable, frozen):
    return forward(lora.bind(frozen, trainable, key), x)

  grad = jax.jit(jax.value_and_grad(loss))
  results, factors = [], None
  for params in trees:
    frozen, trainable = lora.split(jax.random.key(0), params, spec)
    start = grad(trainable, frozen)[0]
    # An SVD of what differs in its last bit may turn its vectors: the same pair
    # for both, then.
    factors = factors or (lora.fixed_factors(frozen), trainable)
    frozen = lora.with_fixed_factors(frozen, factors[0])
    trainable = adapters(factors[1])
    merged = merge(frozen, trainable)['q']
    results.append((start, grad(trainable, frozen), merged))
    assert isinstance(merged, jax.Array)
    assert lora.count(frozen)[1] == 2 * L * IN * OUT + L * IN
  assert lora.count(frozen)[0] == sum(map(jnp.size, jax.tree.leaves(trainable)))
  if not spec.dropout:
    np.testing.assert_allclose(
      results[0][0], jax.jit(forward)(trees[1], x), rtol=1e-5
    )

  def close(a, b):  # gradients go up to 4e4, of which float32 rounds 1e-7
    atol = 1e-7 * max(1.0, float(abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)

  jax.tree.map(close, *results)


def test_merged_keeps_its_dtype_and_is_summed_in_float32(trees):
  q = dataclasses.replace(trees[0]['q'], dtype=jnp.dtype('bfloat16'))
  halves = lora.split(jax.random.key(0), {'q': q}, LoraSpec('q', rank=2))
  halves = halves[0], adapters(halves[1])
  merged = merge(*halves)['q']
  a, b = halves[1]['q'].a, halves[1]['q'].b
  want = trees[1]['q'] + 8 * np.einsum('lri,lro->lio', a, b)
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(merged), want, rtol=2**-8, atol=1e-4)


def test_an_adapter_becomes_a_vector_and_comes_back(trees):
  spec = LoraSpec('q', rank=2)
  frozen, trainable = lora.split(jax.random.key(0), trees[0], spec)
  trainable = adapters(trainable)
  twice = algebra.scale(algebra.as_update(frozen, trainable), 2.0)
  got = merge(*algebra.as_adapter(frozen, twice))['q']
  once = merge(frozen, trainable)['q']
  np.testing.assert_allclose(
    got, 2 * once - trees[1]['q'], rtol=1e-4, atol=1e-5
  )
  assert algebra.as_adapter(frozen, twice)[0]['v'] is trees[0]['v']


def originals(path, index):
  assert path == 'q'
  return matrices()[index]


@pytest.mark.parametrize('variant', ['dora', 'rslora+lora_fa'])
def test_loftq_gives_back_what_quantising_lost(variant, trees):
  spec = LoraSpec('q', rank=4, alpha=6, init='loftq', variant=variant)
  halves = lora.split(jax.random.key(0), trees[0], spec, givens=originals)
  lost = matrices() - np.asarray(trees[1]['q'])
  u, s, vt = np.linalg.svd(lost, full_matrices=False)
  best = (u[..., :4] * s[:, None, :4]) @ vt[:, :4]
  got = merge(*halves)['q'] - trees[1]['q']
  np.testing.assert_allclose(got, best, atol=2e-5)


def inputs():
  """float32 [300, IN]: long in few directions, as those of language models."""
  rng = np.random.default_rng(5)
  mixed = rng.standard_normal((IN, IN)) * 0.8 ** np.arange(IN)[:, None]
  return (rng.standard_normal((300, IN)) @ mixed).astype(np.float32)


def originals_and_moments(path, index):
  x = inputs()
  return originals(path, index), x.T @ x / len(x)


@pytest.mark.parametrize('variant', ['dora', 'rslora+lora_fa'])
def test_qera_brings_outputs_as_near_as_its_rank_can(variant, trees):
  spec = LoraSpec('q', rank=4, alpha=6, init='qera', variant=variant)
  halves = lora.split(
    jax.random.key(0), trees[0], spec, givens=originals_and_moments
  )
  # Reduced-rank regression: of a rank, nothing is nearer than the first singular
  # triples of the outputs themselves.
  x = inputs().astype(np.float64)
  lost = x @ (matrices() - np.asarray(trees[1]['q']))
  u, s, vt = np.linalg.svd(lost, full_matrices=False)
  best = (u[..., :4] * s[:, None, :4]) @ vt[:, :4]
  got = x @ np.asarray(merge(*halves)['q'] - trees[1]['q'])
  np.testing.assert_allclose(got, best, atol=1e-4 * np.abs(best).max())
  fixed, own = halves[0]['q'], halves[1]['q']
  a, b = np.asarray(fixed.a_of(own)), np.asarray(own.b)
  np.testing.assert_allclose(
    np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1), rtol=1e-4
  )


def test_qera_without_inputs_is_loftq():
  w = matrices()[0]
  given = jnp.asarray(w), jnp.round(w * 2) / 2
  got = starts.qera_factors(*given, jnp.zeros((IN, IN)), 3, 0.5)
  want = starts.loftq_factors(*given, 3, 0.5)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(np.abs(x), np.abs(y), atol=1e-5)


def test_loftq_by_turns():
  w = jnp.asarray(matrices()[0])

  def coarse(w):
    return jnp.round(w * 2) / 2

  errors = []
  for n in (1, 2, 5):
    q, a, b = starts.loftq(w, coarse, rank=8, scale=0.5, iterations=n)
    errors.append(float(jnp.linalg.norm(q + 0.5 * a.T @ b - w)))
    if n == 1:
      np.testing.assert_array_equal(q, coarse(w))
  assert errors[2] < errors[1] < errors[0] < float(jnp.linalg.norm(q - w))


REFUSED = {
  'loftq without originals': (
    LoraSpec('q', init='loftq'),
    {},
    'q: init loftq wants the weights as they were before quantising',
  ),
  'qera without originals': (
    LoraSpec('q', init='qera'),
    {},
    'q: init qera wants the weights as they were before quantising and the second'
    " moments of the leaf's inputs",
  ),
  'loftq on a plain array': (
    LoraSpec('norm', init='loftq'),
    {'givens': originals},
    'norm: init loftq corrects what quantising lost, and this weight is not',
  ),
  'trained whole': (
    LoraSpec('v', modules_to_save='q'),
    {},
    'q: a quantised weight is not trained whole',
  ),
  'rank': (
    LoraSpec('q', init='loftq', rank=25),
    {'givens': originals},
    'q: init loftq: rank 25 is above the smaller side',
  ),
  'not [in, out]': (
    LoraSpec('q'),
    {'layout': {'q': 'soi'}},
    'q: a quantised weight is [*stack, in, out] of a product, not of axes soi',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refuses(name, trees):
  spec, options, message = REFUSED[name]
  with pytest.raises(ValueError, match=re.escape(message)):
    lora.split(jax.random.key(0), trees[0], spec, **options)


def test_transform_says_what_to_use_instead(trees):
  frozen, trainable = lora.split(
    jax.random.key(0), trees[0], LoraSpec('q', rank=2)
  )
  with pytest.raises(
    ValueError, match='q: transform wants plain arrays, not a'
  ):
    lora.transform(forward)(frozen, trainable, jnp.ones((4, IN)))


def test_no_transpose_of_an_adapted_one(trees):
  halves = lora.split(jax.random.key(0), trees[0], LoraSpec('q', rank=2))
  with pytest.raises(ValueError, match='has no transpose'):
    lora.bind(*halves)['q'].T  # noqa: B018
