"""LoRA of any JAX function, however it uses its weights.

    fn(params, *args) -> fn'(frozen, trainable, *args)

`fn` is traced with `jax.make_jaxpr` on its base weights, and the equations are
run again with `Factored` in place of the adapted ones. Models need not know:
plain jnp, Flax Linen and NNX, Haiku, Equinox. The result differentiates in
`trainable` at the cost of the factors: no W + scale * A^T B, and no dW.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_train.lora import axes as axes_lib
from lorax_train.lora import weight
from lorax_train.lora.equation import is_array, trace
from lorax_train.lora.factored import Factored
from lorax_train.lora.halves import is_half, key_at, leaf_of, path_of
from lorax_train.lora.walk import LowRankError, Walk
from lorax_train.lora.weight import Adapter, Fixed

Params = Any

__all__ = ['LowRankError', 'transform']


def transform(
  fn: Callable[..., Any],
  *,
  materialise: bool = False,
  inline_custom_vjp: bool = False,
) -> Callable[..., Any]:
  """`fn` of adapted parameters, equal to `fn(merge(frozen, trainable), ...)`.

  It traces `fn` at each call: wrap the result in `jax.jit`. As under jit,
  arrays among the arguments cannot steer Python; everything else can. A plain
  array in `trainable` where `frozen` has None takes the leaf's place. DoRA's
  norm is a constant to the gradient, as in `bind`.

  Args:
    fn: (params, *args, **kwargs) -> anything of arrays.
    materialise: form the whole weight where there is no low-rank rule, at full
      fine-tuning's cost there, in place of the error.
    inline_custom_vjp: where an adapted weight enters a `jax.custom_vjp`, take
      the derivative of its function and leave its own backward pass out.

  Returns:
    fn'(frozen, trainable, *args, key=None, **kwargs). A typed PRNG key turns
    dropout on, as in `bind`.

  Raises:
    LowRankError: at the call, naming the primitive, the parameter's path and
      the line: `fn` does to an adapted weight what has no low-rank rule.
    ValueError: at the call, halves that don't belong together.

  >>> from lorax_train import lora
  >>> def fn(params, x):
  ...   return jnp.tanh(x @ params['w1']) @ params['w2'].T
  >>> params = {'w1': jnp.ones((3, 5)), 'w2': jnp.ones((4, 5))}
  >>> spec = lora.LoraSpec('w1,w2', rank=2)
  >>> x = jnp.ones((1, 3))
  >>> halves = lora.split(
  ...   jax.random.key(0), params, spec, layout=lora.layout(fn, params, x))
  >>> transform(fn)(*halves, x).shape
  (1, 4)
  """
  walk = Walk(materialise, inline_custom_vjp)

  def adapted(frozen, trainable, *args, key=None, **kwargs):
    tracked = _joined(frozen, trainable, key)
    base = jax.tree.map(
      lambda leaf: leaf.w if isinstance(leaf, Factored) else leaf,
      tracked,
      is_leaf=_is_factored,
    )
    values = jax.tree.leaves((tracked, args, kwargs), is_leaf=_is_factored)
    jaxpr, structure, at = trace(fn, (base, *args), kwargs)
    out = walk(jaxpr, [values[i] for i in at])
    what = 'returning it from the function'
    return jax.tree.unflatten(structure, [walk.settled(v, what) for v in out])

  return adapted


def _joined(frozen: Params, trainable: Params, key: jax.Array | None) -> Params:
  """Parameters with a Factored where there is an adapter."""

  def join(at, fixed, own):
    path = path_of(at)
    if isinstance(fixed, Fixed) and isinstance(own, Adapter):
      return _factored(path, fixed, own, key)
    if isinstance(own, Adapter):
      raise ValueError(f'{path}: an adapter but no frozen half')
    return leaf_of(at, fixed, own)

  return jax.tree_util.tree_map_with_path(
    join, frozen, trainable, is_leaf=is_half
  )


def _factored(
  path: str, fixed: Fixed, adapter: Adapter, key: jax.Array | None
) -> Factored:
  if not is_array(fixed.w):
    raise ValueError(
      f'{path}: transform wants plain arrays, not a {type(fixed.w).__name__}:'
      ' use bind, or make the weight whole first'
    )
  a, b, n_stack = fixed.a_of(adapter), adapter.b, fixed.scale.ndim
  n_trained = a.shape[n_stack]
  if fixed.a0 is not None and fixed.b0 is not None:
    a = jnp.concatenate([a, fixed.a0], n_stack)
    b = jnp.concatenate([b, -fixed.b0], n_stack)
  keys = None
  if key is not None and fixed.rate is not None:
    keys, stack = key_at(key, path), fixed.scale.shape
    keys = jax.random.split(keys, stack) if stack else keys
  return Factored(
    w=fixed.w,
    a=a,
    b=b,
    scale=fixed.scale,
    gain=None if adapter.m is None else _gain(fixed, a, b, adapter.m),
    rate=None if keys is None else fixed.rate,
    key=keys,
    n_dropped=n_trained,
    axes=fixed.axes,
    path=path,
    dtype=jnp.dtype(fixed.w.dtype),
  )


def _gain(fixed: Fixed, a: jax.Array, b: jax.Array, m: jax.Array) -> jax.Array:
  """DoRA's `weight.gain` of any layout, [*stack, *out].

  The norm counts as a constant in the backward pass (Liu et al. 2024, section
  4.3).
  """
  assert fixed.norm2 is not None
  n_stack = fixed.scale.ndim
  w, of_w, a, b, scale = lax.stop_gradient(
    (fixed.w, fixed.norm2, a, b, fixed.scale)
  )
  matrices = (
    axes_lib.to_matrices(w, fixed.axes),
    axes_lib.flatten(of_w, n_stack),
    axes_lib.flatten(a, n_stack + 1),
    axes_lib.flatten(b, n_stack + 1),
    scale,
  )
  with jax.default_matmul_precision('highest'):
    if n_stack and w.dtype != a.dtype:
      # One after the other: a cast copy of the whole stack would be large.
      norm2 = lax.map(lambda one: weight.sum_norm2(*one), matrices)
    else:
      norm2 = weight.sum_norm2(*matrices)
  return weight.gain(m, norm2.reshape(m.shape), scale)


def _is_factored(x: Any) -> bool:
  return isinstance(x, Factored)
