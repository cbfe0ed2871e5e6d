"""NF4 in numpy to the bit, and to and from the layout on devices.

References: bitsandbytes 0.50.2 on a CPU (tests/golden, and a real weight in
../shared/golden), and the layout's own description, read number by number.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train.quant import blockwise, nf4, quantise

from .cases import matrices

pytestmark = [
  pytest.mark.compat,
  pytest.mark.filterwarnings('error::RuntimeWarning'),
]

INTEGERS = ('packed', 'absmax')
FLOATS = ('absmax2', 'offset')


@pytest.fixture(scope='module', params=['whole', 'short'])
def theirs(request, golden):
  """One matrix as bitsandbytes has it, part by part."""
  tensors = load_file(golden / 'quantised.safetensors')
  name = f'{request.param}.'
  return {
    k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)
  }


@functools.partial(jax.jit, static_argnums=1)
def whole(weight, dtype=None):
  return weight.dequantised(dtype)


def dequantised(q):
  return np.asarray(whole(nf4.from_bitsandbytes(q), jnp.float32)).T


def test_equals_bitsandbytes(theirs):
  q = quantise(theirs['w'])
  for part in INTEGERS:
    np.testing.assert_array_equal(getattr(q, part), theirs[part])
  for part in FLOATS:
    np.testing.assert_allclose(getattr(q, part), theirs[part], rtol=1e-6)
  single = quantise(theirs['w'], double=False)
  np.testing.assert_array_equal(single.absmax, theirs['plain_absmax'])
  assert single.absmax2 is None
  assert single.offset is None


def test_the_tables_are_bitsandbytes(theirs):
  for ours, name in [(blockwise.NF4, 'code'), (blockwise.DYNAMIC, 'code2')]:
    np.testing.assert_array_equal(
      ours.view(np.int32), theirs[name].view(np.int32)
    )


def test_the_tables_on_a_device(theirs):
  codes = np.arange(256, dtype=np.uint8)
  one, none = np.ones(1, np.float32), np.zeros((), np.float32)
  top = np.full((32, 256), 0xFF, np.uint8)
  weight = nf4.Nf4Weight(top, codes[None], one, none, np.dtype('float32'))
  np.testing.assert_allclose(
    whole(weight), np.tile(theirs['code2'], (64, 1)), rtol=2e-7
  )
  packed = np.tile(codes, (32, 1))
  weight = nf4.Nf4Weight(
    packed, np.ones((1, 256), np.float32), None, None, np.dtype('float32')
  )
  halves = [theirs['code'][codes >> 4], theirs['code'][codes & 15]]
  np.testing.assert_array_equal(whole(weight), np.repeat(halves, 32, 0))


def test_stands_for_the_same_numbers(theirs):
  weight = nf4.from_bitsandbytes(quantise(theirs['w']))
  assert weight.dtype == theirs['w'].dtype
  got = whole(weight)
  assert got.dtype == weight.dtype
  want = theirs['dequantised'].T.astype(np.float32)
  if got.dtype == np.float32:
    np.testing.assert_allclose(got, want, rtol=1e-6)
  else:  # a last bit of float32 turns a bfloat16 over once in thousands
    assert np.mean(np.asarray(got, np.float32) != want) < 1e-3


def test_equals_bitsandbytes_on_a_real_weight(shared):
  theirs = load_file(shared / 'golden' / 'nf4-gate_proj.safetensors')
  q = quantise(theirs['w'])
  for part in INTEGERS:
    want = theirs[f'double_{part}'].reshape(-1)
    np.testing.assert_array_equal(getattr(q, part), want)
  for part in FLOATS:
    want = theirs[f'double_{part}'].reshape(np.shape(getattr(q, part)))
    np.testing.assert_allclose(getattr(q, part), want, rtol=1e-6)
  np.testing.assert_allclose(
    dequantised(q), theirs['double_dequantised'], rtol=0, atol=1e-6
  )
  single = quantise(theirs['w'], double=False)
  np.testing.assert_array_equal(single.absmax, theirs['plain_absmax'])
  np.testing.assert_allclose(
    dequantised(single), theirs['plain_dequantised'], rtol=0, atol=1e-6
  )


# (out, in): blocks along `in`, more of them than the second level's, one; no
# whole block, an odd count, a last byte that is half empty.
SHAPES = [(6, 192), (160, 128), (1, 64), (5, 36), (172, 40), (3, 5), (1, 1)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('double', [True, False])
def test_both_layouts_hold_the_same(shape, double):
  q = quantise(matrices(shape), double)
  weight = nf4.from_bitsandbytes(q)
  assert weight.shape == shape[::-1]
  assert (weight.flat is None) == (shape[1] % 64 == 0)
  back = nf4.to_bitsandbytes(weight)
  assert (back.shape, back.dtype) == (q.shape, q.dtype)
  for part in (*INTEGERS, *FLOATS):
    got, want = getattr(back, part), getattr(q, part)
    assert (got is None) == (want is None) == (not double and part in FLOATS)
    if want is not None:
      np.testing.assert_array_equal(got, want)
  expected = nf4.abstract(shape[::-1], np.float32, double)
  assert jax.tree.structure(expected) == jax.tree.structure(weight)
  for a, b in zip(*map(jax.tree.leaves, (expected, weight)), strict=True):
    assert (a.shape, a.dtype) == (np.shape(b), b.dtype)


def test_a_byte_holds_two_inputs_of_one_block():
  shape = (160, 128)
  q = quantise(matrices(shape))
  weight = nf4.from_bitsandbytes(q)
  pairs = np.stack([q.packed >> 4, q.packed & 15], -1).reshape(shape)
  for o, b, k in [(0, 0, 0), (159, 1, 31), (7, 1, 5), (80, 0, 16)]:
    byte = weight.packed[32 * b + k, o]
    first, second = pairs[o, 64 * b + k], pairs[o, 64 * b + 32 + k]
    assert (byte >> 4, byte & 15) == (first, second)
    assert weight.absmax[b, o] == q.absmax[2 * o + b]


def test_stands_for_the_nearest_of_sixteen():
  w = matrices((24, 128))
  scaled = w.reshape(-1, 64)
  absmax = np.abs(scaled).max(1, keepdims=True)
  nearest = np.abs(scaled[..., None] / absmax[..., None] - blockwise.NF4)
  want = blockwise.NF4[nearest.argmin(-1)] * absmax
  np.testing.assert_allclose(
    dequantised(quantise(w, double=False)), want.reshape(w.shape), rtol=1e-6
  )


def test_a_weight_takes_4_13_bits():
  shape = (4096, 14336)
  for double, bits in [(True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4.5)]:
    arrays = jax.tree.leaves(nf4.abstract(shape, jnp.bfloat16, double))
    stored = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    assert stored * 8 / math.prod(shape) == pytest.approx(bits, abs=1e-6)
  q = quantise(matrices((160, 128)))
  stored = sum(x.nbytes for x in jax.tree.leaves(nf4.from_bitsandbytes(q)))
  assert stored == 160 * 128 // 2 + 320 + 2 * 4 + 4


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('shape', [(160, 128), (5, 33)])
def test_what_is_not_finite_shows(bad, shape):
  w = matrices(shape)
  w[3, 2] = bad
  q = quantise(w)
  assert not np.isfinite(q.offset)
  assert not np.isfinite(q.absmax2).all()


def test_zeros_stay_zeros():
  w = matrices((160, 128))
  w[3] = 0
  assert not dequantised(quantise(w, double=False))[3].any()
  assert not dequantised(quantise(np.zeros((3, 33), np.float32))).any()
