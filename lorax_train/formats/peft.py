"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors.

Names, shapes and JSON as PEFT 0.21 writes them; the JSON is a small subset
that older PEFT, vLLM and llama.cpp read too. A is (r, in), B is (out, r).
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax_train.errors import ModelError, one_line
from lorax_train.formats import safetensors
from lorax_train.formats.safetensors import few
from lorax_train.lora import (
  Adapter,
  Fixed,
  LoraSpec,
  Placement,
  path_of,
  resolve,
)
from lorax_train.lora.spec import ALL_LINEAR, target_list

PREFIX = 'base_model.model.'
CONFIG_FILE = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'

# Settings under which the adapter computes something that we don't, and the
# value that means "off" where it is not None, {} or False.
_MUST_BE_OFF: Mapping[str, Any] = {
  'use_dora': False,
  'use_qalora': False,
  'use_bdlora': None,
  'lora_bias': False,
  'bias': 'none',
  'fan_in_fan_out': False,
  'modules_to_save': None,
  'trainable_token_indices': None,
  'target_parameters': None,
  'layer_replication': None,
  'layers_pattern': None,
  'alora_invocation_tokens': None,
  'arrow_config': None,
}

_KEY = re.compile(rf'{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight')


class LoadedAdapter(NamedTuple):
  """A PEFT adapter as read.

  Attributes:
    spec: what it adapts, by PEFT's rules.
    factors: {module name: (A [r, in], B [r, out])} float32.
    base: base_model_name_or_path, '' if not given.
  """

  spec: LoraSpec
  factors: dict[str, tuple[np.ndarray, np.ndarray]]
  base: str


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
  config = to_config(spec, names, base)
  text = json.dumps(config, indent=2, sort_keys=True)
  (directory / CONFIG_FILE).write_text(text + '\n', 'utf-8')


def to_tensors(
  frozen: Any, trainable: Any, names: Mapping[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
  """{PEFT key: array} in float32, each of its module's true rank."""
  tensors = {}
  for path, fixed, adapter in _adapted(frozen, trainable):
    r, n_in = adapter.a.shape[-2:]
    a = np.asarray(adapter.a, np.float32).reshape(-1, r, n_in)
    b = np.asarray(adapter.b, np.float32).reshape(-1, r, fixed.w.shape[-1])
    for name, rank, a_i, b_i in zip(
      names[path], fixed.ranks, a, b, strict=True
    ):
      if rank:
        key = f'{PREFIX}{name}'
        tensors[f'{key}.lora_A.weight'] = np.ascontiguousarray(a_i[:rank])
        tensors[f'{key}.lora_B.weight'] = np.ascontiguousarray(b_i[:rank].T)
  return tensors


def to_config(
  spec: LoraSpec, names: Mapping[str, tuple[str, ...]], base: str
) -> dict[str, Any]:
  """adapter_config.json of an adapter made by this spec.

  The first pattern that matches wins, but PEFT sorts the patterns when it
  writes them again. Where that would change a rank or a scale, each module is
  named in full instead.
  """
  flat = [name for of_stack in names.values() for name in of_stack]
  patterns: dict[str, Any] = {
    'rank_pattern': dict(sorted(spec.rank_pattern.items())),
    'alpha_pattern': dict(sorted(spec.alpha_pattern.items())),
  }
  placed = resolve(spec, flat, strict=False)
  by_sorted = dataclasses.replace(spec, **patterns)
  if resolve(by_sorted, flat, strict=False) != placed:
    root = math.sqrt if spec.variant == 'rslora' else float
    patterns = {
      'rank_pattern': {n: p.rank for n, p in placed.items()},
      'alpha_pattern': {n: p.scale * root(p.rank) for n, p in placed.items()},
    }
  return {
    **patterns,
    'base_model_name_or_path': base,
    'bias': 'none',
    'exclude_modules': _to_targets(spec.exclude),
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'layers_to_transform': list(spec.layers_to_transform) or None,
    'lora_alpha': _plain(spec.alpha),
    'lora_dropout': spec.dropout,
    'modules_to_save': None,
    'peft_type': 'LORA',
    'r': spec.rank,
    'target_modules': _to_targets(spec.targets),
    'task_type': 'CAUSAL_LM',
    'use_dora': False,
    'use_rslora': spec.variant == 'rslora',
  }


def load_adapter(directory: str | os.PathLike) -> LoadedAdapter:
  """Reads an adapter directory, PEFT's or ours.

  Raises:
    ModelError: not a LoRA adapter, a setting we don't compute, keys we don't
      know, or factors that are not finite or don't fit each other.
  """
  directory = Path(directory)
  spec, base = _read_config(directory / CONFIG_FILE)
  refs = safetensors.open_file(directory / WEIGHTS_FILE)
  halves: dict[str, dict[str, np.ndarray]] = {}
  unknown = []
  for key, ref in refs.items():
    if key.endswith('.base_layer.weight'):
      continue  # PEFT adds the base's head where the head is a target
    found = _KEY.fullmatch(key)
    if found is None or len(ref.shape) != 2:
      unknown.append(f'{key} {ref.shape}')
      continue
    half = ref.read().astype(np.float32)
    halves.setdefault(found[1], {})[found[2]] = half
  where = directory / WEIGHTS_FILE
  if unknown:
    raise ModelError(f'{where}: not LoRA factors of linears: {few(unknown)}')
  problems: list[str] = []
  factors = {}
  for name, pair in halves.items():
    a, b = pair.get('A'), pair.get('B')
    if a is None or b is None:
      problems.append(f'{name}: lora_{"B" if b is None else "A"} is missing')
    elif a.shape[0] != b.shape[1]:
      problems.append(f'{name}: A {a.shape} and B {b.shape} do not fit')
    elif not (np.isfinite(a).all() and np.isfinite(b).all()):
      problems.append(f'{name}: not finite')
    else:
      factors[name] = (a, np.ascontiguousarray(b.T))
  if problems or not factors:
    raise ModelError(f'{where}: {few(problems) or "no adapter in it"}')
  return LoadedAdapter(spec, factors, base)


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
    filled[path] = Adapter(jnp.asarray(a), jnp.asarray(b))
  if left:
    problems.append(f'factors of modules that are not targets: {few([*left])}')
  if problems:
    raise ModelError(f'adapter does not fit the model: {few(problems)}')
  return jax.tree_util.tree_map_with_path(
    lambda path, _: filled[path_of(path)],
    trainable,
    is_leaf=lambda x: isinstance(x, Adapter),
  )


def placement(
  loaded: LoadedAdapter, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Placement]:
  """The adapter's {module name: rank and scale} on a model of these names."""
  flat = [name for of_stack in names.values() for name in of_stack]
  try:
    return resolve(loaded.spec, flat, strict=False)
  except ValueError as error:
    raise ModelError(f'adapter does not fit the model: {error}') from None


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


def _read_config(path: Path) -> tuple[LoraSpec, str]:
  try:
    raw = json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    raise ModelError(f'{path}: no such file: is this an adapter?') from None
  except ValueError as error:
    raise ModelError(f'{path}: not JSON: {one_line(error)}') from None
  if not isinstance(raw, dict) or raw.get('peft_type') != 'LORA':
    raise ModelError(f'{path}: peft_type is not LORA')
  on = [
    f'{key}={raw[key]!r}'
    for key, off in _MUST_BE_OFF.items()
    if raw.get(key) not in (off, None, {}, [])
  ]
  if on:
    raise ModelError(f'{path}: settings that are not supported: {few(on)}')
  layers = raw.get('layers_to_transform')
  try:
    spec = LoraSpec(
      targets=_from_targets(raw.get('target_modules') or ['q_proj', 'v_proj']),
      rank=raw.get('r', 8),
      alpha=raw.get('lora_alpha', 8),
      dropout=raw.get('lora_dropout', 0.0),
      variant='rslora' if raw.get('use_rslora') else 'lora',
      exclude=_from_targets(raw.get('exclude_modules') or ''),
      rank_pattern=raw.get('rank_pattern') or {},
      alpha_pattern=raw.get('alpha_pattern') or {},
      layers_to_transform=tuple(
        [layers] if isinstance(layers, int) else layers or ()
      ),
    )
  except (ValueError, TypeError) as error:
    raise ModelError(f'{path}: {one_line(error)}') from None
  return spec, raw.get('base_model_name_or_path') or ''


def _to_targets(text: str) -> str | list[str] | None:
  """Our one string as PEFT's list, regex or None."""
  if text.strip() == ALL_LINEAR:
    return ALL_LINEAR
  listed = target_list(text)
  if listed is None:
    return text
  return sorted(listed) or None


def _from_targets(value: str | list[str]) -> str:
  """PEFT's list or regex as our one string."""
  if not isinstance(value, str):
    # Entries of a list are literal; one that is no name can match nothing.
    return ','.join(sorted(v for v in value if target_list(v)))
  if value.lower() == ALL_LINEAR:
    return ALL_LINEAR
  # PEFT reads any other string as a regex, also one that looks like a name.
  return f'(?:{value})' if target_list(value) else value


def _plain(number: float) -> int | float:
  """16.0 -> 16: PEFT and llama.cpp expect an integer where it is one."""
  return int(number) if math.isclose(number, int(number)) else number
