"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors.

Names and shapes as PEFT 0.21 writes them: A is (r, in), B is (out, r), DoRA's
magnitude (out,). What is in the JSON is peft_config's.

An adapter that began from the base (PiSSA, OLoRA) is B A - B0 A0 on it. It is
written as [B, -B0] [A; A0], of twice the rank, so that it fits the base as it
is; PEFT alone would need the base that it changed.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax_train.errors import ModelError
from lorax_train.formats import safetensors
from lorax_train.formats.peft_config import CONFIG_FILE, read_config, to_config
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.lora import (
  Adapter,
  Fixed,
  LoraSpec,
  Placement,
  path_of,
  resolve,
)
from lorax_train.lora.init import FROM_BASE

PREFIX = 'base_model.model.'
WEIGHTS_FILE = 'adapter_model.safetensors'

CARRIED = '.base_layer.weight'
_MAGNITUDE = '.lora_magnitude_vector'
_KEY = re.compile(
  rf'{re.escape(PREFIX)}(.+)\.lora_(?:([AB])\.weight|(magnitude_vector))'
)


class LoadedAdapter(NamedTuple):
  """A PEFT adapter as read.

  Attributes:
    spec: what it adapts, by PEFT's rules.
    factors: {module name: (A [r, in], B [r, out])} float32.
    base: base_model_name_or_path, '' if not given.
    carried: {module name: the base's own weight (out, in), saved along}.
    magnitudes: {module name: m [out]} float32, of DoRA.
  """

  spec: LoraSpec
  factors: dict[str, tuple[np.ndarray, np.ndarray]]
  base: str
  carried: Mapping[str, TensorRef] = MappingProxyType({})
  magnitudes: Mapping[str, np.ndarray] = MappingProxyType({})


def save_adapter(
  directory: str | os.PathLike,
  frozen: Any,
  trainable: Any,
  names: Mapping[str, tuple[str, ...]],
  spec: LoraSpec,
  base: str,
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors.

  Args:
    directory: made where absent.
    frozen: from `lora.split`; its weights may be shapes only.
    trainable: the factors.
    names: {path: module names}, as `lora.split` had them.
    spec: as `lora.split` had it.
    base: what base_model_name_or_path shall say.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = to_tensors(frozen, trainable, names)
  save_file(tensors, directory / WEIGHTS_FILE, metadata={'format': 'pt'})
  config = to_config(_written(spec), names, base)
  text = json.dumps(config, indent=2, sort_keys=True)
  (directory / CONFIG_FILE).write_text(text + '\n', 'utf-8')


def to_tensors(
  frozen: Any, trainable: Any, names: Mapping[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
  """{PEFT key: array} in float32, each of its module's true rank."""
  tensors = {}
  for path, fixed, adapter in _adapted(frozen, trainable):
    n_in, n_out = fixed.w.shape[-2:]
    a, b = fixed.a_of(adapter), adapter.b
    parts = [(_layers(a, n_in), _layers(b, n_out))]
    if fixed.a0 is not None:
      parts.append((_layers(fixed.a0, n_in), -_layers(fixed.b0, n_out)))
    for i, (name, rank) in enumerate(
      zip(names[path], fixed.ranks, strict=True)
    ):
      if not rank:
        continue
      key = f'{PREFIX}{name}'
      a_i, b_i = (
        np.concatenate([half[i, :rank] for half in halves])
        for halves in zip(*parts, strict=True)
      )
      tensors[f'{key}.lora_A.weight'] = a_i
      tensors[f'{key}.lora_B.weight'] = np.ascontiguousarray(b_i.T)
      if adapter.m is not None:
        m = np.asarray(adapter.m, np.float32).reshape(-1, n_out)
        tensors[f'{key}{_MAGNITUDE}'] = m[i].copy()
  return tensors


def _layers(factor: Any, n: int) -> np.ndarray:
  """[*stack, R, n] as [stack, R, n] in float32."""
  array = np.asarray(factor, np.float32)
  return array.reshape(-1, array.shape[-2], n)


def _written(spec: LoraSpec) -> LoraSpec:
  """What stands in the JSON: twice the rank at the same scale, see above."""
  if spec.init not in FROM_BASE:
    return dataclasses.replace(spec, init='default')
  factor = 2**0.5 if 'rslora' in spec.variants else 2
  return dataclasses.replace(
    spec,
    init='default',
    rank=2 * spec.rank,
    alpha=factor * spec.alpha,
    rank_pattern={k: 2 * r for k, r in spec.rank_pattern.items()},
    alpha_pattern={k: factor * a for k, a in spec.alpha_pattern.items()},
  )


def load_adapter(directory: str | os.PathLike) -> LoadedAdapter:
  """Reads an adapter directory, PEFT's or ours.

  Raises:
    ModelError: not a LoRA adapter, a setting we don't compute, keys we don't
      know, or factors that are not finite or don't fit each other.
  """
  directory = Path(directory)
  spec, base = read_config(directory / CONFIG_FILE)
  refs = safetensors.open_file(directory / WEIGHTS_FILE)
  halves: dict[str, dict[str, np.ndarray]] = {}
  carried: dict[str, TensorRef] = {}
  unknown = []
  for key, ref in refs.items():
    if key.endswith(CARRIED):
      # PEFT adds the base's head where the head is a target.
      carried[key.removeprefix(PREFIX).removesuffix(CARRIED)] = ref
      continue
    found = _KEY.fullmatch(key)
    floating = jnp.issubdtype(ref.dtype, jnp.floating)
    ndim = 1 if found and found[3] else 2
    if found is None or len(ref.shape) != ndim or not floating:
      unknown.append(f'{key} {ref.dtype}{list(ref.shape)}')
      continue
    part = ref.read().astype(np.float32)
    halves.setdefault(found[1], {})[found[2] or 'm'] = part
  where = directory / WEIGHTS_FILE
  if unknown:
    raise ModelError(f'{where}: not LoRA factors of linears: {few(unknown)}')
  problems: list[str] = []
  factors, magnitudes = {}, {}
  dora = 'dora' in spec.variants
  for name, parts in halves.items():
    a, b, m = (parts.get(part) for part in ('A', 'B', 'm'))
    if a is None or b is None:
      problems.append(f'{name}: lora_{"B" if b is None else "A"} is missing')
    elif a.shape[0] != b.shape[1]:
      problems.append(f'{name}: A {a.shape} and B {b.shape} do not fit')
    elif (m is not None) != dora:
      said = 'missing' if dora else f'there, but not by {CONFIG_FILE}'
      problems.append(f'{name}: {_MAGNITUDE[1:]} is {said}')
    elif m is not None and len(m) != len(b):
      problems.append(f'{name}: B {b.shape} and magnitude {m.shape} do not fit')
    elif not all(np.isfinite(x).all() for x in parts.values()):
      problems.append(f'{name}: not finite')
    else:
      factors[name] = (a, np.ascontiguousarray(b.T))
      if m is not None:
        magnitudes[name] = m
  if problems or not factors:
    raise ModelError(f'{where}: {few(problems) or "no adapter in it"}')
  return LoadedAdapter(spec, factors, base, carried, magnitudes)


def equals(loaded: LoadedAdapter, tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether an adapter as read is that of `to_tensors`, bit for bit."""
  again = {}
  for name, (a, b) in loaded.factors.items():
    again[f'{PREFIX}{name}.lora_A.weight'] = a
    again[f'{PREFIX}{name}.lora_B.weight'] = b.T
  for name, m in loaded.magnitudes.items():
    again[f'{PREFIX}{name}{_MAGNITUDE}'] = m
  return again.keys() == tensors.keys() and all(
    np.array_equal(again[key], tensors[key]) for key in tensors
  )


def fill(
  loaded: LoadedAdapter,
  frozen: Any,
  trainable: Any,
  names: Mapping[str, tuple[str, ...]],
) -> Any:
  """The trainable tree with an adapter's factors in it.

  Args:
    loaded: from `load_adapter`.
    frozen: from `lora.split` by the same placement.
    trainable: from the same split; shapes suffice.
    names: {path: module names}.

  Raises:
    ModelError: modules or ranks that the two sides don't share.
  """
  left = dict(loaded.factors)
  problems = []
  filled: dict[str, Adapter] = {}
  for path, fixed, adapter in _adapted(frozen, trainable):
    a = np.zeros(adapter.a.shape, np.float32)
    b = np.zeros(adapter.b.shape, np.float32)
    m = None if adapter.m is None else np.zeros(adapter.m.shape, np.float32)
    stack = fixed.scale.shape
    for i, (name, rank) in enumerate(
      zip(names[path], fixed.ranks, strict=True)
    ):
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
        m[at] = loaded.magnitudes[name]
    filled[path] = jax.tree.map(jnp.asarray, Adapter(a, b, m))
  if left:
    problems.append(f'factors of modules that are not targets: {few([*left])}')
  problems += [
    f'it was made on another {name}, which it carries along'
    for path, fixed, _ in _adapted(frozen, trainable)
    for name in names[path]
    if name in loaded.carried and _differs(loaded.carried[name], fixed.w)
  ]
  if problems:
    raise ModelError(f'adapter does not fit the model: {few(problems)}')
  return jax.tree_util.tree_map_with_path(
    lambda path, _: filled[path_of(path)],
    trainable,
    is_leaf=lambda x: isinstance(x, Adapter),
  )


def _differs(carried: TensorRef, w: Any) -> bool:
  """Whether a base weight that PEFT saved along is not the model's."""
  if not isinstance(w, jax.Array) or not w.is_fully_addressable:
    return False  # shapes only, or cut across hosts: not to be compared here
  theirs = carried.read().T.astype(w.dtype)
  return not np.array_equal(theirs, np.asarray(w))


def placement(
  loaded: LoadedAdapter, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Placement]:
  """The adapter's {module name: rank and scale} on a model of these names.

  Raises:
    ModelError: a rank that is not that of the factors, so that nobody makes
      arrays of a size which is but written down.
  """
  flat = [name for of_stack in names.values() for name in of_stack]
  try:
    placed = resolve(loaded.spec, flat, strict=False)
  except ValueError as error:
    raise ModelError(f'adapter does not fit the model: {error}') from None
  ranks = {name: a.shape[0] for name, (a, _) in loaded.factors.items()}
  problems = [
    f'{name} has rank {place.rank} by {CONFIG_FILE}, but {ranks.get(name, 0)} in'
    f' {WEIGHTS_FILE}'
    for name, place in placed.items()
    if place.rank != ranks.get(name, 0)
  ]
  if problems:
    raise ModelError(f'adapter does not fit the model: {few(problems)}')
  return placed


def _adapted(frozen: Any, trainable: Any):
  """(path, Fixed, Adapter) of each adapted leaf, in tree order."""
  is_fixed = lambda x: isinstance(x, Fixed)  # noqa: E731
  is_adapter = lambda x: isinstance(x, Adapter)  # noqa: E731
  fixed = [
    (path_of(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      frozen, is_leaf=is_fixed
    )
    if is_fixed(leaf)
  ]
  adapters = jax.tree.leaves(trainable, is_leaf=is_adapter)
  for (path, leaf), adapter in zip(fixed, adapters, strict=True):
    yield path, leaf, adapter
