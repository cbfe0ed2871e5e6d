"""Adapters as vectors: what comes out is the sum that was asked for.

References: sums of scale * A^T B in numpy float64, numpy's SVD of the dense
sum, and a Python loop where adapters are switched or mapped over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import Adapter, Fixed, LoraSpec, algebra
from lorax_train.lora.algebra import Update

pytestmark = pytest.mark.usefixtures('strict')

# {path: (*stack), (*in), (*out)}: plain, stacked, and several axes each.
SHAPES = {
  'p': ((), (7,), (5,)),
  's': ((3,), (6,), (8,)),
  'h': ((2,), (4, 2), (3, 2)),
}
WEIGHTS = (0.7, -1.3, 2.0)


def make(seed, **ranks):
  """An update of random factors; ranks is {path: one for each stack index}."""
  rng = np.random.default_rng(seed)
  tree = dict.fromkeys([*SHAPES, 'none'])
  for path, of_stack in ranks.items():
    stack, n_in, n_out = SHAPES[path]
    r = max(of_stack)
    live = (np.arange(r) < np.reshape(of_stack, (*stack, 1))).astype(np.float32)
    a, b = (
      rng.standard_normal((*stack, r, *n)).astype(np.float32)
      * live.reshape(*stack, r, *(1 for _ in n))
      for n in (n_in, n_out)
    )
    scale = rng.uniform(0.5, 2, stack).astype(np.float32)
    tree[path] = Update(*map(jnp.asarray, (a, b, scale)), of_stack)
  return tree


def updates():
  """Three adapters on one base, of different ranks and places."""
  return [
    make(0, p=(2,), s=(2, 2, 2), h=(2, 1)),
    make(1, p=(1,), s=(3, 0, 1), h=(3, 3)),
    make(2, s=(0, 0, 4)),
  ]


def dense(u, path):
  """scale * A^T B of one leaf in float64, [*stack, I, O]."""
  stack, n_in, n_out = SHAPES[path]
  if u is None:
    return np.zeros((*stack, np.prod(n_in), np.prod(n_out)))
  a, b = (
    np.float64(x).reshape(*stack, -1, np.prod(n))
    for x, n in ((u.a, n_in), (u.b, n_out))
  )
  return np.float64(u.scale)[..., None, None] * np.swapaxes(a, -1, -2) @ b


def sum_of(trees, weights, path):
  return sum(
    w * dense(t[path], path) for t, w in zip(trees, weights, strict=True)
  )


def check_outline(tree):
  """Shapes that `bind` and export rely on; rows past a rank are exact zeros."""
  assert tree['none'] is None
  for path, (stack, n_in, n_out) in SHAPES.items():
    u = tree[path]
    r = max(u.ranks)
    assert u.a.shape == (*stack, r, *n_in)
    assert u.b.shape == (*stack, r, *n_out)
    assert u.scale.shape == stack
    assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype('float32')}
    a, b = (
      np.reshape(x, (-1, r, np.prod(n))) for x, n in ((u.a, n_in), (u.b, n_out))
    )
    for i, rank in enumerate(u.ranks):
      assert not a[i, rank:].any()
      assert not b[i, rank:].any()


@pytest.mark.compat
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_cat_is_the_sum_and_its_ranks_add_up(wrap):
  got = wrap(algebra.cat)(updates(), jnp.asarray(WEIGHTS))
  check_outline(got)
  for path in SHAPES:
    want = sum_of(updates(), WEIGHTS, path)
    np.testing.assert_allclose(dense(got[path], path), want, atol=2e-5)
  assert got['p'].ranks == (3,)
  assert got['s'].ranks == (5, 2, 7)
  assert got['h'].ranks == (5, 4)


@pytest.mark.compat
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
@pytest.mark.parametrize('rank', [1, 3, 4, 100])
def test_svd_is_the_best_approximation_of_the_sum(rank, wrap):
  got = wrap(lambda us, w: algebra.svd(us, w, rank))(updates(), WEIGHTS)
  check_outline(got)
  for path in SHAPES:
    left, values, right = np.linalg.svd(sum_of(updates(), WEIGHTS, path), False)
    want = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    np.testing.assert_allclose(dense(got[path], path), want, atol=3e-5)
    # Rows of A are orthonormal, those of B as long as the singular values.
    u = got[path]
    r = max(u.ranks)
    a, b = (np.reshape(x, (len(u.ranks), r, -1)) for x in (u.a, u.b))
    values = values.reshape(len(u.ranks), -1)
    for i, k in enumerate(u.ranks):
      assert k <= rank
      np.testing.assert_allclose(a[i, :k] @ a[i, :k].T, np.eye(k), atol=1e-5)
      np.testing.assert_allclose(
        np.linalg.norm(b[i, :k], axis=-1), values[i, :k], rtol=1e-4
      )
  # No more than the factors have, and never past a side of W.
  assert got['s'].ranks == tuple(min(rank, n) for n in (5, 2, 6))


def test_svd_never_forms_dw():
  big = {'w': Update(jnp.ones((2, 3000)), jnp.ones((2, 4000)), jnp.float32(1),
                     (2,))}  # fmt: skip
  jaxpr = jax.make_jaxpr(lambda u: algebra.svd([u, u], (1.0, 1.0), 2))(big)
  sizes = [
    v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.shape
  ]
  assert max(sizes) <= 4 * 4000


def test_scale_and_negation():
  (u, *_) = updates()
  for c in (2.5, -1.0, jnp.float32(0.25)):
    for path in SHAPES:
      np.testing.assert_allclose(
        dense(algebra.scale(u, c)[path], path),
        float(c) * dense(u[path], path),
        rtol=1e-6,
      )
  gone = algebra.cat([u, algebra.scale(u, -1.0)], (1.0, 1.0))
  for path in SHAPES:
    np.testing.assert_allclose(dense(gone[path], path), 0.0, atol=1e-5)


def test_weights_of_a_sum_are_differentiable():
  trees = updates()

  def total(weights):
    u = algebra.cat(trees, weights)['p']
    return jnp.sum(u.scale * u.a.T @ u.b)

  want = [dense(t['p'], 'p').sum() for t in trees]
  got = jax.grad(total)(jnp.asarray(WEIGHTS))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


NAMES = {
  'q': ('m.layers.0.q', 'm.layers.1.q', 'm.layers.2.q'),
  'v': ('m.layers.0.v', 'm.layers.1.v', 'm.layers.2.v'),
  'head': ('head',),
}


def base():
  keys = jax.random.split(jax.random.key(7), 3)
  return {
    'q': jax.random.normal(keys[0], (3, 6, 10)),
    'v': jax.random.normal(keys[1], (3, 10, 6)),
    'head': jax.random.normal(keys[2], (6, 4)),
    'norm': jnp.ones(6),
  }


def adapter(seed, spec):
  """(frozen, trainable) on `base`, with B random where A is."""
  frozen, trainable = lora.split(jax.random.key(seed), base(), spec, NAMES)

  def noise(x):
    live = jnp.any(x.a != 0, axis=-1, keepdims=True)
    b = jax.random.normal(jax.random.key(seed + 1), x.b.shape)
    return Adapter(x.a, jnp.where(live, b, 0.0))

  is_adapter = lambda x: isinstance(x, Adapter)  # noqa: E731
  return frozen, jax.tree.map(noise, trainable, is_leaf=is_adapter)


def forward(params, x):
  def layer(x, w):
    return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None

  x, _ = jax.lax.scan(
    layer, x * params['norm'][None, :], (params['q'], params['v'])
  )
  return x @ params['head']


X = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
PATTERNS = LoraSpec('q,v', rank=2, alpha=6, rank_pattern={r'1\.q': 4})


@pytest.mark.compat
def test_there_and_back_is_the_same_adapter():
  frozen, trainable = adapter(0, PATTERNS)
  update = algebra.as_update(frozen, trainable)
  assert update['head'] is None
  assert update['q'].ranks == (2, 4, 2)
  again, factors = algebra.as_adapter(frozen, update)
  for one, two in ((again, frozen), (factors, trainable)):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_sum_of_adapters_bound_is_their_sum_merged():
  plain = base()
  frozen, trainable = adapter(0, PATTERNS)
  other = adapter(5, LoraSpec('q', rank=3, layers_to_transform=(0, 2)))
  sum_ = algebra.cat(
    [algebra.as_update(frozen, trainable), algebra.as_update(*other)],
    (0.5, 2.0),
  )
  halves = algebra.as_adapter(frozen, sum_)
  merged = lora.merge(*halves)
  for name, w in plain.items():
    one, two = (
      np.float64(lora.merge(*h)[name]) - np.float64(w)
      for h in ((frozen, trainable), other)
    )
    np.testing.assert_allclose(
      merged[name] - np.float64(w), 0.5 * one + 2.0 * two, atol=1e-5
    )
  assert lora.count(halves[0])[0] == (5 + 4 + 5) * 16 + 6 * 16
  np.testing.assert_allclose(
    forward(lora.bind(*halves), jnp.asarray(X)),
    forward(merged, jnp.asarray(X)),
    atol=1e-4,
  )


def test_a_weight_that_no_update_touches_comes_back_plain():
  frozen, _ = adapter(0, PATTERNS)
  update = algebra.as_update(*adapter(5, LoraSpec('q', rank=3)))
  halves = algebra.as_adapter(frozen, update)
  assert isinstance(halves[0]['q'], Fixed)
  assert halves[0]['v'] is frozen['v'].w
  assert halves[1]['v'] is None


# What each axis is to the function; two axes in, a stack that isn't in front.
LAYOUT = {'e': 'iio', 'q': 'osi'}


@pytest.mark.compat
@pytest.mark.parametrize(
  ('changes', 'ranks'),
  [
    ({}, (2, 2, 2)),
    ({'variant': 'lora_fa'}, (2, 2, 2)),
    # W + s (A^T B - A0^T B0): what is subtracted doubles the rank.
    ({'init': 'pissa'}, (4, 4, 4)),
    ({'init': 'olora'}, (4, 4, 4)),
  ],
)
def test_every_kind_of_adapter_by_factors_is_an_update(changes, ranks):
  rng = np.random.default_rng(3)
  params = {
    path: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for path, shape in (('e', (4, 2, 7)), ('q', (10, 3, 6)))
  }
  spec = LoraSpec('e,q', rank=2, alpha=3, **changes)
  frozen, start = lora.split(jax.random.key(3), params, spec, layout=LAYOUT)
  trainable = jax.tree.map(
    lambda x: x + jnp.asarray(rng.standard_normal(x.shape), jnp.float32), start
  )
  update = algebra.as_update(frozen, trainable)
  assert update['q'].ranks == ranks
  want = lora.merge(frozen, trainable)
  for u in (update, algebra.svd([update, update], (0.25, 0.75), 4)):
    got = lora.merge(*algebra.as_adapter(frozen, u))
    for path in LAYOUT:
      assert np.abs(want[path] - params[path]).max() > 0.5
      np.testing.assert_allclose(got[path], want[path], atol=1e-4)


def test_what_is_more_than_factors_is_no_update():
  params = {'p': jnp.ones((4, 3)), 'q': jnp.ones((6, 4))}
  spec = LoraSpec('p,q', rank=2, variant='dora')
  halves = lora.split(jax.random.key(0), params, spec)
  message = 'p: a magnitude is trained, not A and B alone; q: a magnitude'
  with pytest.raises(ValueError, match=message):
    algebra.as_update(*halves)


def lanes_and_pairs():
  """A base that is split once, three updates of it, and lanes of them."""
  frozen, one = adapter(0, PATTERNS)
  all_ = [
    algebra.as_update(frozen, one),
    algebra.as_update(*adapter(5, LoraSpec('q', rank=3, alpha=1))),
    algebra.as_update(
      *adapter(9, LoraSpec('v', rank=5, layers_to_transform=(1,)))
    ),
  ]
  return frozen, all_, algebra.stack(all_)


def merged_of(frozen, update):
  return lora.merge(*algebra.as_adapter(frozen, update))


@pytest.mark.compat
def test_switching_compiles_once():
  frozen, all_, lanes = lanes_and_pairs()
  assert lanes['q'].a.shape == (3, 3, 4, 6)
  assert lanes['q'].ranks == (3, 4, 3)
  assert lanes['v'].ranks == (2, 5, 2)
  traces = []

  @jax.jit
  def serve(lanes, index, x):
    traces.append(index)
    halves = algebra.as_adapter(frozen, algebra.select(lanes, index))
    return forward(lora.bind(*halves), x)

  x = jnp.asarray(X)
  for i in (0, 1, 2, 1):
    got = serve(lanes, jnp.int32(i), x)
    want = forward(merged_of(frozen, all_[i]), x)
    np.testing.assert_allclose(got, want, atol=1e-4)
  assert len(traces) == 1
  assert np.isnan(serve(lanes, jnp.int32(3), x)).all()


@pytest.mark.compat
def test_one_adapter_for_each_example():
  frozen, all_, lanes = lanes_and_pairs()
  index_B = jnp.array([2, 0, 0, 1, 2])

  def one(x, index):
    halves = algebra.as_adapter(frozen, algebra.select(lanes, index))
    return forward(lora.bind(*halves), x)

  # A row is a matrix of one token here.
  got = jax.jit(jax.vmap(one))(jnp.asarray(X)[:, None], index_B)[:, 0]
  want = [
    forward(merged_of(frozen, all_[i]), jnp.asarray(row)[None])[0]
    for row, i in zip(X, index_B, strict=True)
  ]
  np.testing.assert_allclose(got, np.stack(want), atol=1e-4)


def test_all_lanes_at_once():
  frozen, all_, lanes = lanes_and_pairs()

  def one(update):
    return forward(lora.bind(*algebra.as_adapter(frozen, update)), X)

  want = [forward(merged_of(frozen, u), jnp.asarray(X)) for u in all_]
  np.testing.assert_allclose(jax.vmap(one)(lanes), np.stack(want), atol=1e-4)


def without(tree, path):
  return {k: v for k, v in tree.items() if k != path}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda u: algebra.cat([], ()), 'no updates to combine'),
    (lambda u: algebra.cat([u, u], (1.0,)), r'2 updates, weights \(1,\)'),
    (
      lambda u: algebra.cat([u, without(u, 'p')], (1.0, 1.0)),
      'p: not in both of updates 0 and 1',
    ),
    (
      lambda u: algebra.cat([u, {**u, 'p': u['s'], 's': u['p']}], (1.0, 1.0)),
      r'p: shapes \(stack, in, out\) differ: .*; s: shapes',
    ),
    (lambda u: algebra.svd([u], (1.0,), 0), 'a rank of 0 is no integer above'),
    (lambda u: algebra.stack([u, without(u, 'h')]), 'h: not in both of'),
    (
      lambda u: algebra.as_adapter(dict.fromkeys(u, jnp.ones(3)), u),
      r'h: an update of stack \(2,\), in \(4, 2\) .*; p: an update .*; s: ',
    ),
    (
      lambda u: algebra.as_update({'q': None}, {'q': jnp.ones(3)}),
      'q: a whole array is trained, not A and B alone',
    ),
  ],
)
def test_what_cannot_be_combined(call, message):
  with pytest.raises(ValueError, match=message):
    call(updates()[0])


def test_an_update_of_another_size_than_the_weight():
  frozen, trainable = adapter(0, PATTERNS)
  update = algebra.as_update(frozen, trainable)
  with pytest.raises(ValueError, match=r'q: .*in \(7,\).* of that size'):
    algebra.as_adapter(frozen, {**update, 'q': make(0, p=(2,))['p']})
