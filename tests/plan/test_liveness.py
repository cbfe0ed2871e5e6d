"""Bytes alive at once: of small functions by hand, of steps by XLA's account."""

import jax
import jax.numpy as jnp
import pytest

from lorax_train.plan import liveness

N = 64
SQUARE = N * N * 4  # bytes


def elementwise(x, w):
  """Fused from end to end: one sum leaves, which is written over nothing."""
  return jnp.sum(jnp.sin(x) * jnp.cos(w) + x)


def chain(x, w):
  """Two products alive at a time: what is read and what is made."""
  return jnp.sum(((x @ w) @ w) @ w)


def through_fused(x, w):
  """The elementwise work between two products has a buffer where it is read."""
  return jnp.sum(jnp.sin(x @ w) @ w)


def added(x, w):
  """x W + x A B is summed in place: its buffer, and x A until it is read."""
  return jnp.sum((x @ w + (x @ w[:, :4]) @ w[:4]) @ w)


def stacked(x, w):
  """Eight results of a loop, and the one that is being made."""
  ys = jax.lax.scan(lambda c, _: (c, c @ w), x, length=8)[1]
  return jnp.sum(ys @ w[:, :1])


def carried(x, w):
  """What a loop carries, and what a run makes of it."""
  return jnp.sum(jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=8)[0])  # fmt: skip


def once(x, w):
  """A loop of one run is none."""
  return jnp.sum(jax.lax.scan(lambda c, _: (c @ w, None), x, length=1)[0])


SCALAR = 4
NARROW = N * 4 * 4
CASES = [
  (elementwise, SCALAR),
  (chain, 2 * SQUARE),
  (through_fused, 2 * SQUARE),
  (added, 2 * SQUARE),
  (stacked, 8 * SQUARE + SQUARE),
  (carried, SQUARE + SQUARE),
  (once, SQUARE + SCALAR),
]


@pytest.mark.parametrize(('function', 'expected'), CASES)
def test_bytes_alive_at_once(function, expected):
  x = jax.ShapeDtypeStruct((N, N), jnp.float32)
  found = liveness.peak(jax.make_jaxpr(function)(x, x))
  assert found == pytest.approx(expected, abs=NARROW)


def test_a_loop_is_written_over_what_is_given_up():
  def rewritten(x, w):
    put = lambda i, x: x.at[i].set(jnp.sin(w[i]))  # noqa: E731
    rows = jax.lax.fori_loop(0, N // 4, put, x.reshape(N // 4, 4 * N))
    return rows.reshape(N, N), jnp.sum(rows @ rows.T)

  x = jax.ShapeDtypeStruct((N, N), jnp.float32)
  w = jax.ShapeDtypeStruct((N // 4, 4 * N), jnp.float32)
  jaxpr = jax.make_jaxpr(rewritten)(x, w)
  product = (N // 4) ** 2 * 4
  for donated, expected in ((0, SQUARE), (1, 0)):
    found = liveness.peak(jaxpr, donated=donated)
    assert found == pytest.approx(product + expected, abs=NARROW)


def test_what_a_loop_stacks():
  x = jax.ShapeDtypeStruct((N, N), jnp.float32)
  jaxpr = jax.make_jaxpr(stacked)(x, x)
  assert liveness.stacked(jaxpr, 8) == 8 * SQUARE
  assert liveness.stacked(jaxpr, 7) == 0


def test_a_short_last_axis_is_laid_out_longer():
  x = jax.ShapeDtypeStruct((2, 3, 4, 64), jnp.float32)
  w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda x, w: jnp.sum(x @ w @ w))(x, w)
  plain = liveness.peak(jaxpr)
  rules = liveness.Rules({64: 128})
  assert liveness.peak(jaxpr, rules) == 2 * plain
