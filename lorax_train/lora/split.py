"""split / bind / merge: one tree of parameters as a frozen and a trainable one.

    params                  frozen                      trainable
    {'q': W, 'norm': g}  -> {'q': Fixed(W, s), ...}  +  {'q': Adapter(A, B),
                             'norm': g}                  'norm': None}

Both halves keep the outline of `params`; None has no leaves, so `jax.grad`,
optax and a checkpoint of `trainable` see A and B alone.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.spec import LoraSpec, Placement, resolve
from lorax_train.lora.weight import Adapter, Fixed, LoraWeight

Params = Any
Names = Mapping[str, tuple[str, ...]]


def path_of(path: tuple) -> str:
  """A key path of `jax.tree_util` as 'layers/self_attn/q_proj'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def split(
  key: jax.Array,
  params: Params,
  spec: LoraSpec | Mapping[str, Placement],
  names: Names | None = None,
) -> tuple[Params, Params]:
  """Splits parameters into (frozen, trainable), with new factors A and B.

  A is uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), PEFT's default) and
  B zero, so the function is unchanged at the start. Nothing of W is copied.
  Works under `jax.eval_shape`, so counts need no weights.

  Args:
    key: typed PRNG key; each adapter's own key is folded in by path.
    params: tree of weights [*stack, in, out] and whatever else.
    spec: what to adapt, or `resolve`'s answer for names already resolved.
    names: {path: module names, one for each stack index, row-major} of the
      leaves that may be adapted. None: every leaf of two or more axes, under
      its own path with dots.

  Returns:
    (frozen, trainable), see the head of this file.

  Raises:
    ValueError: targets that match nothing, names that don't fit the leaves.

  >>> params = {'q': jnp.ones((3, 5)), 'norm': jnp.ones(3)}
  >>> spec = LoraSpec('q', rank=2, alpha=4)
  >>> frozen, trainable = split(jax.random.key(0), params, spec)
  >>> trainable['q'].a.shape, trainable['q'].b.shape, trainable['norm']
  ((2, 3), (2, 5), None)
  """
  treedef: Any
  leaves, treedef = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=_is_weight
  )
  by_path = {path_of(path): leaf for path, leaf in leaves}
  names = _default_names(by_path) if names is None else names
  _check_names(by_path, names)
  if isinstance(spec, LoraSpec):
    flat = [name for path in by_path for name in names.get(path, ())]
    spec = resolve(spec, flat)

  frozen: list[Any] = []
  trainable: list[Adapter | None] = []
  for path, w in by_path.items():
    places = [spec.get(name) for name in names.get(path, ())]
    if not any(places):
      frozen.append(w)
      trainable.append(None)
      continue
    ranks = tuple(p.rank if p else 0 for p in places)
    scale = _per_layer(w, [p.scale if p else 0.0 for p in places])
    drops = [p.dropout if p else 0.0 for p in places]
    rate = _per_layer(w, drops) if any(drops) else None
    frozen.append(Fixed(w, scale, rate, ranks))
    trainable.append(_init(_key_at(key, path), w.shape, ranks))
  return treedef.unflatten(frozen), treedef.unflatten(trainable)


def bind(
  frozen: Params, trainable: Params, key: jax.Array | None = None
) -> Params:
  """The adapted parameters: a LoraWeight where there is an adapter.

  No FLOPs, no copy: the result is a view to be used inside the step.

  Args:
    frozen: from `split`.
    trainable: from `split`, or trained.
    key: typed PRNG key of this step; given, dropout is on.

  >>> params = {'q': jnp.ones((3, 5))}
  >>> halves = split(jax.random.key(0), params, LoraSpec('q', rank=2))
  >>> (jnp.ones((1, 3)) @ bind(*halves)['q']).shape
  (1, 5)
  """

  def join(path, fixed, adapter):
    if adapter is None:
      return fixed
    if not isinstance(fixed, Fixed):
      raise ValueError(f'{path_of(path)}: an adapter but no frozen half')
    keys = None
    if key is not None and fixed.rate is not None:
      own, stack = _key_at(key, path_of(path)), fixed.scale.shape
      keys = jax.random.split(own, stack) if stack else own
    rate = None if keys is None else fixed.rate
    return LoraWeight(fixed.w, adapter.a, adapter.b, fixed.scale, rate, keys)

  return jax.tree_util.tree_map_with_path(
    join, frozen, trainable, is_leaf=_is_half
  )


def merge(frozen: Params, trainable: Params) -> Params:
  """Plain arrays W + scale A^T B, summed in float32, in W's own dtype.

  For export and serving, and as the oracle of tests: it materialises what
  `bind` avoids.
  """

  def join(fixed, adapter):
    if adapter is None:
      return fixed
    delta = jnp.einsum(
      '...ri,...ro,...->...io', adapter.a, adapter.b, fixed.scale
    )
    return (fixed.w.astype(jnp.float32) + delta).astype(fixed.w.dtype)

  return jax.tree.map(join, frozen, trainable, is_leaf=_is_half)


def count(frozen: Params) -> tuple[int, int]:
  """(trainable, base) numbers of parameters, by the true ranks.

  Reads shapes only. Base is what the model has without adapters.

  >>> halves = split(jax.random.key(0), {'q': jnp.ones((3, 5))},
  ...                LoraSpec('q', rank=2))
  >>> count(halves[0])
  (16, 15)
  """
  trainable = base = 0
  for leaf in jax.tree.leaves(frozen, is_leaf=_is_half):
    if isinstance(leaf, Fixed):
      trainable += sum(leaf.ranks) * sum(leaf.w.shape[-2:])
      leaf = leaf.w
    base += math.prod(leaf.shape)
  return trainable, base


def _is_weight(x: Any) -> bool:
  """Weights of other kinds (quantised ones) are pytrees with a shape."""
  return x is None or hasattr(x, 'shape')


def _is_half(x: Any) -> bool:
  return isinstance(x, Fixed) or _is_weight(x)


def _key_at(key: jax.Array, path: str) -> jax.Array:
  # crc32 and not hash(): the latter is salted per process, and every host of
  # a run must draw the same adapters.
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _per_layer(w: Any, values: list[float]) -> jax.Array:
  """One number for each stack index, [*stack] float32."""
  return jnp.asarray(np.array(values, np.float32).reshape(w.shape[:-2]))


def _init(
  key: jax.Array, shape: tuple[int, ...], ranks: tuple[int, ...]
) -> Adapter:
  *stack, n_in, n_out = shape
  r = max(ranks)
  bound = 1.0 / math.sqrt(n_in)
  a = jax.random.uniform(key, (*stack, r, n_in), jnp.float32, -bound, bound)
  if min(ranks) < r:
    live = np.arange(r) < np.array(ranks).reshape(*stack, 1)
    a = jnp.where(live[..., None], a, 0.0)
  return Adapter(a, jnp.zeros((*stack, r, n_out), jnp.float32))


def _default_names(by_path: Mapping[str, Any]) -> Names:
  return {
    path: (path.replace('/', '.'),) * math.prod(w.shape[:-2])
    for path, w in by_path.items()
    if w is not None and len(w.shape) >= 2
  }


def _check_names(by_path: Mapping[str, Any], names: Names) -> None:
  problems = []
  for path, of_stack in names.items():
    w = by_path.get(path)
    if w is None:
      problems.append(f'names has {path!r}, which params has not')
    elif len(w.shape) < 2:
      problems.append(f'{path} has shape {w.shape}: no [in, out] to factor')
    elif len(of_stack) != math.prod(w.shape[:-2]):
      problems.append(
        f'{path} of shape {w.shape} wants {math.prod(w.shape[:-2])} names,'
        f' got {len(of_stack)}'
      )
  if problems:
    raise ValueError('; '.join(problems))
