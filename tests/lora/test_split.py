"""split, bind, merge: what a LoRA library must prove.

References: the formula W + scale A^T B in numpy float64 with ranks and scales
worked out by hand, and the merged weights as the oracle of the bound ones.
"""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import Adapter, Fixed, LoraSpec, LoraWeight

pytestmark = pytest.mark.usefixtures('strict')

NAMES = {
  'layers/q': ('m.layers.0.q', 'm.layers.1.q', 'm.layers.2.q'),
  'layers/v': ('m.layers.0.v', 'm.layers.1.v', 'm.layers.2.v'),
  'head': ('head',),
}


def weights(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(7), 3)
  return {
    'head': jax.random.normal(keys[0], (6, 11), dtype),
    'layers': {
      'norm': jnp.ones((3, 6), dtype),
      'q': jax.random.normal(keys[1], (3, 6, 10), dtype),
      'v': jax.random.normal(keys[2], (3, 6, 4), dtype),
    },
  }


def leaf(tree, path):
  for part in path.split('/'):
    tree = tree[part]
  return tree


def randomised(frozen, trainable):
  """Random factors; rows past the true ranks stay zero."""

  def noise(fixed, adapter):
    if adapter is None:
      return None
    ranks = np.array(fixed.ranks).reshape(fixed.scale.shape)[..., None]
    live = (np.arange(adapter.a.shape[-2]) < ranks)[..., None]
    return Adapter(
      *(
        jnp.where(live, jax.random.normal(jax.random.key(i), x.shape), 0.0)
        for i, x in enumerate((adapter.a, adapter.b))
      )
    )

  is_fixed = lambda x: isinstance(x, Fixed)  # noqa: E731
  return jax.tree.map(noise, frozen, trainable, is_leaf=is_fixed)


def forward(params, x):
  """A scan over layers, then a head; weights are used by `@` alone."""

  def layer(x, w):
    h = x * w['norm'][None, :]
    return h + (h @ w['v']) @ jnp.ones((4, 6)), h @ w['q']

  x, ys = jax.lax.scan(layer, x, params['layers'])
  return x @ params['head'], ys


def test_both_halves_keep_the_outline_of_params():
  params = weights()
  spec = LoraSpec('q', rank=2, alpha=6.0)
  frozen, trainable = lora.split(jax.random.key(0), params, spec, NAMES)
  assert trainable['head'] is None
  assert trainable['layers']['norm'] is None
  assert trainable['layers']['v'] is None
  q = trainable['layers']['q']
  assert (q.a.shape, q.b.shape) == ((3, 2, 6), (3, 2, 10))
  assert (q.a.dtype, q.b.dtype) == (jnp.float32, jnp.float32)
  assert frozen['head'] is params['head']
  assert frozen['layers']['q'].w is params['layers']['q']
  assert frozen['layers']['q'].ranks == (2, 2, 2)
  np.testing.assert_array_equal(frozen['layers']['q'].scale, [3.0] * 3)
  assert lora.count(frozen) == (3 * 2 * (6 + 10), 66 + 18 + 180 + 72)


@pytest.mark.compat
def test_the_function_is_unchanged_at_the_start():
  params, x = weights(), jnp.ones((5, 6))
  spec = LoraSpec('q,v,head', rank=2)
  halves = lora.split(jax.random.key(0), params, spec, NAMES)
  chex.assert_trees_all_equal(lora.merge(*halves), params)
  chex.assert_trees_all_close(
    forward(lora.bind(*halves), x), forward(params, x), rtol=1e-6
  )


# spec -> {module: (rank, scale)}, by hand.
PLACEMENTS = [
  (
    LoraSpec('head,q', rank=3, alpha=6),
    {'head': (3, 2), **{f'm.layers.{i}.q': (3, 2) for i in range(3)}},
  ),
  (
    LoraSpec('v', rank=4, alpha=6, variant='rslora'),
    {f'm.layers.{i}.v': (4, 3) for i in range(3)},
  ),
  (
    LoraSpec(
      'q', rank=2, alpha=4,
      rank_pattern={r'1\.q': 5}, alpha_pattern={r'layers\.2\.q': 9},
    ),
    {'m.layers.0.q': (2, 2), 'm.layers.1.q': (5, 0.8), 'm.layers.2.q': (2, 4.5)},
  ),
  (
    LoraSpec('q,v', rank=2, alpha=2, layers_to_transform=(1, 2), exclude='2.v'),
    {'m.layers.1.q': (2, 1), 'm.layers.2.q': (2, 1), 'm.layers.1.v': (2, 1)},
  ),
  (
    LoraSpec(r'.*layers\.[02]\.(q|v)', rank=2, alpha=2),
    {f'm.layers.{i}.{n}': (2, 1) for i in (0, 2) for n in 'qv'},
  ),
  (
    LoraSpec('all-linear', rank=1, alpha=0.5),
    {
      'head': (1, 0.5),
      **{f'm.layers.{i}.{n}': (1, 0.5) for i in range(3) for n in 'qv'},
    },
  ),
]  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize(('spec', 'placed'), PLACEMENTS)
def test_bound_equals_merged_equals_the_formula(spec, placed):
  params, x = weights(), jax.random.normal(jax.random.key(9), (5, 6))
  frozen, trainable = lora.split(jax.random.key(0), params, spec, NAMES)
  trainable = randomised(frozen, trainable)
  merged = lora.merge(frozen, trainable)
  for path, modules in NAMES.items():
    w, got, half = (leaf(t, path) for t in (params, merged, trainable))
    for i, module in enumerate(modules):
      at = i if len(modules) > 1 else ...
      want = np.float64(w[at])
      if module in placed:
        rank, scale = placed[module]
        a, b = np.float64(half.a[at][:rank]), np.float64(half.b[at][:rank])
        want = want + scale * a.T @ b
      np.testing.assert_allclose(got[at], want, rtol=1e-5, atol=1e-5)
  chex.assert_trees_all_close(
    forward(lora.bind(frozen, trainable), x),
    forward(merged, x),
    rtol=1e-4,
    atol=1e-4,
  )
  n_in, n_out = 6, {'q': 10, 'v': 4, 'd': 11}
  assert lora.count(frozen)[0] == sum(
    rank * (n_in + n_out[module[-1]]) for module, (rank, _) in placed.items()
  )


def test_padding_of_smaller_ranks_stays_zero_in_training():
  import optax

  params, x = weights(), jax.random.normal(jax.random.key(9), (5, 6))
  spec = LoraSpec('q', rank=2, rank_pattern={r'1\.q': 5})
  frozen, trainable = lora.split(jax.random.key(0), params, spec, NAMES)
  start = trainable = randomised(frozen, trainable)
  tx = optax.adamw(0.1, weight_decay=0.1)
  opt_state = tx.init(trainable)

  def loss(t):
    return sum(jnp.mean(y**2) for y in forward(lora.bind(frozen, t), x))

  for _ in range(3):
    grads = jax.grad(loss)(trainable)
    with jax.numpy_dtype_promotion('standard'):
      updates, opt_state = tx.update(grads, opt_state, trainable)
      trainable = optax.apply_updates(trainable, updates)
  q, q0 = trainable['layers']['q'], start['layers']['q']
  for now, before in ((q.a, q0.a), (q.b, q0.b)):
    assert (np.asarray(now[0, 2:]) == 0).all()
    assert (np.asarray(now[2, 2:]) == 0).all()
    assert (np.asarray(now[1]) != np.asarray(before[1])).all()


def test_a_is_uniform_by_fan_in_and_differs_by_layer_and_by_path():
  params = {'p': jnp.zeros((2, 400, 300)), 'q': jnp.zeros((2, 400, 300))}
  _, t = lora.split(jax.random.key(0), params, LoraSpec('p,q', rank=50))
  a = np.asarray(t['p'].a)
  bound = 1 / np.sqrt(400)  # the fan-in is `in`, not layers x in
  assert np.abs(a).max() <= bound
  # The variance of a uniform on +-c is c^2 / 3; 20,000 draws a layer.
  np.testing.assert_allclose(a.var(axis=(1, 2)), bound**2 / 3, rtol=0.05)
  assert not np.array_equal(a[0], a[1])
  assert not np.array_equal(a, t['q'].a)
  assert (np.asarray(t['p'].b) == 0).all()


def test_factors_do_not_depend_on_the_process_or_on_other_targets():
  params = weights()
  _, both = lora.split(jax.random.key(5), params, LoraSpec('q,v'), NAMES)
  _, one = lora.split(jax.random.key(5), params, LoraSpec('q'), NAMES)
  chex.assert_trees_all_equal(both['layers']['q'], one['layers']['q'])
  # The contract: uniform under the key folded with crc32 of the path, which,
  # unlike hash(), is the same in every process.
  own = jax.random.fold_in(jax.random.key(5), zlib.crc32(b'layers/q'))
  np.testing.assert_array_equal(
    one['layers']['q'].a,
    jax.random.uniform(own, (3, 8, 6), minval=-(6**-0.5), maxval=6**-0.5),
  )


def test_split_needs_shapes_only():
  shapes = jax.eval_shape(weights)
  frozen, trainable = jax.eval_shape(
    lambda p: lora.split(jax.random.key(0), p, LoraSpec('q', rank=64), NAMES),
    shapes,
  )
  assert lora.count(frozen)[0] == 3 * 64 * 16
  assert trainable['layers']['q'].a.shape == (3, 64, 6)


def test_gradients_are_those_of_the_merged_weights():
  params, x = weights(), jax.random.normal(jax.random.key(9), (5, 6))
  spec = LoraSpec('q,v,head', rank=3, alpha=5)
  frozen, trainable = lora.split(jax.random.key(0), params, spec, NAMES)
  trainable = randomised(frozen, trainable)

  def loss(join, t):
    return sum(jnp.mean(y**2) for y in forward(join(frozen, t), x))

  bound = jax.grad(lambda t: loss(lora.bind, t))(trainable)
  merged = jax.grad(lambda t: loss(lora.merge, t))(trainable)
  chex.assert_trees_all_close(bound, merged, rtol=2e-3, atol=1e-3)


@pytest.mark.compat
def test_through_jit_vmap_remat_and_grad():
  w = jax.random.normal(jax.random.key(0), (6, 4))
  params = {'q': w}
  frozen, trainable = lora.split(jax.random.key(0), params, LoraSpec('q'))
  trainable = randomised(frozen, trainable)
  merged = lora.merge(frozen, trainable)['q']
  x = jax.random.normal(jax.random.key(1), (7, 3, 6))

  def f(t, x):
    return jnp.sum(jnp.sin(x @ lora.bind(frozen, t)['q']))

  def g(t, x):
    return jnp.sum(jnp.sin(x @ lora.merge(frozen, t)['q']))

  for wrap in (jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0))):
    chex.assert_trees_all_close(
      wrap(f)(trainable, x), wrap(g)(trainable, x), rtol=1e-4
    )
    chex.assert_trees_all_close(
      jax.grad(lambda t: jnp.sum(wrap(f)(t, x)))(trainable),  # noqa: B023
      jax.grad(lambda t: jnp.sum(wrap(g)(t, x)))(trainable),  # noqa: B023
      rtol=1e-3,
      atol=1e-4,
    )
  np.testing.assert_allclose(
    x @ lora.bind(frozen, trainable)['q'], x @ merged, rtol=1e-3, atol=1e-4
  )


def test_dropout_falls_on_the_input_of_a_alone():
  params = {'q': jnp.zeros((1000, 4))}
  spec = LoraSpec('q', rank=2, alpha=2, dropout=0.25)
  frozen, _ = lora.split(jax.random.key(0), params, spec)
  ones = {'q': Adapter(jnp.ones((2, 1000)) / 1000, jnp.ones((2, 4)))}
  x = jnp.ones((64, 1000))
  kept = x @ lora.bind(frozen, ones)['q']
  np.testing.assert_allclose(kept, 2.0, rtol=1e-5)
  dropped = np.asarray(x @ lora.bind(frozen, ones, jax.random.key(1))['q'])
  # Inverted dropout keeps the mean 2; its deviation is 2 sqrt(p/(1-p)/1000).
  sigma = 2 * np.sqrt(0.25 / 0.75 / 1000)
  assert abs(dropped.mean() - 2) < 4 * sigma / np.sqrt(64)
  np.testing.assert_allclose(dropped[:, 0].std(), sigma, rtol=0.3)
  # W itself sees all of x.
  solid = {'q': Fixed(jnp.ones((1000, 4)), frozen['q'].scale,
                      frozen['q'].rate, frozen['q'].ranks, 'io')}  # fmt: skip
  none = {'q': Adapter(jnp.zeros((2, 1000)), jnp.zeros((2, 4)))}
  got = x @ lora.bind(solid, none, jax.random.key(1))['q']
  np.testing.assert_array_equal(got, 1000.0)


def test_dropout_differs_by_layer_and_by_step_and_repeats_by_key():
  params = {'q': jnp.zeros((3, 50, 8))}
  spec = LoraSpec('q', rank=8, dropout=0.5)
  frozen, trainable = lora.split(jax.random.key(0), params, spec)
  trainable = randomised(frozen, trainable)
  same = jax.tree.map(lambda x: x.at[:].set(x[0]), trainable)
  x = jnp.ones((4, 50))

  def ys(key):
    bound = lora.bind(frozen, same, key)
    return jax.lax.scan(lambda c, w: (c, x @ w), None, bound['q'])[1]

  first = ys(jax.random.key(1))
  chex.assert_trees_all_equal(first, ys(jax.random.key(1)))
  assert not np.array_equal(first[0], first[1])
  assert not np.array_equal(first, ys(jax.random.key(2)))


def test_look_up_and_transpose():
  params = {'e': jax.random.normal(jax.random.key(0), (9, 5))}
  frozen, trainable = lora.split(jax.random.key(0), params, LoraSpec('e'))
  trainable = randomised(frozen, trainable)
  w, merged = (f(frozen, trainable)['e'] for f in (lora.bind, lora.merge))
  assert isinstance(w, LoraWeight)
  assert (w.shape, w.ndim, w.dtype) == ((9, 5), 2, jnp.float32)
  ids = jnp.array([[0, 8], [3, 3]])
  np.testing.assert_allclose(w[ids], merged[ids], rtol=1e-4, atol=1e-5)
  x = jax.random.normal(jax.random.key(2), (4, 5))
  np.testing.assert_allclose(x @ w.T, x @ merged.T, rtol=1e-4, atol=1e-4)


def test_numpy_on_the_left_hands_over():
  frozen, trainable = lora.split(
    jax.random.key(0), {'q': jnp.ones((6, 4))}, LoraSpec('q')
  )
  w = lora.bind(frozen, trainable)['q']
  np.testing.assert_allclose(np.ones((2, 6), np.float32) @ w, 6.0)


def test_a_stack_multiplies_layer_by_layer():
  frozen, trainable = lora.split(
    jax.random.key(0), {'q': jnp.ones((3, 6, 4))}, LoraSpec('q', rank=2)
  )
  trainable = randomised(frozen, trainable)
  x = jax.random.normal(jax.random.key(1), (3, 5, 6))
  np.testing.assert_allclose(
    x @ lora.bind(frozen, trainable)['q'],
    np.einsum('lti,lio->lto', x, lora.merge(frozen, trainable)['q']),
    rtol=1e-4,
    atol=1e-4,
  )
  with pytest.raises(ValueError, match='does not line up'):
    x[0] @ lora.bind(frozen, trainable)['q']


@pytest.mark.parametrize(
  ('params', 'names', 'message'),
  [
    ({'q': jnp.ones((2, 3))}, {'k': ('k',)}, "names has 'k', which params"),
    ({'q': jnp.ones(3)}, {'q': ('q',)}, r'no \[in, out\] to factor'),
    ({'q': jnp.ones((4, 3, 2))}, {'q': ('q',)}, 'wants 4 names, got 1'),
  ],
)
def test_names_that_do_not_fit(params, names, message):
  with pytest.raises(ValueError, match=message):
    lora.split(jax.random.key(0), params, LoraSpec('q'), names)


def test_an_adapter_without_its_frozen_half():
  frozen, trainable = lora.split(
    jax.random.key(0), {'q': jnp.ones((6, 4))}, LoraSpec('q')
  )
  with pytest.raises(ValueError, match='q: an adapter but no frozen half'):
    lora.bind({'q': frozen['q'].w}, trainable)


def test_bfloat16_weights_get_float32_factors_and_bfloat16_results():
  params = weights(jnp.bfloat16)
  frozen, trainable = lora.split(
    jax.random.key(0), params, LoraSpec('head', rank=4), NAMES
  )
  trainable = randomised(frozen, trainable)
  assert trainable['head'].a.dtype == jnp.float32
  assert lora.merge(frozen, trainable)['head'].dtype == jnp.bfloat16
  x = jnp.ones((2, 6), jnp.bfloat16)
  w = lora.bind(frozen, trainable)['head']
  assert (x @ w).dtype == jnp.bfloat16
  assert w.apply_to(x, jnp.float32).dtype == jnp.float32
