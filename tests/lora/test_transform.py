"""`transform` of any function, against the same function of merged weights.

Reference: jax's own value and gradient of fn(merge(frozen, trainable)), and
for the cost the FLOPs of x @ W + s ((x @ A) @ B) written by hand.
"""

import dataclasses
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from lorax_train import lora
from lorax_train.lora import Adapter, Fixed, LoraSpec, axes
from lorax_train.lora.halves import is_half, path_of
from lorax_train.plan.flops import dots, flops, subjaxprs, walk
from tests.lora.cases import CASES, Case, normal

# Most of the time here goes into compiling: as little of it as can be.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def halves(params, layout, rank=3, **options):
  """Both halves of every leaf in `layout`, B not zero, scales all different."""
  spec = LoraSpec('.*', rank=rank, alpha=2.0, **options)
  frozen, trainable = lora.split(jax.random.key(1), params, spec, layout=layout)

  def rescaled(leaf):
    if not isinstance(leaf, Fixed):
      return leaf
    factor = jnp.arange(1.0, 1.0 + leaf.scale.size).reshape(leaf.scale.shape)
    return dataclasses.replace(leaf, scale=leaf.scale * factor)

  frozen = jax.tree.map(rescaled, frozen, is_leaf=is_fixed)
  return frozen, jax.tree.map(lambda x: normal(*x.shape, seed=3), trainable)


def is_fixed(x):
  return isinstance(x, Fixed)


def loss(out):
  """One number of all results."""
  floats = [
    x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  flat = [x.astype(jnp.float32).reshape(-1) for x in floats]
  return sum(jnp.vdot(x, jnp.cos(jnp.arange(float(x.size)))) for x in flat)


def close(got, want, tolerance=1e-5):
  """Leaf by leaf, relative to the largest number of a leaf."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    assert g.shape == w.shape
    assert g.dtype == w.dtype
    g, w = (np.asarray(x.astype(jnp.float32)) for x in (g, w))
    np.testing.assert_allclose(g, w, atol=tolerance * (1 + np.abs(w).max()))


def oracle(fn):
  return lambda frozen, t, *args: fn(merged(frozen, t), *args)


def merged(frozen, trainable):
  """`lora.merge`, but that DoRA's norm is a constant to the gradient."""

  def join(fixed, own):
    if not isinstance(own, Adapter) or own.m is None:
      return lora.merge(fixed, own)
    plain = lora.merge(
      dataclasses.replace(fixed, norm2=None), dataclasses.replace(own, m=None)
    )
    axes = dict(zip('abcdefg', fixed.axes, strict=False))
    all_, kept = ''.join(axes), [c for k in 'so' for c in axes if axes[c] == k]
    kept = ''.join(kept)
    norm = jnp.sqrt(jnp.einsum(f'{all_},{all_}->{kept}', plain, plain))
    gain = own.m / lax.stop_gradient(norm)
    w = jnp.einsum(f'{all_},{kept}->{all_}', plain, gain)
    return w + lax.stop_gradient(lora.merge(fixed, own) - w)

  return jax.tree.map(join, frozen, trainable, is_leaf=is_half)


def adapted(case, rank=3, **options):
  """(fn', its halves) of a case."""
  return case.fn, *halves(case.params, case.layout, rank, **options)


def both_ways(fn, params, layout, args, materialise=False, **options):
  """Result and gradient, by `transform` and by the merged weights.

  Returns:
    ((result, gradient) twice, the jaxpr of transform's).
  """

  def jitted(f):
    def result_and_gradient(params, args):
      frozen, trainable = halves(params, layout, **options)

      def of(t):
        result = f(frozen, t, *args)
        return loss(result), result

      return jax.grad(of, has_aux=True)(trainable)[::-1]

    return jax.jit(result_and_gradient)

  new = lora.transform(fn, materialise=materialise)
  both = [jitted(f) for f in (new, oracle(fn))]
  with jax.default_matmul_precision('highest'):
    results = jit(lambda *given: [f(*given) for f in both])(params, args)
    return results, both[0].trace(params, args).jaxpr


AS_MERGED = [(name, kind) for name in CASES for kind in ('lora', 'dora')]
# Its columns are of two lengths each: see NO_RULE_OF_GAINS.
AS_MERGED.remove(('weights_one_above_the_other', 'dora'))


@pytest.mark.compat
@pytest.mark.parametrize(('name', 'variant'), AS_MERGED)
def test_as_of_merged_weights_without_a_gradient_of_a_weight(name, variant):
  case = CASES[name]()
  results, jaxpr = both_ways(*case[:2], case.layout, case.args, variant=variant)
  close(*results)
  assert not products_of(jaxpr) & weight_shapes(case)


def weight_shapes(case):
  """Sorted shapes of what is adapted, whole and one index of the stack."""
  leaves = jax.tree_util.tree_leaves_with_path(case.params)
  axes = [(leaf.shape, case.layout.get(path_of(at), '')) for at, leaf in leaves]
  return {
    tuple(sorted(shape))
    for whole, axes in axes
    if axes
    for shape in (whole, whole[axes.count('s') :])
  }


def products_of(jaxpr):
  """Sorted shapes of what products, convolutions and scatters give."""
  makers = {
    'dot_general', 'conv_general_dilated', 'ragged_dot_general', 'scatter-add'
  }  # fmt: skip
  return {
    tuple(sorted(v.aval.shape))
    for eqn, _ in walk(jaxpr.jaxpr)
    if eqn.primitive.name in makers
    for v in eqn.outvars
  }


def by_hand(x, w, a, b, scale):
  """x W + s (x A^T) B with factors [R, *in] and [R, *out], as matrices."""
  r = a.shape[0]
  x = x.reshape(-1, a[0].size)
  u = jnp.einsum('ti,ri->tr', x, a.reshape(r, -1)) * scale
  return x @ w.reshape(a[0].size, b[0].size) + u @ b.reshape(r, -1)


def hand_two_dense(frozen, t, x):
  def dense(name, x):
    f, own = frozen[name], t[name]
    return by_hand(x, f.w, own.a, own.b, f.scale)

  return dense('w2', jnp.tanh(dense('w1', x) + frozen['b1']))


def hand_einsum_heads(frozen, t, x):
  q, o = frozen['q'], frozen['o']
  h = jnp.tanh(by_hand(x, q.w, t['q'].a, t['q'].b, q.scale))
  return by_hand(h, o.w, t['o'].a, t['o'].b, o.scale)


def hand_scan_over_layers(frozen, t, x):
  @jax.checkpoint
  def layer(x, both):
    f, own = both
    pair = lambda n: (f[n].w, own[n].a, own[n].b, f[n].scale)  # noqa: E731
    h = jnp.tanh(by_hand(x, *pair('up')))
    return x + by_hand(h, *pair('down')) * f['gain'], None

  return lax.scan(layer, x, (frozen, t))[0]


def hand_tied_embedding(frozen, t, ids):
  f, own = frozen['embed'], t['embed']

  def rows(ids):
    return f.w[ids] + (own.a[:, ids].T * f.scale) @ own.b

  x = rows(ids.reshape(-1))
  w = frozen['w']
  x = jnp.tanh(by_hand(x, w.w, t['w'].a, t['w'].b, w.scale))
  return by_hand(x, f.w.T, own.b, own.a, f.scale), 2.0 * rows(jnp.array([3]))


HANDS = [
  hand_two_dense,
  hand_einsum_heads,
  hand_scan_over_layers,
  hand_tied_embedding,
]


@pytest.mark.compat
@pytest.mark.parametrize('hand', HANDS)
def test_it_costs_what_the_formula_written_by_hand_costs(hand):
  fn, params, args, layout = CASES[hand.__name__.removeprefix('hand_')]()
  frozen, trainable = halves(params, layout)
  fs = hand, oracle(fn)
  close(
    *jit(lambda t: [loss(f(frozen, t, *args)) for f in fs])(trainable), 1e-4
  )
  new = lora.transform(fn)
  got, want = (
    flops(jax.grad(lambda t, f=f: loss(f(frozen, t, *args))), trainable)
    for f in (new, hand)
  )
  assert got == pytest.approx(want, rel=0.02)


def costs(fn, *args):
  """(FLOPs over all runs, sizes of the operands) of each product and conv."""
  for eqn, times in walk(jax.make_jaxpr(fn)(*args).jaxpr):
    shapes = [v.aval.shape for v in eqn.invars[:2]]
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == 'dot_general':
      inner = eqn.params['dimension_numbers'][0][0]
      k = math.prod(shapes[0][d] for d in inner)
    elif eqn.primitive.name == 'ragged_dot_general':
      numbers = eqn.params['ragged_dot_dimension_numbers']
      k = math.prod(shapes[0][d] for d in numbers.dot_dimension_numbers[0][0])
    elif eqn.primitive.name == 'conv_general_dilated':
      spec = eqn.params['dimension_numbers'].rhs_spec
      k = math.prod(shapes[1]) // shapes[1][spec[0]]
    else:
      continue
    yield 2 * out * k * times, {math.prod(shape) for shape in shapes}


STRANGERS = [
  *('einsum_heads', 'einsum_keys_and_values', 'scan_over_layers'),
  *('experts_ragged', 'experts_batched', 'custom_rules_on_activations'),
  *('linen_mlp', 'linen_attention', 'linen_transformer_scanned'),
  *('linen_conv_net', 'nnx_mlp', 'haiku_mlp', 'equinox_mlp'),
]


@pytest.mark.compat
@pytest.mark.parametrize('name', STRANGERS)
def test_it_adds_the_two_factors_to_each_product_and_no_more(name):
  rank = 3
  case = CASES[name]()
  frozen, trainable = jax.eval_shape(lambda: halves(case.params, case.layout))
  # By size, of one index of a stack and of all: (1 / in + 1 / out).
  extra = {}
  for half in filter(is_fixed, jax.tree.leaves(frozen, is_leaf=is_fixed)):
    stack, n_in, n_out = (
      math.prod(axes.sizes(half.w.shape, half.axes, k)) for k in 'sio'
    )
    for n in {1, stack}:
      cost = 1 / n_in + 1 / n_out
      assert extra.setdefault(n * n_in * n_out, cost) == pytest.approx(cost)
  want = used = 0
  for n, operands in costs(case.fn, case.params, *case.args):
    weights = [size for size in operands if size in extra]
    want += n * (1 + rank * sum(extra[size] for size in weights))
    used += len(weights)
  assert used >= len(case.layout)
  new = lora.transform(case.fn)
  got = sum(n for n, _ in costs(new, frozen, trainable, *case.args))
  assert got == pytest.approx(want, rel=0.02)


def test_a_scan_keeps_its_options_and_a_checkpoint_its_policy():
  fn, params, args, layout = CASES['scan_with_all_options']()
  frozen, trainable = halves(params, layout)

  def options(f, *args):
    found = []

    def visit(jaxpr):
      for eqn in jaxpr.eqns:
        keys = ('length', 'reverse', 'unroll', 'prevent_cse', 'policy')
        if eqn.primitive.name in ('scan', 'remat2', 'checkpoint'):
          found.append({k: eqn.params[k] for k in keys if k in eqn.params})
        for inner, _ in subjaxprs(eqn):
          visit(inner)

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return found

  new = lora.transform(fn)
  assert options(new, frozen, trainable, *args) == options(fn, params, *args)


def test_a_scan_saves_no_cast_copy_of_the_weights():
  def fn(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None)  # noqa: E731
    return lax.scan(layer, x, params['w'])[0]

  frozen, trainable = halves({'w': normal(3, 12, 12)}, {'w': 'sio'})
  x = normal(5, 12, dtype=jnp.bfloat16)
  new = lora.transform(fn)
  close(new(frozen, trainable, x), oracle(fn)(frozen, trainable, x), 2e-2)
  jaxpr = jax.make_jaxpr(jax.grad(lambda t: loss(new(frozen, t, x))))(trainable)
  (forward, *_) = (e for e in jaxpr.eqns if e.primitive.name == 'scan')
  saved = {(v.aval.shape, v.aval.dtype) for v in forward.outvars}
  assert ((3, 12, 12), jnp.dtype(jnp.bfloat16)) not in saved


@pytest.mark.compat
def test_low_precision_weights():
  """Cast down, cast up, in other dtypes than the activations."""

  def fn(params, x):
    y = x @ params['w'].astype(jnp.bfloat16).astype(jnp.float32)
    half = x.astype(jnp.bfloat16) @ params['h']
    wide = lax.dot(
      x.astype(jnp.bfloat16), params['h'], preferred_element_type=jnp.float32
    )
    return y, half, wide

  params = {'w': normal(12, 28), 'h': normal(12, 28, dtype=jnp.bfloat16)}
  frozen, trainable = halves(params, {'w': 'io', 'h': 'io'})
  x = normal(5, 12)
  got = lora.transform(fn)(frozen, trainable, x)
  close(got, oracle(fn)(frozen, trainable, x), 2e-2)
  # Sums are asked for in float32: only the operands are rounded.
  u = x.astype(jnp.bfloat16)
  assert got[2].dtype == jnp.float32
  exact = u.astype(jnp.float32) @ lora.merge(frozen, trainable)['h'].astype(
    jnp.float32
  )
  np.testing.assert_allclose(got[2], exact, atol=1e-2)


def while_case():
  def fn(params, x):
    def go_on(carry):
      i, x, _ = carry
      return (i < 3) & ((x @ params['stop']).sum() < 1e6)

    def body(carry):
      i, x, w = carry
      return i + 1, jnp.tanh(x @ w + x @ params['w2']), w

    _, x, w = lax.while_loop(go_on, body, (0, x, params['w']))
    return x @ w

  params = {'w': normal(12, 12), 'w2': normal(12, 12), 'stop': normal(12, 4)}
  layout = {'stop': 'io', 'w': 'io', 'w2': 'io'}
  return Case(fn, params, (normal(5, 12),), layout)


@pytest.mark.compat
def test_a_while_loop_has_value_and_forward_derivative():
  case = while_case()
  fn, frozen, trainable = adapted(case)
  assert lora.layout(fn, case.params, *case.args) == case.layout
  both = [
    lambda t, f=f: jax.jvp(lambda t: f(frozen, t, *case.args), [t], [t])
    for f in (lora.transform(fn), oracle(fn))
  ]
  close(*jit(lambda t: [f(t) for f in both])(trainable))


@pytest.mark.compat
def test_under_vmap_over_adapters_and_over_examples():
  case = CASES['scan_over_layers']()
  fn, frozen, trainable = adapted(case)
  (x,) = case.args
  fs = lora.transform(fn), oracle(fn)

  @jit
  def over_adapters(t, x):
    many = jax.tree.map(lambda t: jnp.stack([t, -t, 2 * t]), t)
    each = [jax.tree.map(lambda t, i=i: t[i], many) for i in range(3)]
    got = jax.vmap(fs[0], (None, 0, None))(frozen, many, x)
    return got, jnp.stack([fs[1](frozen, t, x) for t in each])

  @jit
  def over_examples(t, x):
    def of_one(f, t, x):
      return loss(f(frozen, t, x[None]))

    grads = jax.vmap(jax.grad(of_one, 1), (None, None, 0))
    return [grads(f, t, x) for f in fs]

  close(*over_adapters(trainable, x))
  close(*over_examples(trainable, x))


def test_under_jit_checkpoint_and_a_scan_of_training_steps():
  case = CASES['tied_embedding']()
  fn, frozen, trainable = adapted(case)

  def trained(f):
    f = jax.checkpoint(f)

    def step(t, _):
      value, grads = jax.value_and_grad(
        lambda t: loss(f(frozen, t, *case.args))
      )(t)
      return jax.tree.map(lambda p, g: p - 1e-2 * g, t, grads), value

    return lambda t: lax.scan(step, t, length=4)

  both = trained(lora.transform(fn)), trained(oracle(fn))
  close(*jit(lambda t: [f(t) for f in both])(trainable))


def test_arguments_that_are_no_arrays_steer_python_as_before():
  def fn(params, x, flip, *, act):
    y = act(x @ params['w'])
    return y[::-1] if flip else y

  frozen, trainable = halves({'w': normal(12, 28)}, {'w': 'io'})
  x = np.ones((5, 12), np.float32)
  got = lora.transform(fn)(frozen, trainable, x, True, act=jnp.tanh)
  want = oracle(lambda p, x: fn(p, x, True, act=jnp.tanh))
  close(got, want(frozen, trainable, x))


def test_a_plain_array_in_trainable_takes_the_place_of_the_leaf():
  case = CASES['two_dense']()
  fn, frozen, trainable = adapted(case)
  bias = normal(28, seed=9)
  frozen, trainable = dict(frozen, b1=None), dict(trainable, b1=bias)
  whole = dict(lora.merge(dict(frozen, b1=bias), dict(trainable, b1=None)))
  new = lora.transform(fn)
  close(new(frozen, trainable, *case.args), fn(whole, *case.args))
  got, want = jit(lambda: (
    jax.grad(lambda t: loss(new(frozen, t, *case.args)))(trainable)['b1'],
    jax.grad(lambda b: loss(fn(dict(whole, b1=b), *case.args)))(bias),
  ))()  # fmt: skip
  close(got, want)


@pytest.mark.parametrize(
  ('frozen', 'trainable', 'message'),
  [
    (normal(3, 4), Adapter(normal(1, 3), normal(1, 4)), 'w: an adapter but'),
    (normal(3, 4), normal(3, 4), 'w is in both halves'),
  ],
)
def test_halves_that_do_not_belong_together(frozen, trainable, message):
  new = lora.transform(lambda params, x: x @ params['w'])
  with pytest.raises(ValueError, match=message):
    new({'w': frozen}, {'w': trainable}, normal(2, 3))


def with_own_backward(x, w):
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
  )
  return product(x, w)


def carried_and_changed(x, w):
  step = lambda c, _: (c.T, x @ c)  # noqa: E731
  return lax.scan(step, w, length=2)


NO_RULE = {
  'sin': lambda x, w: x @ jnp.sin(w),
  'add': lambda x, w: x @ (w + 1.0),
  'mul of': lambda x, w: x @ (w * w),
  'mul': lambda x, w: x @ (w * jnp.arange(144.0).reshape(12, 12)),
  'integer_pow': lambda x, w: x @ w**3,
  'reduce_sum': lambda x, w: x + w.sum(),
  'sort': lambda x, w: x @ jnp.sort(w),
  'dot_general of': lambda x, w: x @ (w @ w),
  'neither an in nor': lambda x, w: jnp.einsum('b,io->bio', x[:, 0], w),
  'merges axes': lambda x, w: x @ w.reshape(-1)[:12],
  'custom_vjp': with_own_backward,
  'carries': carried_and_changed,
  'a branch': lambda x, w: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: -w),
  'along the first axis': lambda x, w: lax.scan(
    lambda c, row: (c + x @ row, None), jnp.zeros(5), w
  )[0],
  'integer': lambda x, w: x @ w.astype(jnp.int32).astype(jnp.float32),
  'in groups': lambda x, w: lax.conv_general_dilated(
    x.T.reshape(2, 5, 6) @ x[:, :6].T @ x, w.reshape(1, 12, 12),
    (1,), 'SAME', dimension_numbers=('NHC', 'HIO', 'NHC'), batch_group_count=2,
  ),
  'weights on the right': lambda x, w: lax.ragged_dot(
    w, jnp.stack([x.T, -x.T]), jnp.array([4, 8])
  ),
  'from the function': lambda x, w: (x, w),
}  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize('message', NO_RULE)
def test_what_has_no_low_rank_rule_says_so_or_is_materialised(message):
  fn = lambda params, x: NO_RULE[message](x, params['block']['w'])  # noqa: E731
  params, layout = {'block': {'w': normal(12, 12)}}, {'block/w': 'io'}
  refused(fn, params, layout, normal(5, 12), message, 'block/w')


def refused(fn, params, layout, x, *parts, **options):
  """There is an error of these parts, and none where it may materialise."""
  with pytest.raises(lora.LowRankError) as caught:
    jax.eval_shape(
      lambda: lora.transform(fn)(*halves(params, layout, **options), x)
    )
  for part in (*parts, 'materialise=True', 'targets'):
    assert part in str(caught.value)
  results, _ = both_ways(fn, params, layout, (x,), materialise=True, **options)
  close(*results, 2e-5)


NO_RULE_OF_GAINS = {
  'along an in axis': lambda x, w: x @ jnp.concatenate([w[0, :4], w[1, 4:]]),
  'over a stack': lambda x, w: jnp.einsum(
    'ltd,ldf->tf', jnp.stack([x, x + 1.0, x * x]), w
  ),
  'other operand': lambda x, w: jnp.einsum('tf,ldf->tld', x[:, :8], w),
}  # fmt: skip


@pytest.mark.parametrize('message', NO_RULE_OF_GAINS)
def test_where_columns_of_dora_have_no_length_of_their_own(message):
  fn = lambda params, x: NO_RULE_OF_GAINS[message](x, params['w'])  # noqa: E731
  params = {'w': normal(3, 12, 8)}
  refused(fn, params, {'w': 'sio'}, normal(5, 12), message, variant='dora')


def test_an_error_names_the_line():
  fn, params = lambda params, x: x @ jnp.exp(params['w']), {'w': normal(3, 4)}
  halved = halves(params, {'w': 'io'})
  line = fn.__code__.co_firstlineno
  with pytest.raises(lora.LowRankError, match=rf'test_transform.py:{line}\b'):
    lora.transform(fn)(*halved, normal(2, 3))


@pytest.mark.compat
def test_a_custom_vjp_may_be_inlined():
  fn = lambda params, x: with_own_backward(x, params['w'])  # noqa: E731
  frozen, trainable = halves({'w': normal(12, 28)}, {'w': 'io'})
  x = normal(5, 12)
  new = lora.transform(fn, inline_custom_vjp=True)
  fs = new, oracle(fn)
  close(*jit(lambda t: [
    jax.value_and_grad(lambda t, f=f: loss(f(frozen, t, x)))(t) for f in fs
  ])(trainable))  # fmt: skip
  made = [shape for _, shape in dots(
    jax.grad(lambda t: loss(new(frozen, t, x))), trainable
  )]  # fmt: skip
  assert (12, 28) not in made


OF_DROPOUT = [
  {},
  {'init': 'pissa'},
  {'variant': 'dora'},
  {'init': 'olora', 'variant': 'dora'},
]


@pytest.mark.compat
@pytest.mark.parametrize('options', OF_DROPOUT)
def test_dropout_falls_on_the_adapter_s_input_as_bind_has_it(options):
  def fn(params, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    return lax.scan(layer, x @ params['w'], params['layers'])[0]

  params = {'w': normal(12, 12), 'layers': normal(3, 12, 12)}
  layout = {'w': 'io', 'layers': 'sio'}
  frozen, trainable = halves(params, layout, dropout=0.4, **options)
  x, new = normal(5, 12), lora.transform(fn)

  def bound(frozen, t, x, key=None):
    return fn(lora.bind(frozen, t, key), x)

  @jit
  def both(t, key):
    return [
      jax.value_and_grad(lambda t, f=f: loss(f(frozen, t, x, key=key)))(t)
      for f in (new, bound)
    ]

  got, want = both(trainable, jax.random.key(5))
  close(got, want)
  assert not np.allclose(got[0], both(trainable, jax.random.key(6))[0][0])


@pytest.mark.parametrize('options', OF_DROPOUT[::3])
def test_dropout_before_a_convolution_is_that_before_a_product(options):
  x, key = normal(1, 2, 5, 12), jax.random.key(5)
  numbers = ('NHWC', 'HWIO', 'NHWC')
  conv = lambda params, x: lax.conv_general_dilated(  # noqa: E731
    x, params['w'], (1, 1), 'VALID', dimension_numbers=numbers
  )
  w = normal(12, 28)
  frozen, trainable = halves({'w': w}, {'w': 'io'}, dropout=0.4, **options)
  want = x @ lora.bind(frozen, trainable, key)['w']
  fixed, own = frozen['w'], trainable['w']
  kernel_of = lambda a: None if a is None else a[:, None, None]  # noqa: E731
  fixed = dataclasses.replace(
    fixed, w=w[None, None], axes='iiio', a0=kernel_of(fixed.a0)
  )
  own = dataclasses.replace(own, a=kernel_of(own.a))
  new = lora.transform(conv)
  close(new({'w': fixed}, {'w': own}, x, key=key), want)


@pytest.mark.parametrize('what', ['head', 'look-up'])
def test_dropout_without_an_input_is_an_error(what):
  fn = {
    'head': lambda params, x: x @ params['w'].T,
    'look-up': lambda params, x: params['w'][jnp.arange(3)],
  }[what]
  halved = halves({'w': normal(28, 12)}, {'w': 'io'}, dropout=0.4)
  new = lora.transform(fn)
  new(*halved, normal(5, 12))
  with pytest.raises(lora.LowRankError, match=r'w is adapted.*dropout'):
    new(*halved, normal(5, 12), key=jax.random.key(0))
  with pytest.raises(lora.LowRankError, match='w has dropout'):
    lora.transform(fn, materialise=True)(
      *halved, normal(5, 12), key=jax.random.key(0)
    )


@pytest.mark.compat
@pytest.mark.parametrize('variant', ['lora', 'dora'])
@pytest.mark.parametrize('spec', [P(), P('d'), P(None, 'd')])
def test_a_shard_map_takes_a_weight_however_it_lies(spec, variant):
  mesh = jax.make_mesh(
    (2,), ('d',), axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:2],
  )  # fmt: skip

  def fn(params, x):
    def shard(x, w):
      rows = lax.psum(x @ w, 'd') if spec == P('d') else x @ w
      return jnp.tanh(rows)

    x_spec = P(None, 'd') if spec == P('d') else P('d' if not spec else None)
    out = {P(): P('d'), P('d'): P()}.get(spec, P(None, 'd'))
    return jax.shard_map(
      shard, mesh=mesh, in_specs=(x_spec, spec), out_specs=out
    )(x, params['w'])

  params, x = {'w': normal(12, 28)}, normal(6, 12)
  results, _ = both_ways(fn, params, {'w': 'io'}, (x,), variant=variant)
  close(*results)


def test_tracing_needs_no_promotion_of_dtypes_or_ranks(strict):
  for name in ('two_dense', 'scan_over_layers', 'einsum_heads', 'convolutions'):
    fn, params, args, layout = CASES[name]()
    if name == 'two_dense':
      fn = lambda p, x: jnp.tanh(x @ p['w1']) @ p['w2']  # noqa: E731
    if name == 'scan_over_layers':
      fn = lambda p, x: lax.scan(  # noqa: E731
        lambda x, w: (x @ w['up'] @ w['down'], None), x, p)[0]  # fmt: skip
    for variant in ('lora', 'dora'):
      shapes = jax.eval_shape(
        functools.partial(halves, layout=layout, variant=variant), params
      )
      jax.eval_shape(lora.transform(fn), *shapes, *args)


@pytest.mark.compat
@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_factors_taken_from_the_base(init):
  fn, params, args, layout = CASES['einsum_heads']()
  results, _ = both_ways(fn, params, layout, args, init=init)
  close(*results)
  spec = LoraSpec('.*', rank=3, init=init)

  @jit
  def at_the_start(key):
    start = lora.split(key, params, spec, layout=layout)
    return lora.transform(fn)(*start, *args), fn(params, *args)

  close(*at_the_start(jax.random.key(0)))


def test_a_frozen_a_gets_no_gradient():
  fn, params, args, layout = CASES['two_dense']()
  results, _ = both_ways(fn, params, layout, args, variant='lora_fa')
  close(*results)
  assert results[0][1]['w1'].a is None


@pytest.mark.compat
def test_dora_of_a_stack_in_bfloat16_and_of_one_that_has_no_adapter():
  fn = lambda params, x: lax.scan(  # noqa: E731
    lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, params['w']
  )[0]
  params = {'w': normal(3, 12, 12, dtype=jnp.bfloat16)}
  frozen, trainable = halves(params, {'w': 'sio'}, variant='dora')
  scale = jnp.array([2.0, 0.0, 0.5])
  frozen = {'w': dataclasses.replace(frozen['w'], scale=scale)}
  x, new = normal(5, 12), jax.jit(lora.transform(fn))
  close(new(frozen, trainable, x), oracle(fn)(frozen, trainable, x), 2e-2)
  jaxpr = new.trace(frozen, trainable, x).jaxpr
  made = {(v.aval.shape, v.aval.dtype) for eqn, _ in walk(jaxpr.jaxpr)
          for v in eqn.outvars}  # fmt: skip
  assert ((3, 12, 12), jnp.dtype(jnp.float32)) not in made


def test_weights_with_and_without_dora_in_one_stack():
  def fn(params, x):
    # Cut along its in axis and put together again, a weight has one length.
    whole = jnp.concatenate(jnp.split(params['a'], 2))
    stack = jnp.stack([params['a'], params['b'], whole])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

  params = {'a': normal(12, 12), 'b': normal(12, 12, seed=1)}
  frozen, trainable = halves(params, {'a': 'io', 'b': 'io'}, variant='dora')
  frozen['b'] = dataclasses.replace(frozen['b'], norm2=None)
  trainable['b'] = dataclasses.replace(trainable['b'], m=None)
  fs, x = (lora.transform(fn), oracle(fn)), normal(5, 12)
  close(*jit(lambda t: [f(frozen, t, x) for f in fs])(trainable))


@pytest.mark.parametrize(
  ('axes', 'shape', 'dim'), [('io', (12, 28), 1), ('sio', (3, 12, 28), 0)]
)
def test_what_lies_outside_of_a_weight_has_no_length(axes, shape, dim):
  def fn(params, x, ids):
    return x @ jnp.take(params['w'], ids, dim, mode='fill', fill_value=0.5)

  params, args = {'w': normal(*shape)}, (normal(5, 12), jnp.array([2, 99, 1]))
  results, _ = both_ways(fn, params, {'w': axes}, args, variant='dora')
  close(*results)


@pytest.mark.parametrize('rows', [(), (3, 30)])
def test_beside_an_embedding_that_is_trained_itself(rows):
  fn, params, args, layout = CASES['tied_embedding']()
  which = {'modules_to_save': 'embed'}
  if rows:
    which = {'trainable_token_indices': {'embed': rows}, 'exclude': 'embed'}
  results, _ = both_ways(fn, params, layout, args, **which)
  close(*results)


@st.composite
def products(draw):
  """(subscripts, sizes, axes of w, variant) of x,w->y or w,x->y."""
  letters = 'abcdefg'
  kinds = draw(
    st.lists(st.sampled_from('sio'), min_size=2, max_size=4).filter(
      lambda kinds: {'i', 'o'} <= set(kinds)
    )
  )
  w = dict(zip(letters, kinds, strict=False))
  free = 'xy'[: draw(st.integers(0, 2))]
  x = [c for c, kind in w.items() if kind in 'si'] + list(free)
  y = [c for c, kind in w.items() if kind in 'so'] + list(free)
  x, y = draw(st.permutations(x)), draw(st.permutations(y))
  sizes = {c: draw(st.sampled_from([1, 2, 3])) for c in letters + free}
  left, right = ''.join(x), ''.join(w)
  if draw(st.booleans()):
    left, right = right, left
  variant = draw(st.sampled_from(['lora', 'dora']))
  return f'{left},{right}->{"".join(y)}', sizes, ''.join(kinds), variant


@hypothesis.given(products())
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_any_product_of_a_weight(case):
  subscripts, sizes, axes, variant = case
  left, right = subscripts.partition('->')[0].split(',')
  w_letters = 'abcdefg'[: len(axes)]
  w_first = left == w_letters
  x_letters = right if w_first else left

  def fn(params, x):
    operands = (params['w'], x) if w_first else (x, params['w'])
    return jnp.einsum(subscripts, *operands, optimize=False)

  params = {'w': normal(*(sizes[c] for c in w_letters))}
  x = normal(*(sizes[c] for c in x_letters), seed=4)

  @jit
  def both(params, x):
    frozen, trainable = halves(params, {'w': axes}, rank=2, variant=variant)
    return [f(frozen, trainable, x) for f in (lora.transform(fn), oracle(fn))]

  close(*both(params, x))
  if min(sizes[c] for c in w_letters) > 1:
    assert lora.layout(fn, params, x) == {'w': axes}


@pytest.mark.compat
def test_what_touches_no_weight_stays_as_it_is():
  """Callbacks, random bits and kernels beside weights, inside loops."""
  seen = []

  def double(x_ref, y_ref):
    y_ref[...] = 2.0 * x_ref[...]

  def fn(params, x, key):
    def layer(carry, w):
      x, key = carry
      key, own = jax.random.split(key)
      x = jnp.where(jax.random.bernoulli(own, 0.5, x.shape), x @ w, x)
      jax.debug.callback(lambda n: seen.append(float(n)), x.sum())
      kernel = pl.pallas_call(
        double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
      )
      return (kernel(x), key), None

    return lax.scan(layer, (x, key), params['w'])[0][0], 3, x.shape[0] * 1.0

  frozen, trainable = halves({'w': normal(3, 12, 12)}, {'w': 'sio'})
  args = (normal(5, 12), jax.random.key(3))
  got = jax.jit(lora.transform(fn))(frozen, trainable, *args)
  jax.effects_barrier()
  assert len(seen) == 3
  want = jax.jit(fn)(lora.merge(frozen, trainable), *args)
  close(got, want)
  close(lora.transform(fn)(frozen, trainable, *args), want)


def test_constants_come_out_as_arrays():
  @jax.jit
  def inner(x, w):
    return x @ w, 3, 1.5

  fn = lambda params, x: (*inner(x, params['w']), 7)  # noqa: E731
  frozen, trainable = halves({'w': normal(12, 28)}, {'w': 'io'})
  got = lora.transform(fn)(frozen, trainable, normal(5, 12))
  assert [int(2 * x) for x in got[1:]] == [6, 3, 14]
  assert all(isinstance(x, jax.Array) for x in got)
