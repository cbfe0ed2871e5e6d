"""NF4, int8 and LoftQ against bitsandbytes, live on a CPU.

Reference: bitsandbytes 0.50.2 on torch, and LoftQ's algorithm (Li et al. 2023,
algorithm 1) written down with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train.lora import starts
from lorax_train.quant import blockwise, int8, nf4, quantise

torch = pytest.importorskip('torch')
functional = pytest.importorskip('bitsandbytes.functional')

OPTIONS = {'blocksize': 64, 'quant_type': 'nf4'}
# (out, in): one block, none, a short last one, an odd count, one second-level
# block, several, and a short last one of these.
SHAPES = [
  *((1, 64), (3, 5), (5, 33), (64, 172), (172, 64), (7, 576)),
  *((256, 64), (300, 640), (1000, 1000), (2048, 576)),
]
DTYPES = {
  'float32': torch.float32,
  'bfloat16': torch.bfloat16,
  'float16': torch.float16,
}


def ours(w):
  """A torch tensor as numpy has it."""
  if w.dtype == torch.bfloat16:
    return w.view(torch.int16).numpy().view(jnp.bfloat16)
  return w.numpy()


def normal(shape):
  return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def extreme(shape):
  """Rows that differ by powers of ten, subnormal ones and zeros among them."""
  powers = torch.linspace(-40, 30, shape[0])[:, None].clamp(max=4)
  w = normal(shape) * 10.0**powers
  w[shape[0] // 2] = 0
  return w


def midpoints(shape):
  """Numbers exactly between two codes, and their neighbours."""
  middles = (blockwise.NF4[:-1] + blockwise.NF4[1:]) / np.float32(2)
  near = [np.nextafter(middles, np.float32(to)) for to in (-2, 2)]
  numbers = np.concatenate([[1.0], middles, *near, [-1.0]]).astype(np.float32)
  return torch.tensor(np.resize(numbers, shape))


MAKERS = {'normal': normal, 'extreme': extreme, 'midpoints': midpoints}


def theirs(w):
  """(packed, state with a float32 absmax, state with a quantised one)."""
  packed, single = functional.quantize_4bit(w, **OPTIONS)
  _, double = functional.quantize_4bit(w, compress_statistics=True, **OPTIONS)
  return packed.numpy().reshape(-1), single, double


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('shape', SHAPES)
def test_nf4_to_the_bit(shape, make, dtype):
  w = MAKERS[make](shape).to(DTYPES[dtype])
  packed, single, double = theirs(w)
  q = quantise(ours(w), double=False)
  np.testing.assert_array_equal(q.packed, packed)
  np.testing.assert_array_equal(q.absmax, single.absmax.numpy())
  # They sum the mean in float32, in an order of the machine's own: from the
  # same mean on, every bit is the same.
  given = blockwise.doubly(q, double.offset.numpy())
  np.testing.assert_array_equal(given.absmax, double.absmax.numpy())
  np.testing.assert_array_equal(given.absmax2, double.state2.absmax.numpy())
  own = blockwise.doubly(q)
  np.testing.assert_allclose(own.offset, double.offset.numpy(), rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', SHAPES)
def test_nf4_stands_for_the_same_numbers(shape, dtype):
  w = normal(shape).to(DTYPES[dtype])
  packed, _, double = theirs(w)
  # As one row: what it stands for does not depend on the shape.
  absmax = functional.dequantize_blockwise(double.absmax, double.state2)
  absmax = absmax + double.offset
  want = torch.ops.bitsandbytes.dequantize_4bit.default(
    torch.tensor(packed)[:, None], absmax, 64, 'nf4', (1, w.numel()),
    torch.float32,
  )  # fmt: skip
  q = blockwise.doubly(quantise(ours(w), False), double.offset.numpy())
  weight = jax.tree.map(jnp.asarray, nf4.from_bitsandbytes(q))
  assert weight.dtype == dtype
  got = np.asarray(weight.dequantised(jnp.float32)).T
  np.testing.assert_allclose(
    got, want.numpy().reshape(shape), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize('shape', [(1, 7), (5, 33), (300, 640)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_int8_to_the_bit(shape, dtype):
  w = normal(shape).to(DTYPES[dtype])
  q, scale, _ = functional.int8_vectorwise_quant(w.clone())
  got = int8.quantise(ours(w))
  np.testing.assert_array_equal(got.scale, scale.numpy())
  np.testing.assert_array_equal(got.q.T, q.numpy())
  got = jax.tree.map(jnp.asarray, got)
  np.testing.assert_allclose(
    got.dequantised(jnp.float32).T,
    functional.int8_vectorwise_dequant(q, scale),
    rtol=1e-6,
  )


def their_loftq(w, rank, iterations):
  """(Q, A B) of W [out, in] in float32."""
  update = torch.zeros_like(w)
  for _ in range(iterations):
    packed, state = functional.quantize_4bit(w - update, **OPTIONS)
    q = functional.dequantize_4bit(packed, state)
    u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
    update = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
  return q, update


@pytest.mark.parametrize('iterations', [1, 3])
def test_loftq(iterations):
  w = normal((96, 128)) * 0.05
  rank, scale = 8, 2.0

  def in_nf4(w):
    q = nf4.from_bitsandbytes(quantise(np.asarray(w).T, double=False))
    return jax.tree.map(jnp.asarray, q)

  q, a, b = starts.loftq(
    jnp.asarray(w.numpy().T), in_nf4, rank, scale, iterations
  )
  want_q, want_update = their_loftq(w, rank, iterations)
  got = np.asarray(q.dequantised(jnp.float32)).T
  # After the first turn both quantise a W - A B of their own rounding.
  differs = np.abs(got - want_q.numpy()) > 1e-6
  assert differs.mean() <= (0 if iterations == 1 else 1e-3)
  update = scale * np.asarray(a.T @ b).T
  if iterations == 1:
    np.testing.assert_allclose(update, want_update.numpy(), atol=1e-5)
  left = np.linalg.norm(w.numpy() - got - update)
  want_left = torch.linalg.norm(w - want_q - want_update)
  np.testing.assert_allclose(left, want_left, rtol=1e-4)
  assert left < np.linalg.norm(w.numpy() - got)
