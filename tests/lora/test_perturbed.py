"""Weights moved along directions that nobody keeps.

References: the sum W + eps z in numpy, where z is what a step of length 1 from
nothing leaves; the normal distribution; one device for meshes of eight.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train import lora, parallel
from lorax_train.lora import LoraSpec, perturbed
from lorax_train.quant import nf4
from lorax_train.quant.blockwise import quantise

pytestmark = pytest.mark.usefixtures('strict')

LAYOUT = {'table': 'vo', 'norm': '.', 'layers/norm': 's.', 'layers/q': 'sio'}


def weights(dtype=jnp.float32):
  """A table, norms, and a stack of three matrices."""
  normal = np.random.default_rng(0).standard_normal
  shapes = {'table': (24, 6), 'norm': (6,)}
  tree = {name: normal(shape) for name, shape in shapes.items()}
  tree['layers'] = {'norm': normal((3, 6)), 'q': normal((3, 6, 10))}
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


# As in a run; and op by op each would be compiled by itself.
STEP = jax.jit(perturbed.stepped)


def keys_of(n):
  return jax.random.split(jax.random.key(7), n)


def directions(frozen, trainable, keys):
  """z of each key, as numpy: where a step of length 1 leads from nothing."""
  zero = jax.tree.map(jnp.zeros_like, trainable)
  one = jnp.ones(1, jnp.float32)
  return [
    jax.tree.map(np.asarray, STEP(frozen, zero, key[None], one)) for key in keys
  ]


@pytest.fixture
def small_chunks(monkeypatch):
  """Arrays of these tests are drawn by parts, as large ones are."""
  monkeypatch.setattr(perturbed, 'AT_ONCE', 30)


@pytest.mark.usefixtures('small_chunks')
def test_a_step_is_the_sum_over_its_directions():
  frozen, trainable = lora.all_whole(weights(), LAYOUT)
  keys, scales = keys_of(3), np.float32([0.3, -2.0, 0.01])
  got = STEP(frozen, trainable, keys, jnp.asarray(scales))
  zs = directions(frozen, trainable, keys)
  want = jax.tree.map(
    lambda w, *z: w + sum(s * x for s, x in zip(scales, z, strict=True)),
    trainable,
    *zs,
  )
  chex.assert_trees_all_close(got, want, atol=1e-6)


@pytest.mark.usefixtures('small_chunks')
def test_the_loss_is_looked_at_along_the_direction_of_the_step():
  frozen, trainable = lora.all_whole(weights(), LAYOUT)
  (key,), eps = keys_of(1), jnp.float32(-0.2)
  moved = jax.jit(perturbed.perturb)(frozen, trainable, key, eps)
  near = lora.bind(frozen, moved)
  (z,) = directions(frozen, trainable, [key])
  want = jax.tree.map(lambda w, z: np.asarray(w) - 0.2 * z, trainable, z)
  for name in ('table', 'norm'):
    np.testing.assert_allclose(near[name], want[name], atol=1e-6)
  stack = near['layers']['q']
  assert isinstance(stack, perturbed.Perturbed)
  x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
  # One layer at a time, as the model's scan has it.
  _, got = lax.scan(lambda _, w: (None, x @ w), None, stack)
  np.testing.assert_allclose(got, x @ want['layers']['q'], atol=1e-5)
  _, got = lax.scan(
    lambda _, w: (None, w.apply_to(x.astype(jnp.bfloat16), jnp.float32)),
    None,
    stack,
  )
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, x @ want['layers']['q'], atol=0.2)
  with pytest.raises(ValueError, match='scan the stack'):
    x @ stack


def test_directions_are_normal_and_of_their_own_everywhere(monkeypatch):
  monkeypatch.setattr(perturbed, 'AT_ONCE', 2**12)
  w = {'a': jnp.zeros((512, 32)), 'b': jnp.zeros((2, 128, 64))}
  frozen, trainable = lora.all_whole(w, {'a': 'io', 'b': 'sio'})
  zs = directions(frozen, trainable, keys_of(2))
  rows = np.concatenate(
    [x.reshape(-1, 4096) for z in zs for x in jax.tree.leaves(z)]
  )
  n = rows.size
  assert abs(rows.mean()) < 4 / np.sqrt(n)
  assert abs(rows.var() - 1) < 4 * np.sqrt(2 / n)
  assert abs((rows**4).mean() - 3) < 4 * np.sqrt(96 / n)
  # Chunks, layers, leaves and directions have nothing to do with each other.
  alike = np.abs(np.corrcoef(rows) - np.eye(len(rows)))
  assert alike.max() < 5 / np.sqrt(4096)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rows_that_nothing_divides_are_drawn_in_as_few_parts(
  dtype, monkeypatch
):
  monkeypatch.setattr(perturbed, 'AT_ONCE', 2**9)
  assert perturbed.chunks_of(1009, 16) == 32  # 1,009 is a prime
  w = jnp.zeros((1009, 16), dtype)
  halves = lora.all_whole({'a': w}, {'a': 'io'})
  (key,) = keys_of(1)
  z = jax.tree.leaves(directions(*lora.all_whole({'a': w.astype(jnp.float32)}, {'a': 'io'}), [key])[0])[0]  # fmt: skip
  assert abs(z.mean()) < 4 / np.sqrt(z.size)
  assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)
  assert len(np.unique(z[:, 0])) == 1009  # no row twice
  near = jax.jit(perturbed.perturb)(*halves, key, jnp.float32(0.5))['a']
  np.testing.assert_allclose(near, (0.5 * z).astype(dtype), atol=1e-6)
  moved = STEP(*halves, key[None], jnp.float32([0.5]))['a']
  np.testing.assert_allclose(moved, 0.5 * z, atol=1e-6 if dtype == jnp.float32 else 0.02)  # fmt: skip


def test_what_pads_an_adapter_stays_and_all_else_moves():
  names = {'q': ('m.0.q', 'm.1.q', 'm.2.q')}
  spec = LoraSpec(r'm\.[02]\.q', rank=4, rank_pattern={'m.2.q': 2})
  for variant in ('lora', 'dora', 'lora_fa'):
    own = LoraSpec(
      spec.targets, rank=4, rank_pattern=spec.rank_pattern, variant=variant
    )
    params = {'q': weights()['layers']['q']}
    frozen, trainable = lora.split(jax.random.key(0), params, own, names)
    (z,) = directions(frozen, trainable, keys_of(1))
    moved = {
      name: np.asarray(getattr(z['q'], name) != 0)
      for name in ('a', 'b', 'm')
      if getattr(trainable['q'], name) is not None
    }
    assert ('a' in moved, 'm' in moved) == (
      variant != 'lora_fa', variant == 'dora'
    )  # fmt: skip
    for name, where in moved.items():
      ranks = [1, 0, 1] if name == 'm' else [4, 0, 2]
      for layer, rank in enumerate(ranks):
        rows = where[layer][None] if name == 'm' else where[layer]
        assert rows[:rank].all()
        assert not rows[rank:].any()


def test_bfloat16_moves_right_in_the_mean_by_steps_too_small_for_it():
  w = jnp.full((64, 256), 1.0, jnp.bfloat16)
  step = jnp.full(1, 2.0**-13)  # a thirty-second of what separates two numbers
  keys, far = keys_of(40), w
  walk = jax.jit(lambda w, k: perturbed.moved(w, k[None], step))
  for key in keys:
    far = walk(far, key)
  want = perturbed.moved(w.astype(jnp.float32), keys, jnp.repeat(step, 40))
  assert far.dtype == jnp.bfloat16
  # Each step errs by sqrt(p (1 - p)) of 2^-7, p about 0.02: but not one way.
  error = np.asarray(far, np.float32) - np.asarray(want)
  assert abs(error.mean()) < 4 * 2**-7 * 0.15 * np.sqrt(40 / w.size)
  moved = np.asarray(want - 1).ravel()
  slope = np.dot(moved, np.asarray(far, np.float32).ravel() - 1)
  assert slope / np.dot(moved, moved) == pytest.approx(1.0, abs=0.15)
  nearest = (1 + float(step[0]) * 3) * jnp.ones((), jnp.float32)
  assert nearest.astype(jnp.bfloat16) == 1.0  # what would have become of it
  with pytest.raises(ValueError, match='float16'):
    perturbed.rounded(jnp.ones(2), keys[0], jnp.float16)


@pytest.mark.usefixtures('small_chunks')
def test_a_step_is_the_same_to_the_bit_on_any_mesh():
  frozen, trainable = lora.all_whole(weights(jnp.bfloat16), LAYOUT)
  mesh = parallel.make_mesh(1, 2, 2, devices=jax.devices()[:4])
  specs = {
    'table': P('tensor', 'fsdp'),
    'norm': P(),
    'layers': {'norm': P(), 'q': P(None, 'fsdp', 'tensor')},
  }
  cut = jax.tree.map(
    lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)),
    trainable,
    specs,
  )
  scales = jnp.float32([0.1, -0.3])
  want = STEP(frozen, trainable, keys_of(2), scales)
  with jax.set_mesh(mesh):
    got = STEP(frozen, cut, keys_of(2), scales)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_quantised_base_is_left_alone():
  w = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
  base = jax.tree.map(jnp.asarray, nf4.from_bitsandbytes(quantise(w)))
  halves = lora.split(
    jax.random.key(0), {'q': base, 'k': base}, LoraSpec('q', rank=2)
  )
  near = perturbed.perturb(*halves, jax.random.key(1), jnp.float32(0.1))
  assert near['k'] is None
  assert not np.allclose(near['q'].b, halves[1]['q'].b)
  bound = lora.bind(halves[0], near)
  x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
  a, b, scale = near['q'].a, near['q'].b, halves[0]['q'].scale
  want = x @ base.dequantised() + scale * (x @ a.T) @ b
  np.testing.assert_allclose(x @ bound['q'], want, rtol=1e-4, atol=1e-4)
