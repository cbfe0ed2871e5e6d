"""What is trained without an adapter, and adapters of what is looked up.

Reference: the same function of merged weights, by jax's own gradient; PEFT's
start of an embedding as its source has it (A zeros, B normal).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import LoraSpec
from lorax_train.plan.flops import walk

LAYOUT = {'up': 'sio', 'embed': 'vo', 'head': 'io'}
OTHERS = {'norm': ('m.0.norm', 'm.1.norm', 'm.2.norm'), 'bias': ('bias',)}
NAMES = {
  'up': ('m.0.up', 'm.1.up', 'm.2.up'),
  'embed': ('embed',),
  'head': ('head',),
}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def weights():
  return {
    'bias': normal(0, 11),
    'embed': normal(1, 37, 6),
    'head': normal(2, 6, 11),
    'norm': normal(3, 3, 6),
    'up': normal(4, 3, 6, 6),
  }


IDS = jnp.array([[0, 5, 36, 5], [3, 5, 20, 1]])


def fn(params, ids):
  """A look-up, layers of a scan, a head, and the tied one."""

  def layer(x, w):
    return x + jnp.tanh((x * w['norm']) @ w['up']), None

  stack = {name: params[name] for name in ('norm', 'up')}
  x, _ = jax.lax.scan(layer, params['embed'][ids], stack)
  tied = x @ params['embed'].T
  return x @ params['head'] + params['bias'], tied


def loss(params, ids=IDS):
  return sum(jnp.sum(jnp.sin(out)) for out in fn(params, ids))


def split(spec, params=None):
  return lora.split(
    jax.random.key(0), params or weights(), spec, NAMES, LAYOUT, OTHERS
  )


def moved(trainable):
  return jax.tree.map(lambda x: x + 0.3 * normal(9, *x.shape), trainable)


SPECS = {
  'whole': LoraSpec('up', modules_to_save='head,bias,norm'),
  'one layer': LoraSpec('up', modules_to_save='m.1.norm'),
  'stack in part': LoraSpec('head', modules_to_save='m.0.up,m.2.up'),
  'embedding whole': LoraSpec('up', modules_to_save='embed'),
  'rows': LoraSpec('up', trainable_token_indices={'embed': (36, 5, 0)}),
  'embedding': LoraSpec('up,embed', rank=2, alpha=1),
}


@pytest.fixture
def float64():
  """Sums over 50 cancel to 0.3 here: float32 alone would part them by 1e-3."""
  params = weights()
  with jax.enable_x64(True):
    yield jax.tree.map(lambda w: w.astype(jnp.float64), params)


@pytest.mark.compat
@pytest.mark.parametrize('case', SPECS)
def test_it_begins_as_the_base_and_learns_as_the_merged_weights(case, float64):
  frozen, trainable = split(SPECS[case], float64)
  chex.assert_trees_all_close(
    fn(lora.bind(frozen, trainable), IDS), fn(float64, IDS), rtol=1e-12
  )
  trainable = moved(trainable)
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {np.dtype('float64')}

  def bound(t):
    return loss(lora.bind(frozen, t))

  def merged(t):
    return loss(lora.merge(frozen, t))

  def traced(t):
    return sum(
      jnp.sum(jnp.sin(out)) for out in lora.transform(fn)(frozen, t, IDS)
    )

  want = jax.jit(jax.value_and_grad(merged))(trainable)
  for own in (bound, traced):
    got = jax.jit(jax.value_and_grad(own))(trainable)
    chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-10)


def test_rows_of_an_embedding_cost_no_table():
  spec = SPECS['rows']
  frozen, trainable = split(spec)
  assert trainable['embed'].shape == (3, 6)
  jaxpr = jax.make_jaxpr(jax.grad(lambda t: loss(lora.bind(frozen, t))))(
    trainable
  )
  tables = [
    eqn.primitive.name
    for eqn, _ in walk(jaxpr.jaxpr)
    for v in eqn.outvars
    if v.aval.shape == (37, 6) and eqn.primitive.name != 'transpose'
  ]
  assert not tables  # no gradient, and no copy with the rows in it


def test_rows_stand_where_they_belong():
  frozen, trainable = split(SPECS['rows'])
  own = jnp.arange(18.0).reshape(3, 6)
  table = lora.merge(frozen, {**trainable, 'embed': own})['embed']
  want = np.array(weights()['embed'])
  want[[0, 5, 36]] = np.arange(18.0).reshape(3, 6)
  np.testing.assert_array_equal(table, want)


def test_what_is_trained_is_counted_and_the_base_is_not_kept_twice():
  frozen, trainable = split(
    LoraSpec(
      'up',
      rank=2,
      modules_to_save='head,m.1.norm',
      trainable_token_indices={'embed': (3, 1)},
    )
  )
  base = 11 + 37 * 6 + 6 * 11 + 3 * 6 + 3 * 36
  own = 3 * 2 * 12 + 6 * 11 + 6 + 2 * 6
  assert lora.count(frozen) == (own, base)
  assert sum(x.size for x in jax.tree.leaves(trainable)) == own
  assert frozen['head'].w is None
  with pytest.raises(ValueError, match='head is trained whole: its base is'):
    lora.bind(frozen, {**trainable, 'head': None})


def test_a_step_may_give_up_its_buffers():
  params = weights()
  _, trainable = split(SPECS['whole'], params)
  step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1.0, t), donate_argnums=0)
  step(trainable)
  jax.block_until_ready(loss(params))  # none of them was the base's own


def test_the_leaf_s_own_dtype_is_what_the_model_sees():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
  frozen, trainable = split(
    LoraSpec(
      'up',
      modules_to_save='head,norm',
      trainable_token_indices={'embed': (3,)},
    ),
    params,
  )
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.float32.dtype}
  for both in (lora.bind(frozen, trainable), lora.merge(frozen, trainable)):
    assert {w.dtype for w in both.values()} == {jnp.bfloat16.dtype}
  x = jnp.ones((2, 6), jnp.bfloat16)
  head = lora.bind(frozen, trainable)['embed'].T
  assert head.shape == (6, 37)
  assert (x @ head).dtype == jnp.bfloat16
  assert head.apply_to(x, jnp.float32).dtype == jnp.float32


def test_an_embedding_begins_as_pefts():
  frozen, trainable = split(LoraSpec('embed', rank=64, dropout=0.5))
  adapter = trainable['embed']
  assert adapter.a.shape == (64, 37)
  assert not adapter.a.any()
  assert abs(float(adapter.b.std()) - 1) < 0.1
  assert frozen['embed'].rate is None  # a look-up has no input to drop


def test_dora_of_an_embedding():
  frozen, trainable = split(LoraSpec('embed', rank=2, variant='dora'))
  assert trainable['embed'].m.shape == (6,)
  trainable = moved(trainable)
  table = lora.merge(frozen, trainable)['embed']
  got = lora.bind(frozen, trainable)['embed'][IDS]
  np.testing.assert_allclose(got, table[IDS], rtol=1e-5, atol=1e-5)
  traced = lora.transform(fn)(frozen, trainable, IDS)
  want = fn(lora.merge(frozen, trainable), IDS)
  chex.assert_trees_all_close(traced, want, rtol=1e-4, atol=1e-4)


def test_every_leaf_of_a_stranger_s_tree_has_its_path_for_a_name():
  params = {
    'dense': {'kernel': normal(0, 3, 5), 'bias': normal(1, 5)},
    'norm': {'scale': normal(2, 5)},
    'table': normal(3, 9, 3),
  }
  spec = LoraSpec('all-linear', modules_to_save='bias,norm.scale')
  layout = {'dense/kernel': 'io', 'table': 'vo'}
  _, trainable = lora.split(jax.random.key(0), params, spec, layout=layout)
  assert trainable['table'] is None  # no linear
  assert trainable['dense']['kernel'].a.shape == (8, 3)
  np.testing.assert_array_equal(
    trainable['dense']['bias'], params['dense']['bias']
  )
  assert trainable['norm']['scale'].shape == (5,)


@pytest.mark.parametrize(('spec', 'message'), [
  ({'init': 'pissa'}, 'embed: init pissa is not for an embedding'),
  ({'variant': 'lora_fa'}, 'embed: lora_fa freezes A'),
  ({'modules_to_save': 'm.1.up', 'targets': 'up'}, 'up: some of its layers'),
  ({'modules_to_save': 'bed'}, 'both an adapter and trained whole'),
  ({'trainable_token_indices': {'embed': (1,)}}, 'both an adapter and trained'),
  (
    {'targets': 'up', 'trainable_token_indices': {'embed': (37,)}},
    'embed: token 37 is past the last row of 37',
  ),
  (
    {'targets': 'up', 'trainable_token_indices': {'norm': (1,)}},
    r'norm: single rows are trained of an embedding \[V, D\] alone',
  ),
  (
    {'targets': 'up', 'trainable_token_indices': {'head': (1,)}},
    r'head: single rows are trained of an embedding \[V, D\] alone',
  ),
  (
    {'targets': 'up', 'trainable_token_indices': {'embed': (1,), 'bed': (2,)}},
    'embed: trained by more than one entry',
  ),
])  # fmt: skip
def test_what_cannot_be(spec, message):
  with pytest.raises(ValueError, match=message):
    split(LoraSpec(**{'targets': 'embed', **spec}))


def test_ids_count_and_stop_as_in_the_table_itself():
  frozen, trainable = split(SPECS['rows'])
  own = {**trainable, 'embed': trainable['embed'] + 1.0}
  bound, merged = (f(frozen, own)['embed'] for f in (lora.bind, lora.merge))
  for ids in ([-1, -2, -37], [36, 37, 99]):
    ids = jnp.array(ids)
    np.testing.assert_array_equal(bound[ids], merged[ids])
  ids = jnp.array([5, 6], jnp.uint8)
  with jax.numpy_dtype_promotion('strict'):
    np.testing.assert_array_equal(bound[ids], merged[ids])


def test_all_linear_beside_rows_of_an_embedding():
  spec = LoraSpec('all-linear', trainable_token_indices={'embed': (3, 4)})
  _, trainable = lora.split(
    jax.random.key(0), weights(), spec, layout={**LAYOUT, 'up': 'sio'}
  )
  assert trainable['embed'].shape == (2, 6)
  assert trainable['head'].b.shape == (8, 11)


@pytest.mark.parametrize(
  'names', [('q', 'enc.q', 'dec.q'), ('mlp.~.linear_0.w', 'mlp.~.w', 'b')]
)
def test_a_spec_of_halves_means_them_whatever_their_names(names):
  params = {str(i): normal(i, 4, 5) for i in range(3)}
  by_path = {str(i): (name,) for i, name in enumerate(names)}
  places = {
    name: lora.Placement(rank, scale)
    for name, rank, scale in zip(names, (1, 2, 2), (3.0, 0.5, 2.0), strict=True)
  }
  frozen, _ = lora.split(jax.random.key(0), params, places, by_path)
  spec = lora.spec_of(frozen, by_path)
  got = lora.resolve(spec, names)
  assert {n: p[:2] for n, p in got.items()} == {
    n: p[:2] for n, p in places.items()
  }


def test_halves_that_do_not_belong_together():
  frozen, trainable = split(SPECS['whole'])
  frozen = {**frozen, 'head': weights()['head']}
  with pytest.raises(ValueError, match='head is in both halves'):
    lora.bind(frozen, trainable)
  own = lora.bind({**frozen, 'head': None}, trainable)['head']
  np.testing.assert_array_equal(own, trainable['head'])
