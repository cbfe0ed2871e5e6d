"""Functions written without us, and what each of their weights is to them.

Every case is (function, params, arguments, layout). Sizes are such that no
activation has the shape of a weight.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax


class Case(NamedTuple):
  fn: object
  params: object
  args: tuple
  layout: dict


def normal(*shape, dtype=jnp.float32, seed=0):
  # numpy's: jax would compile a program for every shape.
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)


def filled(shapes):
  """Random numbers where a library would begin with its own."""
  return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


CASES = {}


def case(make):
  CASES[make.__name__] = make
  return make


@case
def two_dense():
  def fn(params, x):
    h = jnp.tanh(x @ params['w1'] + params['b1'])
    return h @ params['w2']

  params = {'w1': normal(12, 28), 'b1': normal(28), 'w2': normal(28, 7)}
  return Case(fn, params, (normal(5, 12),), {'w1': 'io', 'w2': 'io'})


@case
def torch_linear():
  def fn(params, x):
    return jnp.tanh(x @ params['w1'].T) @ params['w2'].T

  params = {'w1': normal(28, 12), 'w2': normal(7, 28)}
  return Case(fn, params, (normal(5, 12),), {'w1': 'oi', 'w2': 'oi'})


@case
def weight_on_the_left():
  def fn(params, x):
    return params['w'] @ x

  return Case(fn, {'w': normal(28, 12)}, (normal(12, 5),), {'w': 'oi'})


@case
def weight_shared_by_two_layers():
  def fn(params, x):
    return jnp.tanh(x @ params['w']) @ params['w']

  return Case(fn, {'w': normal(12, 12)}, (normal(5, 12),), {'w': 'io'})


@case
def einsum_heads():
  def fn(params, x):
    q = jnp.einsum('BTD,DNH->BTNH', x, params['q'])
    return jnp.einsum('BTNH,NHD->BTD', jnp.tanh(q), params['o'])

  params = {'q': normal(12, 3, 8), 'o': normal(3, 8, 12)}
  return Case(fn, params, (normal(2, 5, 12),), {'o': 'iio', 'q': 'ioo'})


@case
def einsum_keys_and_values():
  def fn(params, x):
    return jnp.einsum('BSD,CKDH->CBSKH', x, params['kv'])

  return Case(
    fn, {'kv': normal(2, 3, 12, 8)}, (normal(4, 5, 12),), {'kv': 'ooio'}
  )


@case
def scan_over_layers():
  def fn(params, x):
    @jax.checkpoint
    def layer(x, w):
      return x + jnp.tanh(x @ w['up']) @ w['down'] * w['gain'], None

    return lax.scan(layer, x, params)[0]

  params = {
    'up': normal(3, 12, 28),
    'down': normal(3, 28, 12),
    'gain': normal(3, 12),
  }
  return Case(fn, params, (normal(5, 12),), {'down': 'sio', 'up': 'sio'})


@case
def scan_with_all_options():
  def fn(params, x, steps):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def layer(carry, inputs):
      x, n = carry
      step, w = inputs
      h = jax.checkpoint(lambda x: jnp.tanh(x @ w), policy=policy)(x)
      h = h @ params['shared']
      return (h + step, n + 1), h.sum()

    (x, n), sums = lax.scan(
      layer, (x, 0), (steps, params['w']), reverse=True, unroll=2
    )
    return x, n, sums

  params = {'w': normal(4, 12, 28), 'shared': normal(28, 12)}
  args = (normal(5, 12), jnp.arange(4.0))
  return Case(fn, params, args, {'shared': 'io', 'w': 'sio'})


@case
def weight_carried_by_a_scan():
  def fn(params, x):
    def step(carry, _):
      x, w = carry
      return (jnp.tanh(x @ w), w), None

    (x, w), _ = lax.scan(step, (x, params['w']), length=3)
    return x @ w

  return Case(fn, {'w': normal(12, 12)}, (normal(5, 12),), {'w': 'io'})


@case
def layers_by_index():
  def fn(params, x, layer):
    w = params['w']
    x = jnp.tanh(x @ w[0]) @ w[1]
    x += jax.vmap(lambda x, i: x @ w[i])(x, jnp.arange(5) % 3)
    return x @ lax.dynamic_index_in_dim(w, layer, keepdims=False)

  args = (normal(5, 12), jnp.int32(2))
  return Case(fn, {'w': normal(3, 12, 12)}, args, {'w': 'sio'})


@case
def tied_embedding():
  def fn(params, ids):
    x = jnp.take(params['embed'], ids, axis=0)
    x = jnp.tanh(x @ params['w'])
    return x @ params['embed'].T, params['embed'][3] * 2.0

  params = {'embed': normal(37, 12), 'w': normal(12, 12)}
  ids = jnp.array([[1, 4, 4], [36, 0, 2]])
  return Case(fn, params, (ids,), {'embed': 'vo', 'w': 'io'})


@case
def tables_of_embeddings():
  def fn(params, i, j):
    row = lambda table: table[i]  # noqa: E731
    bias = params['bias'][i, j]
    return bias, lax.map(row, params['tables']), jax.vmap(row)(params['many'])

  params = {
    'bias': normal(5, 7, 3), 'many': normal(4, 11, 6), 'tables': normal(4, 9, 6)
  }  # fmt: skip
  layout = {'bias': 'vvo', 'many': 'svo', 'tables': 'svo'}
  return Case(fn, params, (jnp.arange(2), jnp.arange(2)), layout)


@case
def embedding_by_brackets():
  def fn(params, ids):
    rows = params['embed'][ids]
    filled = params['embed'].at[ids * 3].get(mode='fill', fill_value=5.0)
    one_by_one = jax.vmap(lambda i: params['embed'][i])(ids[0])
    return rows.sum(-2), filled, one_by_one

  ids = jnp.array([[1, 4, 4], [36, 0, 2]])  # 108 lies outside, and is filled
  return Case(fn, {'embed': normal(37, 12)}, (ids,), {'embed': 'vo'})


@case
def experts_ragged():
  def fn(params, x, sizes):
    h = jnp.tanh(lax.ragged_dot(x, params['up'], sizes))
    return lax.ragged_dot(h, params['down'], sizes)

  params = {'up': normal(3, 12, 28), 'down': normal(3, 28, 12)}
  args = (normal(8, 12), jnp.array([3, 0, 5]))
  return Case(fn, params, args, {'down': 'sio', 'up': 'sio'})


@case
def experts_ragged_both_ways():
  """There and back through the same weights, in groups and out of them."""

  def fn(params, x, sizes):
    numbers = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
    h = jnp.tanh(lax.ragged_dot(x, params['w'], sizes))
    return lax.ragged_dot_general(h, params['w'], sizes, numbers)

  args = (normal(8, 12), jnp.array([3, 0, 5]))
  return Case(fn, {'w': normal(3, 12, 28)}, args, {'w': 'sio'})


@case
def experts_batched():
  def fn(params, x):
    return jnp.einsum('ETD,EDF->ETF', x, params['w'])

  return Case(fn, {'w': normal(3, 12, 28)}, (normal(3, 5, 12),), {'w': 'sio'})


@case
def experts_by_token():
  def fn(params, x, expert):
    return jnp.einsum('TD,TDF->TF', x, params['w'][expert])

  args = (normal(5, 12), jnp.array([0, 2, 1, 1, 0]))
  return Case(fn, {'w': normal(3, 12, 28)}, args, {'w': 'sio'})


@case
def weights_under_vmap():
  def fn(params, x):
    return jax.vmap(jnp.matmul)(x, params['w'])

  return Case(fn, {'w': normal(3, 12, 28)}, (normal(3, 5, 12),), {'w': 'sio'})


@case
def convolutions():
  def fn(params, x):
    x = lax.conv_general_dilated(
      x, params['k1'], (2, 1), 'SAME', rhs_dilation=(1, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    x = jnp.moveaxis(jnp.tanh(x), -1, 1)
    return lax.conv(x, params['k2'], (1, 1), 'VALID')

  params = {'k1': normal(3, 3, 4, 12), 'k2': normal(7, 12, 2, 2)}
  layout = {'k1': 'iiio', 'k2': 'oiii'}
  return Case(fn, params, (normal(2, 9, 6, 4),), layout)


@case
def convolutions_in_groups():
  """Of features, in both orders of axes; depthwise, from a flat kernel."""

  def fn(params, x):
    x = lax.conv_general_dilated(
      x, params['half'], (1, 2), 'SAME', feature_group_count=2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    x = jnp.moveaxis(jnp.tanh(x), -1, 1)
    x = lax.conv_general_dilated(
      x, params['deep'], (1, 1), 'VALID', feature_group_count=10
    )
    flat = params['flat'].reshape(2, 2, 1, 20)
    return lax.conv_general_dilated(
      x, flat, (1, 1), 'SAME', feature_group_count=20,
      dimension_numbers=('NCHW', 'HWIO', 'NHWC'),
    )  # fmt: skip

  params = {
    'deep': normal(20, 1, 2, 2), 'flat': normal(4, 20),
    'half': normal(3, 3, 2, 10),
  }  # fmt: skip
  layout = {'deep': 'oiii', 'flat': 'io', 'half': 'iiio'}
  return Case(fn, params, (normal(2, 5, 6, 4),), layout)


@case
def views():
  def fn(params, x):
    w, x = jax.device_put((params['w'], x))
    y = x @ (-2.0 * w[:, 1:21] / 3.0).reshape(12, 20)
    q, k = jnp.split(w, 2, axis=1)
    heads = q.reshape(12, 2, 7)
    y2 = jnp.einsum('td,dnh->tnh', x, heads)
    y3 = x[:, 2:7] @ w[2:7, ::3]
    y4 = x[None] @ lax.optimization_barrier(k)[None]
    return y, y2, y3, y4, x @ jnp.flip(w, 1), x.reshape(5, 4, 3) @ w[:3]

  return Case(fn, {'w': normal(12, 28)}, (normal(5, 12),), {'w': 'io'})


@case
def weights_side_by_side():
  """Fused projections, and layers stacked for a scan."""

  plain = normal(12, 10)

  def fn(params, x):
    fused = jnp.concatenate([params['q'], plain, params['k']], 1)
    y = x @ fused
    stack = jnp.stack([params['l0'], params['l1']])
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
    for w in params['list']:
      x = jnp.tanh(x @ w)
    return y, x

  params = {
    'k': normal(12, 11),
    'l0': normal(12, 12, seed=1),
    'l1': normal(12, 12, seed=2),
    'list': normal(2, 12, 12),
    'q': normal(12, 28),
  }
  layout = dict.fromkeys(params, 'io') | {'list': 'sio'}
  return Case(fn, params, (normal(5, 12),), layout)


@case
def weights_one_above_the_other():
  def fn(params, x):
    return x @ jnp.concatenate([params['top'], params['low']])

  params = {'low': normal(8, 9), 'top': normal(4, 9)}
  return Case(fn, params, (normal(5, 12),), {'low': 'io', 'top': 'io'})


@case
def loops_and_branches():
  def fn(params, x, flag):
    def body(carry):
      i, x = carry
      return i + 1, jnp.tanh(x @ params['w'])

    # A while_loop with a known count is a scan: it differentiates.
    _, x = lax.fori_loop(0, 3, lambda _, c: body(c), (0, x))
    return lax.cond(
      flag, lambda w: x @ w, lambda w: 2.0 * (x @ w).sum() + x, params['w']
    )

  args = (normal(5, 12), jnp.bool_(True))
  return Case(fn, {'w': normal(12, 12)}, args, {'w': 'io'})


@case
def custom_rules_on_activations():
  @jax.custom_vjp
  def clipped(x):
    return jnp.tanh(x)

  clipped.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, g: (jnp.clip(g, -0.1, 0.1),)
  )

  def fn(params, x):
    x = jax.nn.silu(clipped(x @ params['w1']))
    return jax.jit(jax.nn.relu)(x @ params['w2'])

  params = {'w1': normal(12, 28), 'w2': normal(28, 7)}
  return Case(fn, params, (normal(5, 12),), {'w1': 'io', 'w2': 'io'})


@case
def custom_jvp_fed_by_a_weight():
  @jax.custom_jvp
  def product(x, w):
    return x @ w

  @product.defjvp
  def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return product(x, w), dx @ w + x @ dw

  def fn(params, x):
    return product(x, params['w'])

  return Case(fn, {'w': normal(12, 28)}, (normal(5, 12),), {'w': 'io'})


@case
def gradient_inside():
  """A function that differentiates in its input, through the weight."""

  def fn(params, x):
    energy = lambda x: jnp.tanh(x @ params['w']).sum()  # noqa: E731
    return jax.grad(energy)(x)

  return Case(fn, {'w': normal(12, 28)}, (normal(5, 12),), {'w': 'io'})


@case
def linen_mlp():
  nn = importlib.import_module('flax.linen')

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(7)(nn.gelu(nn.LayerNorm()(nn.Dense(28)(x))))

  return _linen(
    Net(),
    normal(5, 12),
    {'params/Dense_0/kernel': 'io', 'params/Dense_1/kernel': 'io'},
  )


@case
def linen_attention():
  nn = importlib.import_module('flax.linen')
  module = nn.MultiHeadDotProductAttention(num_heads=4)
  layout = {
    'params/key/kernel': 'ioo',
    'params/out/kernel': 'iio',
    'params/query/kernel': 'ioo',
    'params/value/kernel': 'ioo',
  }
  return _linen(module, normal(2, 5, 24), layout)


@case
def linen_transformer_scanned():
  nn = importlib.import_module('flax.linen')

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      h = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
      return x + nn.Dense(24)(nn.gelu(nn.Dense(52)(nn.LayerNorm()(x)))), None

  class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(37, 24)
      blocks = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=2,
      )
      x, _ = blocks(name='blocks')(embed(ids), None)
      return embed.attend(x)

  attention = 'params/blocks/MultiHeadDotProductAttention_0'
  return _linen(
    Net(),
    jnp.array([[1, 5, 36, 0, 2]]),
    {
      'params/Embed_0/embedding': 'vo',
      'params/blocks/Dense_0/kernel': 'sio',
      'params/blocks/Dense_1/kernel': 'sio',
      f'{attention}/key/kernel': 'sioo',
      f'{attention}/out/kernel': 'siio',
      f'{attention}/query/kernel': 'sioo',
      f'{attention}/value/kernel': 'sioo',
    },
  )


@case
def linen_conv_net():
  nn = importlib.import_module('flax.linen')

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(6, (3, 3))(x))
      x = nn.avg_pool(x, (2, 2), (2, 2))
      return nn.Dense(5)(nn.ConvTranspose(8, (2, 2))(x).reshape(2, -1))

  layout = {
    'params/Conv_0/kernel': 'iiio',
    'params/ConvTranspose_0/kernel': 'iiio',
    'params/Dense_0/kernel': 'io',
  }
  return _linen(Net(), normal(2, 6, 6, 3), layout)


def _linen(module, x, layout):
  args = (x, x) if 'inputs_kv' in _names(module) else (x,)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  return Case(module.apply, filled(shapes), args, layout)


def _names(module):
  return type(module).__call__.__code__.co_varnames


@case
def nnx_mlp():
  nnx = pytest.importorskip('flax.nnx')

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(12, 28, rngs=rngs)
      self.down = nnx.Linear(28, 7, rngs=rngs)

    def __call__(self, x):
      return self.down(nnx.gelu(self.up(x)))

  net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  graph, state = nnx.split(net, nnx.Param)

  def fn(params, x):
    return nnx.merge(graph, nnx.State(params))(x)

  layout = {'down/kernel': 'io', 'up/kernel': 'io'}
  params = filled(nnx.to_pure_dict(state))
  return Case(fn, params, (normal(5, 12),), layout)


@case
def haiku_mlp():
  hk = pytest.importorskip('haiku')
  net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([28, 7])(x)))
  x = normal(5, 12)
  layout = {'mlp/~/linear_0/w': 'io', 'mlp/~/linear_1/w': 'io'}
  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  return Case(net.apply, filled(shapes), (x,), layout)


@case
def equinox_mlp():
  eqx = pytest.importorskip('equinox')
  make = functools.partial(eqx.nn.MLP, 12, 7, 28, 1)
  net = eqx.filter_eval_shape(make, key=jax.random.key(0))
  shapes, static = eqx.partition(net, lambda x: hasattr(x, 'shape'))

  def fn(params, x):
    return jax.vmap(eqx.combine(params, static))(x)

  layout = {'layers/0/weight': 'oi', 'layers/1/weight': 'oi'}
  return Case(fn, filled(shapes), (normal(5, 12),), layout)
