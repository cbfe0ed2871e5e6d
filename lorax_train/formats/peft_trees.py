"""Adapters as trees of ours <-> as arrays by PEFT's names."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lorax_train.errors import ModelError
from lorax_train.formats import peft_tensors
from lorax_train.formats.peft_tensors import (
  MAGNITUDE,
  PREFIX,
  ROWS,
  WHOLE,
  LoadedAdapter,
)
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.lora import Adapter, Fixed, Original, is_trained, path_of

Names = Mapping[str, tuple[str, ...]]


def to_tensors(
  frozen: Any, trainable: Any, names: Names
) -> dict[str, np.ndarray]:
  """{PEFT key: array} in float32, each of its module's true rank."""
  tensors: dict[str, np.ndarray] = {}
  for path, half, own in _trained(frozen, trainable):
    if isinstance(half, Fixed):
      tensors |= _of_adapter(half, own, names[path])
    else:
      tensors |= _of_whole(half, own, names[path])
  return tensors


def _of_adapter(
  fixed: Fixed, adapter: Adapter, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
  tensors = {}
  n_in, n_out = fixed.w.shape[-2:]
  a, b = fixed.a_of(adapter), adapter.b
  parts = [(_layers(a, n_in), _layers(b, n_out))]
  if fixed.a0 is not None:
    parts.append((_layers(fixed.a0, n_in), -_layers(fixed.b0, n_out)))
  for i, (name, rank) in enumerate(zip(names, fixed.ranks, strict=True)):
    if not rank:
      continue
    a_i, b_i = (
      np.concatenate([half[i, :rank] for half in halves])
      for halves in zip(*parts, strict=True)
    )
    for half, factor in (('A', a_i), ('B', np.ascontiguousarray(b_i.T))):
      tensors[peft_tensors.factor_key(name, half, fixed.look_up)] = factor
    if adapter.m is not None:
      m = np.asarray(adapter.m, np.float32).reshape(-1, n_out)
      tensors[f'{PREFIX}{name}{MAGNITUDE}'] = m[i].copy()
  return tensors


def _of_whole(
  original: Original, own: Any, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
  array = np.asarray(own, np.float32)
  if original.rows is not None:
    return {f'{PREFIX}{names[0]}{ROWS}': array}
  if not _stacked(original):
    array = array[None]
  if _transposed(original):
    array = array.swapaxes(-1, -2)
  names = _trained_names(original, names)
  return {
    f'{PREFIX}{name}{WHOLE}': np.ascontiguousarray(x)
    for name, x in zip(names, array, strict=True)
  }


def _stacked(original: Original) -> bool:
  return original.axes.startswith('s')


def _trained_names(
  original: Original, names: tuple[str, ...]
) -> tuple[str, ...]:
  """The modules of a leaf that are trained."""
  layers = original.layers
  return names if layers is None else tuple(names[i] for i in layers)


def _transposed(original: Original) -> bool:
  """Whether Hugging Face stores it (out, in), as all linears."""
  return original.axes.endswith('io')


def _layers(factor: Any, n: int) -> np.ndarray:
  """[*stack, R, n] as [stack, R, n] in float32."""
  array = np.asarray(factor, np.float32)
  return array.reshape(-1, array.shape[-2], n)


def fill(
  loaded: LoadedAdapter, frozen: Any, trainable: Any, names: Names
) -> Any:
  """The trainable tree with an adapter's numbers in it, where it lies.

  Args:
    loaded: from `load_adapter`.
    frozen: from `lora.split` by the same placement.
    trainable: from the same split; shapes suffice.
    names: {path: module names} of all that is trained.

  Raises:
    ModelError: modules or ranks that the two sides don't share.
  """
  left, left_whole = dict(loaded.factors), dict(loaded.trained)
  problems: list[str] = []
  filled: dict[str, Any] = {}
  for path, half, own in _trained(frozen, trainable):
    if isinstance(half, Fixed):
      filled[path] = _fill_adapter(
        half, own, names[path], left, loaded.magnitudes, problems
      )
    else:
      filled[path] = _fill_whole(half, names[path], left_whole, problems)
  if left:
    problems.append(f'factors of modules that are not targets: {few([*left])}')
  if left_whole:
    problems.append(
      f'weights of modules that the model has not: {few([*left_whole])}'
    )
  problems += [
    f'it was made on another {name}, which it carries along'
    for path, half, _ in _trained(frozen, trainable)
    for name in names[path]
    if name in loaded.carried and _differs(loaded.carried[name], half)
  ]
  if problems:
    raise ModelError(f'adapter does not fit the model: {few(problems)}')
  by_path = jax.tree_util.tree_map_with_path(
    lambda path, _: filled[path_of(path)],
    trainable,
    is_leaf=lambda x: isinstance(x, Adapter),
  )

  def put(array: np.ndarray, like: Any) -> jax.Array:
    # New factors lie on no mesh yet, and go wherever they are used.
    where = getattr(like, 'sharding', None)
    on_mesh = isinstance(where, jax.sharding.NamedSharding)
    return jax.device_put(array, where if on_mesh else None)

  return jax.tree.map(put, by_path, trainable)


def _fill_adapter(
  fixed: Fixed,
  adapter: Adapter,
  names: tuple[str, ...],
  left: dict[str, tuple[np.ndarray, np.ndarray]],
  magnitudes: Mapping[str, np.ndarray],
  problems: list[str],
) -> Adapter:
  """The factors of a leaf; what was used is taken out of `left`."""
  assert adapter.a is not None  # a PEFT adapter trains both
  a = np.zeros(adapter.a.shape, np.float32)
  b = np.zeros(adapter.b.shape, np.float32)
  m = None if adapter.m is None else np.zeros(adapter.m.shape, np.float32)
  stack = fixed.scale.shape
  for i, (name, rank) in enumerate(zip(names, fixed.ranks, strict=True)):
    if not rank:
      continue
    theirs = left.pop(name, None)
    wanted = ((rank, a.shape[-1]), (rank, b.shape[-1]))
    if theirs is None or (theirs[0].shape, theirs[1].shape) != wanted:
      got = 'nothing' if theirs is None else [t.shape for t in theirs]
      problems.append(f'{name} wants A and B^T {list(wanted)}, got {got}')
      continue
    at = np.unravel_index(i, stack) if stack else ()
    a[at][:rank], b[at][:rank] = theirs
    if m is not None:
      m[at] = magnitudes[name]
  return Adapter(a, b, m)


def _fill_whole(
  original: Original,
  names: tuple[str, ...],
  left: dict[str, np.ndarray],
  problems: list[str],
) -> Any:
  """What is trained of a leaf; what was used is taken out of `left`."""
  names = _trained_names(original, names)
  shape, parts = original.trained_shape, []
  for name in names:
    theirs = left.pop(name, None)
    if theirs is not None and _transposed(original):
      theirs = theirs.T
    wanted = shape[1:] if _stacked(original) else shape
    if theirs is None or theirs.shape != wanted:
      got = 'nothing' if theirs is None else theirs.shape
      problems.append(f'{name} wants {wanted}, got {got}')
    else:
      parts.append(theirs)
  if len(parts) < len(names):
    return None  # and a problem says so
  return np.stack(parts) if _stacked(original) else parts[0]


def _differs(carried: TensorRef, half: Any) -> bool:
  """Whether a base weight that PEFT saved along is not the model's."""
  w = half.w
  if not isinstance(w, jax.Array) or not w.is_fully_addressable:
    return False  # shapes only, or cut across hosts: not to be compared here
  theirs = carried.read()
  if isinstance(half, Fixed) and not half.look_up:
    theirs = theirs.T
  return not np.array_equal(theirs.astype(w.dtype), np.asarray(w))


def _trained(
  frozen: Any, trainable: Any
) -> Iterator[tuple[str, Fixed | Original, Any]]:
  """(path, frozen half, trainable half) of each trained leaf, in tree order."""
  is_adapter = lambda x: isinstance(x, Adapter)  # noqa: E731
  halves = [
    (path_of(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      frozen, is_leaf=is_trained
    )
    if is_trained(leaf)
  ]
  owns = jax.tree.leaves(trainable, is_leaf=is_adapter)
  for (path, half), own in zip(halves, owns, strict=True):
    yield path, half, own
