"""PEFT's mixtures: pruned, dropped and voted on as their definitions say.

References: the definitions written out in numpy float64, a layer at a time on
factors of their true ranks. PEFT itself is asked in
tests/parity/test_algebra.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train.lora import algebra, mixing
from lorax_train.lora.algebra import Update

pytestmark = pytest.mark.usefixtures('strict')

LAYERS, N_IN, N_OUT = 3, (2, 3), (4,)
I, O = 6, 4
WEIGHTS = (0.7, -1.3)
# Ranks by layer: a layer has no adapter, or one of the rank of the others'.
RANKS = ((2, 4, 0), (2, 0, 3))


def make(seed, ranks):
  """A stack of three layers, in of two axes; zeros past a layer's rank."""
  rng = np.random.default_rng(seed)
  r = max(ranks)
  live = np.arange(r) < np.array(ranks)[:, None]
  a = rng.standard_normal((LAYERS, r, *N_IN)) * live[..., None, None]
  b = rng.standard_normal((LAYERS, r, *N_OUT)) * live[..., None]
  scale = rng.uniform(0.5, 2, LAYERS) * (np.array(ranks) > 0)
  arrays = [jnp.asarray(x, jnp.float32) for x in (a, b, scale)]
  return {'none': None, 'w': Update(*arrays, ranks)}


UPDATES = [make(i, ranks) for i, ranks in enumerate(RANKS)]


def rows(update, layer):
  """A [r, I], B [r, O] and the scale of a layer, float64 and not padded."""
  u = update['w']
  r = u.ranks[layer]
  a = np.float64(u.a)[layer, :r].reshape(r, I)
  return a, np.float64(u.b)[layer, :r], np.float64(u.scale)[layer]


def dw(update, layer):
  a, b, scale = rows(update, layer)
  return scale * a.T @ b


def largest(x, density):
  """x with all but the int(density * size) largest entries zero."""
  k = int(density * x.size)
  kept = np.zeros(x.size)
  order = np.argsort(-np.abs(x).ravel(), kind='stable')[:k]
  kept[order] = x.ravel()[order]
  return kept.reshape(x.shape)


def added(xs, weights):
  return sum(w * x for x, w in zip(xs, weights, strict=True))


def voted(by):
  def rule(xs, weights):
    votes = sum(xs) if by == 'total' else sum(np.sign(x) for x in xs)
    elected = np.where(votes >= 0, 1, -1)
    agree = [np.sign(x) == elected for x in xs]
    total = sum(w * x * g for x, w, g in zip(xs, weights, agree, strict=True))
    return total / np.maximum(sum(agree), 1)

  return rule


def truncated(x, rank):
  left, values, right = np.linalg.svd(x, False)
  return (left[:, :rank] * values[:rank]) @ right[:rank]


def expected(layer, thin, join, rank):
  """The definition; thin(number, part, x), part 0 for A or dW and 1 for B."""
  have = [i for i in (0, 1) if RANKS[i][layer]]
  own = [rows(UPDATES[i], layer) for i in have]
  if rank is not None:
    dense = [s * a.T @ b for a, b, s in own]
    thinned = [thin(i, 0, x) for i, x in zip(have, dense, strict=True)]
    return truncated(join(thinned, [WEIGHTS[i] for i in have]), rank)
  c = [WEIGHTS[i] * s for i, (_, _, s) in zip(have, own, strict=True)]
  root = np.sqrt(np.abs(c))
  a = [thin(i, 0, a) for i, (a, _, _) in zip(have, own, strict=True)]
  b = [thin(i, 1, b) for i, (_, b, _) in zip(have, own, strict=True)]
  return join(a, np.sign(c) * root).T @ join(b, root)


def check(got, thin, join, rank):
  u = got['w']
  assert got['none'] is None
  assert u.a.shape[2:] == N_IN
  ranks = tuple(np.max(RANKS, axis=0)) if rank is None else (min(rank, O),) * 3
  assert u.ranks == ranks
  for layer in range(LAYERS):
    want = expected(layer, thin, join, rank)
    np.testing.assert_allclose(dw(got, layer), want, atol=2e-5)
    # Rows past the rank are zero, as `bind` and export rely on.
    assert not np.asarray(u.a)[layer, ranks[layer] :].any()
    assert not np.asarray(u.b)[layer, ranks[layer] :].any()


in_factors_or_in_dw = pytest.mark.parametrize('rank', [None, 2, 9])


@pytest.mark.compat
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_mix_factors(wrap):
  got = wrap(mixing.mix_factors)(UPDATES, jnp.asarray(WEIGHTS))
  check(got, lambda i, part, x: x, added, None)
  # Where two adapters meet it is not their sum.
  the_sum = added([dw(u, 0) for u in UPDATES], WEIGHTS)
  assert np.abs(dw(got, 0) - the_sum).max() > 0.1
  np.testing.assert_allclose(
    dw(algebra.cat(UPDATES, WEIGHTS), 0), the_sum, atol=1e-5
  )


@in_factors_or_in_dw
@pytest.mark.parametrize('density', [0.37, 0.8, 1.0])
def test_magnitude_prune(density, rank):
  got = mixing.magnitude_prune(UPDATES, WEIGHTS, density, rank=rank)
  check(got, lambda i, part, x: largest(x, density), added, rank)


@pytest.mark.compat
@in_factors_or_in_dw
@pytest.mark.parametrize('by', ['total', 'frequency'])
def test_ties(by, rank):
  merge = jax.jit(lambda us, w: mixing.ties(us, w, 0.6, by, rank))
  got = merge(UPDATES, jnp.asarray(WEIGHTS))
  check(got, lambda i, part, x: largest(x, 0.6), voted(by), rank)


def test_of_equal_entries_no_more_than_the_share_stay():
  u = {'w': Update(jnp.ones((1, 8)), jnp.ones((1, 4)), jnp.float32(1), (1,))}
  got = mixing.magnitude_prune([u], (1.0,), 0.5)['w']
  assert (got.a != 0).sum() == 4
  assert (got.b != 0).sum() == 2


def masks(rank):
  """[updates] {path: (of a, of b) or (of dW,)}, in the layout of the update."""
  rng = np.random.default_rng(8)
  trees = []
  for update in UPDATES:
    shapes = [update['w'].a.shape, update['w'].b.shape]
    if rank is not None:
      shapes = [(LAYERS, *N_IN, *N_OUT)]
    own = tuple(jnp.asarray(rng.random(shape) < 0.6) for shape in shapes)
    trees.append({'none': None, 'w': own})
  return trees


@pytest.mark.compat
@in_factors_or_in_dw
@pytest.mark.parametrize('by', [None, 'total', 'frequency'])
def test_dare_under_given_masks(by, rank):
  given = masks(rank)
  got = mixing.dare(UPDATES, WEIGHTS, 0.6, masks=given, majority=by, rank=rank)
  for layer in range(LAYERS):

    def thin(i, part, x):
      mask = np.asarray(given[i]['w'][part])[layer]  # noqa: B023
      if rank is None:
        mask = mask[: len(x)]  # the rows of the true rank
      return x * mask.reshape(x.shape) / 0.6

    want = expected(layer, thin, added if by is None else voted(by), rank)
    np.testing.assert_allclose(dw(got, layer), want, atol=2e-5)


def test_dare_draws_by_key_by_update_and_by_path():
  big = {
    name: Update(jnp.ones((4, 500)), jnp.ones((4, 300)), jnp.float32(1), (4,))
    for name in 'pq'
  }
  dare = jax.jit(lambda key, w: mixing.dare([big, big], w, 0.25, key=key))
  first = dare(jax.random.key(0), jnp.array([1.0, 0.0]))
  again = dare(jax.random.key(0), jnp.array([1.0, 0.0]))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  others = [
    dare(jax.random.key(1), jnp.array([1.0, 0.0]))['p'],
    dare(jax.random.key(0), jnp.array([0.0, 1.0]))['p'],
    first['q'],
  ]
  for other in others:
    assert not np.array_equal(first['p'].a, other.a)
  # A quarter is kept, four times as large: 2,000 draws, sigma 1 %.
  a = np.asarray(first['p'].a)
  assert set(np.unique(a)) == {0.0, 4.0}
  assert abs((a != 0).mean() - 0.25) < 0.04
  assert not np.array_equal(a[:, :300] != 0, np.asarray(first['p'].b) != 0)


ONE, OTHER = UPDATES
THREE = make(4, (3, 3, 3))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: mixing.mix_factors([ONE, THREE], WEIGHTS),
      r'w: ranks \[\(2, 4, 0\), \(3, 3, 3\)\] differ',
    ),
    (
      lambda: mixing.ties([ONE, THREE], WEIGHTS, 0.5),
      r'w: ranks .* differ, .* give a rank',
    ),
    (lambda: mixing.ties([ONE], (1.0,), 0.0), r'density of 0\.0 is outside'),
    (
      lambda: mixing.magnitude_prune([ONE], (1.0,), 1.5),
      r'density of 1\.5 is outside \(0, 1\]',
    ),
    (
      lambda: mixing.ties([ONE], (1.0,), 0.5, 'most'),
      "majority 'most' is neither 'total' nor 'frequency'",
    ),
    (
      lambda: mixing.ties([ONE], (1.0,), 0.5, rank=2.0),
      r'a rank of 2\.0 is no integer above 0',
    ),
    (
      lambda: mixing.dare([ONE], (1.0,), 0.5),
      'dare takes either a key or masks',
    ),
    (
      lambda: mixing.dare([ONE], (1.0,), 0.5, masks=masks(None)),
      '1 updates, 2 trees of masks',
    ),
    (
      lambda: mixing.dare([ONE], (1.0,), 0.5, masks=masks(None)[1:]),
      r'w: masks of shapes \[\(3, 3, 2, 3\), \(3, 3, 4\)\] for',
    ),
    (
      lambda: mixing.dare([ONE], (1.0,), 0.5, masks=masks(2)[:1]),
      r'w: masks of shapes \[\(3, 2, 3, 4\)\] for \[\(3, 4, 6\), \(3, 4, 4\)\]',
    ),
  ],
)
def test_what_cannot_be_mixed(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_ranks_that_differ_can_be_mixed_in_dw():
  got = mixing.ties([ONE, THREE], WEIGHTS, 1.0, rank=4)
  for layer in (0, 1):
    want = voted('total')([dw(ONE, layer), dw(THREE, layer)], WEIGHTS)
    np.testing.assert_allclose(dw(got, layer), truncated(want, 4), atol=2e-5)
