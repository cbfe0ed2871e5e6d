"""split / bind / merge: one tree of parameters as a frozen and a trainable one.

    params                  frozen                      trainable
    {'q': W, 'norm': g,  -> {'q': Fixed(W, s), ...}  +  {'q': Adapter(A, B),
     'head': H}              'norm': g,                  'norm': None,
                             'head': Original()}         'head': H}

Both halves keep the outline of `params`; None has no leaves, so `jax.grad`,
optax and a checkpoint of `trainable` see A and B alone, and what is trained
whole (`modules_to_save`), as H here.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from lorax_train.lora import axes as axes_lib
from lorax_train.lora import init
from lorax_train.lora import whole as whole_lib
from lorax_train.lora.halves import Params, is_weight, key_at, path_of
from lorax_train.lora.matching import resolve
from lorax_train.lora.spec import ALL_LINEAR, LoraSpec, Placement, Whole
from lorax_train.lora.weight import Adapter

Names = Mapping[str, tuple[str, ...]]
Layout = Mapping[str, str]


def split(
  key: jax.Array,
  params: Params,
  spec: LoraSpec | Mapping[str, Placement | Whole],
  names: Names | None = None,
  layout: Layout | None = None,
  others: Names | None = None,
  givens: Callable[[str, int], Any] | None = None,
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
    layout: {path: letters}, what each axis of a leaf is; see `layout`. Of a
      leaf in `others` a '.' for what is no stack. None: every leaf of two or
      more axes is [*stack, in, out].
    others: {path: module names}, likewise, of leaves that take no adapter but
      may be trained whole. None: where `names` is None too, all other leaves.
    givens: (path, stack index) -> what the way of beginning wants of a leaf:
      loftq W [in, out] before it was quantised, whitened the mean [in, in] of
      x x^T over its inputs (`lora.inputs`), qera the pair of both.

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
    params, is_leaf=is_weight
  )
  by_path = {path_of(path): leaf for path, leaf in leaves}
  layout = _default_layout(by_path) if layout is None else layout
  if others is None:
    others = {} if names is not None else _other_names(by_path, layout)
  names = _default_names(by_path, layout) if names is None else names
  layout = {**_unknown_axes(by_path, others), **layout}
  _check(by_path, layout, names, others)
  if isinstance(spec, LoraSpec):
    linear = spec.targets.strip() == ALL_LINEAR
    passed = [path for path in names if linear and 'v' in layout[path]]
    spec = resolve(
      spec,
      _flat(names, [path for path in by_path if path not in passed]),
      others=_flat({**names, **others}, [*passed, *others]),
    )
  names = {**names, **others}

  frozen: list[Any] = []
  trainable: list[Adapter | jax.Array | None] = []
  for path, w in by_path.items():
    places: list[Any] = [spec.get(name) for name in names.get(path, ())]
    half: Any = w
    own: Adapter | jax.Array | None = None
    try:
      if any(isinstance(place, Whole) for place in places):
        half, own = whole_lib.begin(w, layout[path], places)
      elif any(places):
        axes, look_up = layout[path].replace('v', 'i'), 'v' in layout[path]
        given = givens and functools.partial(givens, path)
        half, own = init.begin(
          key_at(key, path), w, axes, places, look_up, given
        )
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    frozen.append(half)
    trainable.append(own)
  return treedef.unflatten(frozen), treedef.unflatten(trainable)


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
    if path in layout and '.' not in layout[path]
  }


def _other_names(by_path: Mapping[str, Any], layout: Layout) -> Names:
  return {
    path: (path.replace('/', '.'),)
    for path, w in by_path.items()
    if w is not None and '.' in layout.get(path, '.')
  }


def _flat(names: Names, paths: Iterable[str]) -> list[str]:
  return [name for path in paths for name in names.get(path, ())]


def _unknown_axes(by_path: Mapping[str, Any], others: Names) -> Layout:
  """Of leaves that take no adapter: a stack, where they have several names."""
  return {
    path: '.' * len(w.shape) if len(of) == 1 else f's{"." * (len(w.shape) - 1)}'
    for path, of in others.items()
    if (w := by_path.get(path)) is not None
  }


def _stacked(w: Any, axes: str) -> int:
  """How many stack indices a leaf has."""
  return math.prod(axes_lib.sizes(w.shape, axes, 's'))


def _check(
  by_path: Mapping[str, Any], layout: Layout, names: Names, others: Names
) -> None:
  problems = []
  for path, axes in layout.items():
    shape = getattr(by_path.get(path), 'shape', None)
    if shape is None:
      problems.append(f'layout has {path!r}, which params has not')
    elif len(axes) != len(shape) or (
      path in names and {*axes.replace('v', 'i')} - {'s'} != {'i', 'o'}
    ):
      problems.append(
        f'layout {axes!r} of {path} of shape {shape}: give a letter an axis, s'
        ' (stack), i (in; v if looked up) or o (out), and each of in and out at'
        ' least once'
      )
  if problems:
    raise ValueError('; '.join(problems))
  for path, of_stack in {**names, **others}.items():
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
