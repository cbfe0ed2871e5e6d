"""`x @ w` of quantised weights: everywhere, and never more than one W whole.

Reference: the plain array that a weight stands for, in its place.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from lorax_train import parallel
from lorax_train.lora.weight import product
from lorax_train.models import ops
from lorax_train.quant import Int8Weight, int8

from .cases import FLAT, STACK, matrices, nf4_weight, stacked

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures('strict')]


def int8_weight(shape, seed=0):
  return stacked([int8.quantise(w.T) for w in matrices(shape, seed)])


KINDS = {
  'nf4': nf4_weight(STACK),
  'nf4, plain absmax': nf4_weight(STACK, double=False),
  'nf4, flat': nf4_weight(FLAT),
  'int8': int8_weight(STACK),
}
kinds = pytest.mark.parametrize('kind', KINDS)
whole = jax.jit(lambda weight: weight.dequantised())
PLAIN = {kind: whole(weight) for kind, weight in KINDS.items()}


def layer(weight, l):
  return jax.tree.map(lambda x: x[l], weight)


@kinds
def test_is_near_what_it_was_made_of(kind):
  weight = KINDS[kind]
  w = matrices(weight.shape)
  got = np.asarray(PLAIN[kind])
  assert got.dtype == weight.dtype == np.float32
  assert (got.shape, got.ndim) == (w.shape, weight.ndim)
  error = np.sqrt(np.mean((got - w) ** 2) / np.mean(w**2))
  assert error < (0.01 if kind == 'int8' else 0.1)


@kinds
def test_a_product_equals_that_of_the_plain_array(kind):
  weight, plain = layer(KINDS[kind], 1), PLAIN[kind][1]
  x = matrices((5, weight.shape[0]), seed=1)
  zeros = np.zeros_like(x)

  @jax.jit
  def all_ways(weight, x):
    half = x.astype(jnp.bfloat16)
    ways = (x @ weight, ops.dot(x, weight), product(x, weight))
    assert (half @ weight).dtype == jnp.bfloat16
    assert (zeros @ weight).shape == (5, weight.shape[1])
    return ways, weight.apply_to(half, jnp.float32)

  same, wide = all_ways(weight, x)
  for got in same:
    np.testing.assert_allclose(got, x @ plain, rtol=1e-5, atol=1e-6)
  assert wide.dtype == jnp.float32
  x, plain = (np.float32(a.astype(jnp.bfloat16)) for a in (x, plain))
  np.testing.assert_allclose(wide, x @ plain, rtol=1e-5, atol=1e-6)


def net(weight, x):
  """A scan over layers with remat: x [B, in] through W and back."""

  def body(h, w):
    y = ops.dot(h, w)
    return h + jnp.tanh(y).sum(-1, keepdims=True) * 0.01, y.sum()

  h, ys = jax.lax.scan(jax.checkpoint(body), x, weight)
  return h.sum() + ys.sum()


@pytest.mark.parametrize('kind', ['nf4', 'nf4, flat', 'int8'])
def test_every_transformation_sees_the_plain_array(kind):
  weight = KINDS[kind]
  plain = PLAIN[kind]
  x = jnp.asarray(matrices((4, weight.shape[1]), seed=2))
  close = lambda got, want: np.testing.assert_allclose(  # noqa: E731
    got, want, rtol=2e-5, atol=1e-4
  )

  def all_of(w):
    grad = jax.vmap(jax.value_and_grad(net, argnums=1), (None, 0))
    return (
      grad(w, jnp.stack([x, -x])),
      jax.jvp(lambda x: net(w, x), (x,), (jnp.ones_like(x),)),
      # A stack without a scan: weights with axes in front.
      jax.vmap(product, (None, 0))(x, w),
    )

  jax.tree.map(close, jax.jit(all_of)(weight), jax.jit(all_of)(plain))


@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_cut_over_devices_it_stands_for_the_same(kind):
  weight = KINDS[kind]
  mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
  cut = P(None, 'fsdp', 'tensor')

  def place(name, x):
    spec = cut if x.ndim == 3 else P()
    if name == 'scale':
      spec = P(None, 'tensor')
    return jax.device_put(x, NamedSharding(mesh, spec))

  fields = [f.name for f in dataclasses.fields(weight)]
  spread = dataclasses.replace(
    weight,
    **{
      name: place(name, x)
      for name in fields
      if isinstance(x := getattr(weight, name), jax.Array)
    },
  )
  assert spread.sharding.spec == cut
  x = jnp.asarray(matrices((4, weight.shape[1]), seed=2))
  rows = jax.device_put(x, NamedSharding(mesh, P(('data', 'fsdp'))))
  grad = jax.jit(jax.value_and_grad(net, argnums=1))
  with jax.set_mesh(mesh):
    got = grad(spread, rows)
    plain = whole(spread)
  assert plain.sharding.is_equivalent_to(NamedSharding(mesh, cut), 3)
  np.testing.assert_allclose(plain, PLAIN[kind], rtol=1e-6)
  for a, b in zip(got, grad(weight, x), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)


def whole_stacks(fn, weight):
  """Arrays of floats as large as the stack in the program of fn's gradient."""
  x = jnp.ones((4, weight.shape[1]), jnp.float32)
  program = jax.jit(jax.grad(fn, argnums=1)).lower(weight, x).compile()
  found = re.findall(r'(?:f32|bf16|f16)\[([\d,]+)\]', program.as_text())
  sizes = {dims: math.prod(map(int, dims.split(','))) for dims in found}
  return {dims for dims in found if sizes[dims] >= math.prod(weight.shape)}


@pytest.mark.parametrize('kind', ['nf4', 'nf4, flat', 'int8'])
def test_no_more_than_one_layer_is_ever_whole(kind):
  def scanned(w, x, product):
    def body(h, w):
      y = product(h, w)
      return h + jnp.tanh(y).sum(-1, keepdims=True) * 0.01, y.sum()

    h, ys = jax.lax.scan(body, x, w)
    return h.sum() + ys.sum()

  def hoarding(x, w):
    """What must be found: W is saved for the backward pass."""
    return x @ w.dequantised()

  weight = KINDS[kind]
  if kind == 'nf4':
    assert whole_stacks(functools.partial(scanned, product=hoarding), weight)
  assert not whole_stacks(functools.partial(scanned, product=ops.dot), weight)


@kinds
def test_it_has_no_transpose(kind):
  with pytest.raises(ValueError, match='has no transpose'):
    KINDS[kind].T  # noqa: B018


def test_int8_equals_bitsandbytes(golden):
  theirs = load_file(golden / 'quantised.safetensors')
  for name in ('whole', 'short'):
    w = theirs[f'{name}.w']
    ours = int8.quantise(w)
    np.testing.assert_array_equal(ours.q.T, theirs[f'{name}.int8'])
    np.testing.assert_array_equal(ours.scale, theirs[f'{name}.int8_scale'])
    shapes = int8.abstract(w.shape[::-1], w.dtype)
    assert jax.tree.structure(shapes) == jax.tree.structure(ours)
    q, scale = theirs[f'{name}.int8'], theirs[f'{name}.int8_scale']
    on_device = Int8Weight(jnp.asarray(q.T), jnp.asarray(scale), w.dtype)
    np.testing.assert_allclose(
      on_device.dequantised(jnp.float32).T,
      q.astype(np.float32) * scale[:, None] / 127,
      rtol=1e-6,
    )
