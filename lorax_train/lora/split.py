"""split / bind / merge: one tree of parameters as a frozen and a trainable one.

    params                  frozen                      trainable
    {'q': W, 'norm': g}  -> {'q': Fixed(W, s), ...}  +  {'q': Adapter(A, B),
                             'norm': g}                  'norm': None}

Both halves keep the outline of `params`; None has no leaves, so `jax.grad`,
optax and a checkpoint of `trainable` see A and B alone.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from lorax_train.lora import axes as axes_lib
from lorax_train.lora.init import begin
from lorax_train.lora.spec import LoraSpec, Placement, resolve
from lorax_train.lora.weight import Adapter, Fixed, LoraWeight

Params = Any
Names = Mapping[str, tuple[str, ...]]
Layout = Mapping[str, str]


def path_of(path: tuple) -> str:
  """A key path of `jax.tree_util` as 'layers/self_attn/q_proj'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def split(
  key: jax.Array,
  params: Params,
  spec: LoraSpec | Mapping[str, Placement],
  names: Names | None = None,
  layout: Layout | None = None,
) -> tuple[Params, Params]:
  """Splits parameters into (frozen, trainable), with new factors A and B.

  The function is unchanged at the start. Nothing of W is copied. Works under
  `jax.eval_shape`, so counts need no weights.

  Args:
    key: typed PRNG key; each adapter's own key is folded in by path.
    params: tree of weights and whatever else.
    spec: what to adapt, or `resolve`'s answer for names already resolved.
    names: {path: module names, one for each stack index, row-major} of the
      leaves that may be adapted. None: every leaf that `layout` has, under its
      own path with dots.
    layout: {path: `Fixed.axes`}, what each axis of a leaf is; see `layout`.
      None: every leaf of two or more axes is [*stack, in, out].

  Returns:
    (frozen, trainable), see the head of this file.

  Raises:
    ValueError: targets that match nothing, names that don't fit the leaves.

  >>> import jax.numpy as jnp
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
  layout = _default_layout(by_path) if layout is None else layout
  names = _default_names(by_path, layout) if names is None else names
  _check(by_path, layout, names)
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
    try:
      half, adapter = begin(key_at(key, path), w, layout[path], places)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    frozen.append(half)
    trainable.append(adapter)
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

  >>> import jax.numpy as jnp
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
    if not axes_lib.is_matrix(fixed.axes):
      raise ValueError(
        f'{path_of(path)} of axes {fixed.axes} is no [*stack, in, out], for'
        ' which @ could stand: use lora.transform'
      )
    keys = None
    if key is not None and fixed.rate is not None:
      own, stack = key_at(key, path_of(path)), fixed.scale.shape
      keys = jax.random.split(own, stack) if stack else own
    return dataclasses.replace(
      _bound(fixed, adapter),
      rate=None if keys is None else fixed.rate,
      key=keys,
    )

  return jax.tree_util.tree_map_with_path(
    join, frozen, trainable, is_leaf=is_half
  )


def merge(frozen: Params, trainable: Params) -> Params:
  """Plain arrays W + scale A^T B, summed in float32, in W's own dtype.

  For export and serving, and as the oracle of tests: it materialises what
  `bind` avoids.
  """

  def join(fixed, adapter):
    if adapter is None:
      return fixed
    axes, n_stack = fixed.axes, fixed.scale.ndim
    whole = _bound(fixed, adapter)
    factors = {name: getattr(whole, name) for name in ('a', 'b', 'a0', 'b0')}
    flat = dataclasses.replace(
      whole,
      w=axes_lib.to_matrices(fixed.w, axes),
      **jax.tree.map(lambda x: axes_lib.flatten(x, n_stack), factors),
    )
    return axes_lib.from_matrices(flat.merged(), fixed.w.shape, axes)

  return jax.tree.map(join, frozen, trainable, is_leaf=is_half)


def _bound(fixed: Fixed, adapter: Adapter) -> LoraWeight:
  """Both halves as one, without dropout."""
  return LoraWeight(
    w=fixed.w,
    a=fixed.a_of(adapter),
    b=adapter.b,
    scale=fixed.scale,
    a0=fixed.a0,
    b0=fixed.b0,
    norm2=fixed.norm2,
    m=adapter.m,
  )


def fixed_factors(frozen: Params) -> Params:
  """The factors that training leaves alone, to be kept with a checkpoint.

  LoRA-FA's A, and what PiSSA and OLoRA began with: another machine's SVD would
  give other ones. A tree of Adapters, None where there are none.
  """

  def of(fixed):
    if not isinstance(fixed, Fixed):
      return None
    a = fixed.a if fixed.a0 is None else fixed.a0
    return None if a is None else Adapter(a, fixed.b0)

  return jax.tree.map(of, frozen, is_leaf=is_half)


def with_fixed_factors(frozen: Params, factors: Params) -> Params:
  """`frozen` with what `fixed_factors` once gave in place of its own."""

  def put(fixed, kept):
    if kept is None:
      return fixed
    return dataclasses.replace(
      fixed,
      a=None if fixed.a is None else kept.a,
      a0=None if fixed.a0 is None else kept.a,
      b0=kept.b,
    )

  return jax.tree.map(put, frozen, factors, is_leaf=is_half)


def count(frozen: Params) -> tuple[int, int]:
  """(trainable, base) numbers of parameters, by the true ranks.

  Reads shapes only. Base is what the model has without adapters.

  >>> params = {'q': jax.numpy.ones((3, 5))}
  >>> halves = split(jax.random.key(0), params, LoraSpec('q', rank=2))
  >>> count(halves[0])
  (16, 15)
  """
  trainable = base = 0
  for leaf in jax.tree.leaves(frozen, is_leaf=is_half):
    if isinstance(leaf, Fixed):
      n_in, n_out = (
        math.prod(axes_lib.sizes(leaf.w.shape, leaf.axes, kind))
        for kind in 'io'
      )
      a_row = n_in if leaf.a is None else 0
      trainable += sum(leaf.ranks) * (a_row + n_out)
      if leaf.norm2 is not None:
        trainable += sum(rank > 0 for rank in leaf.ranks) * n_out
      leaf = leaf.w
    base += math.prod(leaf.shape)
  return trainable, base


def _is_weight(x: Any) -> bool:
  """Weights of other kinds (quantised ones) are pytrees with a shape."""
  return x is None or hasattr(x, 'shape')


def is_half(x: Any) -> bool:
  """Where `frozen` ends: a split leaf, a plain one, or nothing."""
  return isinstance(x, Fixed) or _is_weight(x)


def key_at(key: jax.Array, path: str) -> jax.Array:
  """The key of what hangs on a path, of its own for each path."""
  # crc32 and not hash(): the latter is salted per process, and every host of
  # a run must draw the same adapters.
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _default_layout(by_path: Mapping[str, Any]) -> Layout:
  return {
    path: axes_lib.default(len(w.shape))
    for path, w in by_path.items()
    if w is not None and len(w.shape) >= 2
  }


def _default_names(by_path: Mapping[str, Any], layout: Layout) -> Names:
  return {
    path: (path.replace('/', '.'),) * _stacked(by_path[path], layout[path])
    for path in by_path
    if path in layout
  }


def _stacked(w: Any, axes: str) -> int:
  """How many stack indices a leaf has."""
  return math.prod(axes_lib.sizes(w.shape, axes, 's'))


def _check(by_path: Mapping[str, Any], layout: Layout, names: Names) -> None:
  problems = []
  for path, axes in layout.items():
    shape = getattr(by_path.get(path), 'shape', None)
    if shape is None:
      problems.append(f'layout has {path!r}, which params has not')
    elif len(axes) != len(shape) or set(axes) - {'s'} != {'i', 'o'}:
      problems.append(
        f'layout {axes!r} of {path} of shape {shape}: give a letter an axis, s'
        ' (stack), i (in) or o (out), and each of i and o at least once'
      )
  if problems:
    raise ValueError('; '.join(problems))
  for path, of_stack in names.items():
    w = by_path.get(path)
    if w is None:
      problems.append(f'names has {path!r}, which params has not')
    elif path not in layout:
      problems.append(f'{path} has shape {w.shape}: no [in, out] to factor')
    elif len(of_stack) != (n := _stacked(w, layout[path])):
      problems.append(
        f'{path} of shape {w.shape} wants {n} names, got {len(of_stack)}'
      )
  if problems:
    raise ValueError('; '.join(problems))
