"""What weights are multiplied with: the second moments of their inputs.

A matrix that is watched does what it did; differentiating a loss of its products
gives the sum of x x^T over its inputs in place of a gradient. So whatever runs a
model finds them: scans, remat and meshes are in jax's hands.

Axis letters: I in (both axes of a moment), O out, N inputs.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_train.lora.halves import Params, is_weight, path_of
from lorax_train.lora.weight import Around, node, product

Array = Any


class Moments(NamedTuple):
  """Of the inputs of a leaf [*stack, in, out].

  Attributes:
    total: [*stack, in, in] float32, sum of x x^T.
    count: [*stack] float32, how many there were.
  """

  total: Array
  count: Array


@node('w', 'moments')
class Watched(Around):
  """A weight [*stack, in, out] whose products also tell of their inputs.

  Attributes:
    w: an array, or anything with the weight protocol.
    moments: zeros, of which to take the gradient.
  """

  w: Array
  moments: Moments

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x [..., in] @ W."""
    y = product(x, self.w, out_dtype)
    return y + _told(x, self.moments, y.shape[-1], y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _told(x: Array, moments: Moments, n_out: int, dtype: Any) -> Array:
  """Zeros [..., out]; going back, the moments of those x that matter."""
  return jnp.zeros((*x.shape[:-1], n_out), dtype)


def _told_fwd(x: Array, moments: Moments, n_out: int, dtype: Any) -> tuple:
  return jnp.zeros((*x.shape[:-1], n_out), dtype), x


def _told_bwd(n_out: int, dtype: Any, x: Array, g: Array) -> tuple:
  # What no loss depends on, padding above all, has a gradient of zero.
  used_N = jnp.any(g != 0, axis=-1).reshape(-1)
  x_NI = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  x_NI = jnp.where(used_N[:, None], x_NI, 0.0)
  with jax.default_matmul_precision('highest'):
    total_II = x_NI.T @ x_NI
  count = jnp.sum(used_N, dtype=jnp.float32)
  return jnp.zeros_like(x), Moments(total_II, count)


_told.defvjp(_told_fwd, _told_bwd)


def no_moments(params: Params, paths: set[str]) -> dict[str, Moments]:
  """Zeros for the leaves at `paths`, each [*stack, in, out].

  Raises:
    ValueError: one has fewer axes.
  """
  found = {}
  for path, w in _leaves(params):
    if path in paths:
      *stack, n_in, _ = w.shape
      zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
      found[path] = Moments(zeros((*stack, n_in, n_in)), zeros(stack))
  return found


def watched(params: Params, moments: Mapping[str, Moments]) -> Params:
  """`params` with the leaves at some paths watched.

  The gradient of a function of it, in `moments`, are the moments of the inputs
  that its value depends on.

  >>> params = {'w': jnp.ones((2, 3))}
  >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  >>> def loss(moments):
  ...   return jnp.sum((x @ watched(params, moments)['w'])[:2])
  >>> got = jax.grad(loss)(no_moments(params, {'w'}))['w']
  >>> got.total.tolist(), float(got.count)
  ([[10.0, 14.0], [14.0, 20.0]], 2.0)
  """
  leaves = [
    Watched(w, moments[path]) if path in moments else w
    for path, w in _leaves(params)
  ]
  tree: Any = jax.tree.structure(params, is_leaf=is_weight)
  return tree.unflatten(leaves)


def _leaves(params: Params) -> list[tuple[str, Any]]:
  found, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
  return [(path_of(path), w) for path, w in found]
