"""Each kernel of attention against the plain formula.

Reference: jax.nn.dot_product_attention under a T x T mask, which is written
here in numpy from what "causal, in a window, in a segment" means.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import parallel
from lorax_train.models import attention as attention_lib
from lorax_train.models import attention_kernels
from lorax_train.models.attention import (
  KERNELS,
  NAME,
  Packed,
  attention,
  choose,
  first_seen,
)
from lorax_train.models.attention_xla import TILE, blocked_attention

pytestmark = pytest.mark.usefixtures('strict')

PACK = [*(3 * [4]), *(9 * [1]), *(1 * [2]), *(20 * [3]), *(4 * [0])]


def operands(b, t, n, k, h, dtype=jnp.float32):
  """q, k, v and a gradient of the output."""
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.standard_normal((b, t, heads, h)), dtype)  # noqa: E731
  return draw(n), draw(k), draw(k), draw(n)


def packs(b, t):
  """Segments of other lengths in each row."""
  tiled = np.concatenate([np.asarray(PACK) + 9 * i for i in range(t)])
  return np.stack([tiled[2 * i : 2 * i + t] for i in range(b)]).astype(np.int32)


def seen(t, window, segments):
  """[B, T, S] by the words: causal, in the window, of the same segment."""
  behind = np.arange(t)[:, None] - np.arange(t)[None]
  mask = (behind >= 0) & (behind < (window or t))
  if segments is None:
    return mask[None]
  return mask[None] & (segments[:, :, None] == segments[:, None])


def plain(q, k, v, window, segments):
  mask = jnp.asarray(seen(q.shape[1], window, segments))[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask)


def out_and_grads(attend, q, k, v, grad):
  out, pullback = jax.vjp(attend, q, k, v)
  return out, *pullback(grad)


def computed(attend, arrays):
  """Output and gradients, compiled."""
  return jax.jit(functools.partial(out_and_grads, attend))(*arrays)


def wanted(arrays, window, segments):
  """The same by the plain formula."""
  with jax.numpy_dtype_promotion('standard'):  # jax's own code wants it
    return computed(lambda q, k, v: plain(q, k, v, window, segments), arrays)


def assert_near(got, want, rtol):
  """Within `rtol` of the largest number there is: a gradient may be all 0."""
  assert [g.dtype for g in got] == [w.dtype for w in want]
  got, want = ([np.asarray(x, np.float32) for x in xs] for xs in (got, want))
  atol = rtol * max(np.abs(w).max() for w in want)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=atol)


# B, T, N, K, H, window, packed, tile of queries and keys
CASES = {
  'one tile': (2, 16, 4, 2, 8, None, False, (16, 16)),
  'one token': (1, 1, 2, 1, 8, None, False, TILE),
  'shorter than a tile': (1, 5, 2, 2, 8, None, False, (8, 16)),
  'no multiple of a tile': (2, 37, 4, 2, 8, None, False, (8, 16)),
  'keys in smaller tiles': (1, 33, 2, 2, 8, None, False, (16, 4)),
  'one key head': (1, 24, 3, 1, 8, None, False, (8, 8)),
  'a window within a tile': (1, 37, 2, 1, 8, 3, False, (8, 16)),
  'a window over tiles': (2, 37, 4, 2, 8, 17, False, (8, 8)),
  'a window of one': (1, 20, 2, 2, 8, 1, False, (8, 8)),
  'packs': (3, 70, 4, 2, 8, None, True, (8, 16)),
  'packs and a window': (2, 70, 4, 2, 8, 6, True, (8, 8)),
  'of its own tile': (1, 150, 4, 2, 16, 40, True, TILE),
}


@pytest.mark.compat
@pytest.mark.parametrize('case', CASES)
def test_blocks_give_what_the_plain_formula_gives(case):
  b, t, n, k, h, window, packed, tile = CASES[case]
  segments = packs(b, t) if packed else None

  def attend(q, k, v):
    first = first_seen(window, segments, (b, t))
    return blocked_attention(q, k, v, first, tile)

  arrays = operands(b, t, n, k, h)
  want = wanted(arrays, window, segments)
  assert_near(computed(attend, arrays), want, 1e-5)


def test_blocks_in_bfloat16_are_as_near_to_float32_as_the_plain_formula():
  full = operands(2, 70, 4, 2, 16)
  half = tuple(x.astype(jnp.bfloat16) for x in full)
  segments = jnp.asarray(packs(2, 70))
  attend = lambda q, k, v: attention(q, k, v, 20, Packed(segments))  # noqa: E731
  got = computed(attend, half)
  want = wanted(half, 20, np.asarray(segments))
  exact = tuple(x.astype(jnp.float32) for x in half)
  exact = wanted(exact, 20, np.asarray(segments))
  for g, w, e in zip(got, want, exact, strict=True):
    assert g.dtype == jnp.bfloat16
    off, off_plain = (
      np.abs(np.asarray(x, np.float32) - e).max() for x in (g, w)
    )
    # bfloat16 rounds by 2^-9 at most; the formulas round in other places.
    assert off < 2 * off_plain
    assert off < 2**-7 * np.abs(e).max()


def test_large_scores_do_not_overflow():
  q, k, v, grad = operands(1, 40, 2, 1, 8)
  attend = lambda q, k, v: blocked_attention(  # noqa: E731
    q, k, v, first_seen(None, None, (1, 40)), (8, 8)
  )
  arrays = 300 * q, 300 * k, v, grad
  got = attend(*arrays[:3])
  assert np.isfinite(np.asarray(got)).all()
  assert_near([got], wanted(arrays, None, None)[:1], 1e-5)


# B, T, N, K, H, window, packed
SPLASH = {
  'grouped heads': (2, 128, 4, 2, 16, None, False),
  'a window, no multiple of a block': (1, 150, 2, 1, 16, 40, False),
  'packs and a window': (2, 140, 2, 1, 16, 6, True),
}


@pytest.mark.compat
@pytest.mark.parametrize('case', SPLASH)
def test_splash_gives_what_the_plain_formula_gives(case):
  b, t, n, k, h, window, packed = SPLASH[case]
  segments = packs(b, t) if packed else None
  attend = functools.partial(
    attention_kernels.splash_attention,
    segments_BT=segments,
    window=window,
    interpret=True,
  )
  arrays = operands(b, t, n, k, h)
  want = wanted(arrays, window, segments)
  assert_near(computed(attend, arrays), want, 1e-5)


@pytest.fixture
def by_xla(monkeypatch):
  """What cuDNN is asked for, done by XLA: there is no GPU here."""
  original = jax.nn.dot_product_attention

  def dot_product_attention(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    with jax.numpy_dtype_promotion('standard'):
      return original(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', dot_product_attention)
  yield
  monkeypatch.undo()


@pytest.fixture
def interpreted(monkeypatch):
  """Splash without a TPU."""
  splash = functools.partial(attention_kernels.splash_attention, interpret=True)
  monkeypatch.setitem(attention_lib._KERNELS, 'splash', splash)


# T, window, packed
CUDNN = [(20, None, False), (19, 5, False), (19, 5, True), (70, None, True)]


@pytest.mark.parametrize('case', CUDNN)
def test_cudnn_is_asked_for_what_the_plain_formula_gives(case, by_xla):
  t, window, packed = case
  segments = packs(2, t) if packed else None
  pack = Packed(jnp.asarray(segments)) if packed else None
  arrays = operands(2, t, 4, 2, 8)

  def attend(q, k, v):
    return attention(q, k, v, window, pack, 'cudnn')

  mask = jnp.asarray(seen(t, window, segments))
  of_formula = functools.partial(softmax_by_hand, mask=mask)
  with jax.numpy_dtype_promotion('standard'):
    got = computed(attend, arrays)
  assert_near(got, computed(of_formula, arrays), 1e-5)


def softmax_by_hand(q, k, v, mask):
  """The formula itself, one head at a time."""
  group = q.shape[2] // k.shape[2]
  heads = []
  for n in range(q.shape[2]):
    scores = q[:, :, n] @ k[:, :, n // group].swapaxes(1, 2)
    scores = jnp.where(mask, scores / np.sqrt(q.shape[-1]), -jnp.inf)
    heads.append(jax.nn.softmax(scores, axis=-1) @ v[:, :, n // group])
  return jnp.stack(heads, axis=2)


# What runs again in the backward pass, and how often it is in the program
# then; a policy that saves NAME leaves one of them out.
RUNS = {'xla': ('while', 3), 'splash': ('pallas_call', 4), 'cudnn': ('exp', 3)}


@pytest.mark.compat
@pytest.mark.parametrize('kernel', KERNELS)
def test_what_is_saved_by_name_does_not_run_again(
  kernel, interpreted, monkeypatch
):
  primitive, times = RUNS[kernel]
  monkeypatch.setattr(jax.nn, 'dot_product_attention', flash)
  q, k, v, _ = operands(1, 128, 2, 1, 8)

  def count(policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def layer(q, k, v):
      return jnp.sum(jnp.square(attention(2 * q, k, v, None, None, kernel)))

    jaxpr = jax.make_jaxpr(jax.grad(layer))(q, k, v).jaxpr
    return sum(eqn.primitive.name == primitive for eqn in equations(jaxpr))

  policies = jax.checkpoint_policies
  assert count(policies.nothing_saveable) == times
  assert count(policies.save_only_these_names(NAME)) == times - 1


def flash(q, k, v, **_):
  """Keeps for its backward pass what cuDNN does: that is all it is here for."""

  def forward(q, k, v):
    scores = jnp.einsum('btnh,bsnh->bnts', q, k.repeat(2, 2))
    lse = jax.nn.logsumexp(scores, -1)
    out = q + lse[0, 0, 0]
    return out, (q, k, v, out, lse)

  def backward(kept, grad):
    _, k, v, out, lse = kept
    return (jnp.exp(-lse[0, 0, 0]) * out * grad, k, v)

  attend = jax.custom_vjp(lambda q, k, v: forward(q, k, v)[0])
  attend.defvjp(forward, backward)
  return attend(q, k, v)


def equations(jaxpr):
  """All, with those of loops and calls; a call that gives nothing is dropped."""
  for eqn in jaxpr.eqns:
    if not eqn.outvars:
      continue
    yield eqn
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns') and eqn.primitive.name != 'pallas_call':
        yield from equations(inner)


# mesh (data, fsdp, tensor), B, N, K, whether a device has heads of its own
MESHES = {
  'all divide': ((2, 2, 2), 4, 4, 2, True),
  'fewer key heads than devices': ((1, 2, 4), 2, 8, 2, True),
  'heads that do not divide': ((2, 2, 2), 4, 3, 3, False),
  'rows that do not divide': ((2, 2, 2), 3, 4, 2, True),
}


@pytest.mark.compat
@pytest.mark.parametrize('kernel', ['xla', 'splash'])
@pytest.mark.parametrize('case', MESHES)
def test_a_mesh_changes_nothing(case, kernel, interpreted):
  sizes, b, n, k, cut = MESHES[case]
  mesh = parallel.make_mesh(*sizes)
  arrays, segments = operands(b, 40, n, k, 8), packs(b, 40)

  def attend(q, k, v):
    return attention(q, k, v, 7, Packed(jnp.asarray(segments)), kernel)

  with jax.set_mesh(mesh):
    got = computed(attend, arrays)
  assert (got[0].sharding.shard_shape(got[0].shape)[2] < n) == cut
  assert_near(got, wanted(arrays, 7, segments), 1e-5)


def test_attention_under_vmap_scan_and_remat():
  arrays, segments = operands(4, 24, 2, 1, 8), packs(4, 24)
  lanes = lambda x: x.reshape(2, 2, *x.shape[1:])  # noqa: E731

  @jax.checkpoint
  def one(q, k, v, ids):
    first = first_seen(9, ids, ids.shape)
    return blocked_attention(q, k, v, first, (8, 8))

  def mapped(q, k, v):
    q, k, v, ids = map(lanes, (q, k, v, jnp.asarray(segments)))
    return jax.vmap(one)(q, k, v, ids).reshape(4, 24, 2, 8)

  def scanned(q, k, v):
    xs = map(lanes, (q, k, v, jnp.asarray(segments)))
    _, out = jax.lax.scan(lambda c, x: (c, one(*x)), None, tuple(xs))
    return out.reshape(4, 24, 2, 8)

  want = wanted(arrays, 9, segments)
  assert_near(computed(mapped, arrays), want, 1e-5)
  assert_near(computed(scanned, arrays), want, 1e-5)


# wanted, platform, head_dim, dtype -> kernel, or what is said
CHOICES = [
  ('auto', 'cpu', 128, 'bfloat16', 'xla'),
  ('auto', 'tpu', 128, 'bfloat16', 'splash'),
  ('auto', 'tpu', 80, 'float32', 'splash'),
  ('auto', 'tpu', 10, 'bfloat16', 'xla'),
  ('auto', 'gpu', 128, 'bfloat16', 'cudnn'),
  ('auto', 'gpu', 128, 'float32', 'xla'),
  ('auto', 'gpu', 256, 'bfloat16', 'xla'),
  ('xla', 'tpu', 128, 'bfloat16', 'xla'),
  ('xla', 'gpu', 128, 'bfloat16', 'xla'),
  ('splash', 'tpu', 64, 'bfloat16', 'splash'),
  ('cudnn', 'gpu', 64, 'bfloat16', 'cudnn'),
]
REFUSED = [
  ('splash', 'gpu', 128, 'bfloat16', 'for TPUs, and the devices are of gpu'),
  ('splash', 'tpu', 10, 'bfloat16', 'multiple of 8, not 10; give auto or xla'),
  ('cudnn', 'cpu', 128, 'bfloat16', 'for NVIDIA GPUs, and the devices are of'),
  ('cudnn', 'gpu', 128, 'float32', 'wants bfloat16, not float32'),
  ('cudnn', 'gpu', 256, 'bfloat16', 'not 256'),
]


@pytest.mark.parametrize('case', CHOICES)
def test_which_kernel_is_chosen(case):
  *asked, kernel = case
  assert choose(*asked) == kernel


@pytest.mark.parametrize('case', REFUSED)
def test_a_kernel_that_cannot_run_there_is_refused(case):
  *asked, said = case
  with pytest.raises(ValueError, match=said):
    choose(*asked)
