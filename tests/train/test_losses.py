"""The loss without all its logits, against the loss of all of them.

Reference: the plain formula on whole logits, differentiated by jax, with heads
of every kind merged into plain arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train import lora, parallel
from lorax_train.plan import flops as flops_lib
from lorax_train.train import losses

pytestmark = pytest.mark.usefixtures('strict')

B, T, D, V = 4, 13, 24, 64
NAMES = {'table': ('table',)}


def heads():
  """{kind: (spec, what of the parameter is the head)}."""
  head = {'table': lambda w: w, 'tied': lambda w: w.T}
  return {
    'frozen': (None, head['table']),
    'frozen, tied': (None, head['tied']),
    'adapter': (lora.LoraSpec('table', rank=3), head['table']),
    'adapter, tied': (lora.LoraSpec('table', rank=3), head['tied']),
    'dora': (lora.LoraSpec('table', rank=3, variant='dora'), head['table']),
    'dropout': (lora.LoraSpec('table', rank=3, dropout=0.5), head['table']),
    'whole': ({'table': lora.Whole()}, head['table']),
    'rows, tied': ({'table': lora.Whole((3, 7, 60))}, head['tied']),
  }


def case(kind, dtype=jnp.float32):
  """(x, frozen, trainable, head of a parameter, labels)."""
  spec, head = heads()[kind]
  keys = jax.random.split(jax.random.key(5), 6)
  shape = (V, D) if 'tied' in kind else (D, V)
  w = (jax.random.normal(keys[0], shape) / 3).astype(dtype)
  frozen, trainable = {'table': w}, {'table': None}
  if spec is not None:
    layout = {'table': 'vo' if 'tied' in kind else 'io'}
    frozen, trainable = lora.split(
      keys[1], {'table': w}, spec, NAMES, layout=layout
    )
    trainable = jax.tree.map(
      lambda t: t + 0.1 * jax.random.normal(keys[2], t.shape, t.dtype),
      trainable,
    )
  x = jax.random.normal(keys[3], (B, T, D)).astype(dtype)
  labels = jax.random.randint(keys[4], (B, T), 0, V)
  labels = jnp.where(jax.random.uniform(keys[5], (B, T)) < 0.4, -100, labels)
  return x, frozen, trainable, head, labels.at[1].set(-100)


def by_chunks(x, trainable, frozen, head, labels, key, chunk):
  w = lora.bind(frozen, trainable, key)['table']
  return losses.next_token_loss_of_states(x, head(w), labels, chunk)


def at_once(x, trainable, frozen, head, labels, key):
  w = head(lora.bind(frozen, trainable, key)['table'])
  return losses.next_token_loss(x @ w, labels)


@pytest.mark.compat
@pytest.mark.parametrize('kind', [k for k in heads() if k != 'dropout'])
@pytest.mark.parametrize('chunk', [4, 20, 0])
def test_value_and_gradients_are_those_of_all_logits(kind, chunk):
  x, frozen, trainable, head, labels = case(kind)
  run = functools.partial(
    by_chunks, frozen=frozen, head=head, labels=labels, key=None, chunk=chunk
  )
  full = functools.partial(
    at_once, frozen=frozen, head=head, labels=labels, key=None
  )
  both = (0, 1)
  got, grads = jax.jit(jax.value_and_grad(run, both, has_aux=True))(
    x, trainable
  )
  want, grads_want = jax.value_and_grad(full, both, has_aux=True)(x, trainable)
  assert int(got[1]) == int(want[1]) == int(jnp.sum(labels[:, 1:] != -100))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(run(x, trainable)[0], want[0], rtol=1e-5)
  jax.tree.map(
    lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5),
    grads,
    grads_want,
  )


def test_gradients_see_the_dropout_that_the_value_sees():
  """By the value's own differences: no formula knows the mask of a chunk."""
  x, frozen, trainable, head, labels = case('dropout')
  run = functools.partial(
    by_chunks,
    frozen=frozen,
    head=head,
    labels=labels,
    key=jax.random.key(3),
    chunk=20,
  )
  value = lambda x, t: run(x, t)[0]  # noqa: E731
  direction = jax.random.normal(jax.random.key(6), x.shape)
  grad = jnp.sum(jax.grad(value)(x, trainable) * direction)
  step = 1e-2
  ahead, behind = (value(x + s * direction, trainable) for s in (step, -step))
  np.testing.assert_allclose((ahead - behind) / (2 * step), grad, rtol=1e-3)


@pytest.mark.compat
@pytest.mark.parametrize('kind', ['frozen', 'adapter', 'rows, tied', 'whole'])
@pytest.mark.parametrize('sizes', [(2, 1, 4), (1, 2, 2), (2, 2, 2)])
def test_a_mesh_changes_nothing_and_gathers_no_logits(kind, sizes):
  x, frozen, trainable, head, labels = case(kind)
  n = int(np.prod(sizes))
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[:n])
  run = lambda x, t, f, labels: by_chunks(x, t, f, head, labels, None, 6)  # noqa: E731
  step = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
  want, grads_want = step(x, trainable, frozen, labels)
  axes = P('tensor', 'fsdp') if 'tied' in kind else P('fsdp', 'tensor')
  whole = NamedSharding(mesh, P())

  def lie(leaf):
    own = leaf.ndim == 2 and {V, D} == set(leaf.shape)
    return jax.device_put(leaf, NamedSharding(mesh, axes) if own else whole)

  with jax.set_mesh(mesh):
    x, labels = jax.device_put(
      (x, labels), NamedSharding(mesh, P(('data', 'fsdp')))
    )
    frozen, trainable = jax.tree.map(lie, (frozen, trainable))
    compiled = step.lower(x, trainable, frozen, labels).compile()
    got, grads = compiled(x, trainable, frozen, labels)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  jax.tree.map(
    lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5),
    grads,
    grads_want,
  )
  text = compiled.as_text()
  rows = B // (sizes[0] * sizes[1])
  # The logits of a chunk, where the vocabulary would be whole.
  assert f'f32[{rows},{6 // rows},{V}]' not in text
  # The head is gathered before the loop over chunks, in the entry alone.
  loops, _, entry = text.partition('\nENTRY ')
  assert ' all-gather(' not in loops
  assert (' all-gather(' in entry) == (sizes[1] > 1)


@pytest.mark.parametrize('kind', ['frozen', 'adapter', 'rows, tied'])
def test_no_gradient_of_a_frozen_head_and_no_logits_kept(kind):
  x, frozen, trainable, head, labels = case(kind)
  run = functools.partial(
    by_chunks, frozen=frozen, head=head, labels=labels, key=None, chunk=8
  )
  grad = jax.grad(lambda x, t: run(x, t)[0], (0, 1))
  shapes = [s for _, s in flops_lib.dots(grad, x, trainable)]
  assert not {(D, V), (V, D)} & set(shapes)
  # A chunk is two columns of 4 rows; no array has more of the vocabulary.
  made = flops_lib.result_shapes(grad, x, trainable)
  assert (B, 2, V) in made
  large = [s for s in made if V in s and np.prod(s) > max(B * 2 * V, D * V)]
  assert not large
  if kind == 'frozen':
    assert flops_lib.flops(grad, x, trainable) <= 4 * B * 14 * D * V


def test_bfloat16_multiplies_no_float32():
  """Gradients of logits are rounded: else the head would be widened."""
  x, frozen, trainable, head, labels = case('adapter', jnp.bfloat16)
  run = lambda x, t: by_chunks(x, t, frozen, head, labels, None, 8)[0]  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.value_and_grad(run, (0, 1)))(x, trainable)
  dots = [
    [v.aval.dtype for v in eqn.invars]
    for eqn, _ in flops_lib.walk(jaxpr.jaxpr)
    if eqn.primitive.name == 'dot_general'
  ]
  assert len(dots) >= 8
  assert all(dtype == jnp.bfloat16 for pair in dots for dtype in pair)
  got, (dx, _) = jax.value_and_grad(run, (0, 1))(x, trainable)
  wide = [jax.tree.map(lambda v: v.astype(jnp.float32), v) for v in (x, frozen)]
  full = lambda x: at_once(x, trainable, wide[1], head, labels, None)[0]  # noqa: E731
  want, dx_want = jax.value_and_grad(full)(wide[0])
  np.testing.assert_allclose(got, want, rtol=2e-3)
  np.testing.assert_allclose(
    dx.astype(jnp.float32), dx_want, atol=0.02 * float(jnp.abs(dx_want).max())
  )


def test_what_no_row_learns_is_not_multiplied():
  """A head of NaN marks what it touches, even through gradients of zero."""
  x, frozen, trainable, head, labels = case('frozen')
  last_BT = jnp.cumsum(labels[:, ::-1] != -100, axis=1)[:, ::-1]
  few = jnp.where(last_BT > 3, -100, labels)
  scored = jnp.pad(few[:, 1:] != -100, ((0, 0), (0, 1)))
  nan = {'table': jnp.full_like(frozen['table'], jnp.nan)}
  run = functools.partial(
    by_chunks, frozen=nan, head=head, labels=few, key=None, chunk=B
  )
  grad = jax.grad(lambda x: run(x, trainable)[0])(x)
  touched = jnp.isnan(grad).any(-1)
  assert int(scored.sum(1).max()) == 3
  assert int(touched.sum()) == 3 * B  # three columns of thirteen
  assert bool(jnp.all(touched >= scored))
  few = jnp.full_like(labels, -100)
  got, grad = jax.value_and_grad(
    lambda x: by_chunks(x, trainable, nan, head, few, None, B)[0]
  )(x)
  assert float(got) == 0.0
  np.testing.assert_array_equal(grad, jnp.zeros_like(x))


def test_the_rule_for_a_chunk():
  for vocab, want in ((260, 129055), (32000, 1048), (131072, 512)):
    assert losses.chunk_of(vocab) == want
