"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors.

Names and shapes as PEFT 0.21 writes them: A is (r, in), B is (out, r), DoRA's
magnitude (out,), and what is trained whole as Hugging Face stores it. What is
in the JSON is peft_config's, what the tensors are called peft_tensors'.

An adapter that began from the base (PiSSA, OLoRA) is B A - B0 A0 on it. It is
written as [B, -B0] [A; A0], of twice the rank, so that it fits the base as it
is; PEFT alone would need the base that it changed.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lorax_train.errors import ModelError, one_line
from lorax_train.formats import peft_tensors, safetensors
from lorax_train.formats.peft_config import CONFIG_FILE, read_config, to_config
from lorax_train.formats.peft_tensors import (
  EMBEDDING,
  HEAD,
  MAGNITUDE,
  PREFIX,
  ROWS,
  WEIGHTS_FILE,
  WHOLE,
  LoadedAdapter,
)
from lorax_train.formats.peft_trees import fill, to_tensors
from lorax_train.formats.safetensors import few
from lorax_train.lora import LoraSpec, Placement, Whole, resolve, split
from lorax_train.lora.init import FROM_BASE
from lorax_train.lora.matching import flat, place
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig

__all__ = [
  'LoadedAdapter',
  'attach',
  'equals',
  'fill',
  'load_adapter',
  'on_model',
  'on_tied',
  'placement',
  'save_adapter',
  'to_tensors',
]

Names = Mapping[str, tuple[str, ...]]
_NONE: Mapping[str, Any] = MappingProxyType({})


def save_adapter(
  directory: str | os.PathLike,
  frozen: Any,
  trainable: Any,
  names: Names,
  spec: LoraSpec,
  base: str,
  others: Names = _NONE,
  tied: bool = False,
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors.

  Args:
    directory: made where absent.
    frozen: from `lora.split`; its weights may be shapes only.
    trainable: the factors, and what is trained whole.
    names: {path: module names}, as `lora.split` had them.
    spec: as `lora.split` had it.
    base: what base_model_name_or_path shall say.
    others: {path: module names}, as `lora.split` had them.
    tied: the head is the embedding, one leaf.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = to_tensors(frozen, trainable, {**names, **others})
  heads = _heads(tensors) if tied else {}
  tensors |= heads
  save_file(tensors, directory / WEIGHTS_FILE, metadata={'format': 'pt'})
  config = to_config(_written(spec), names, base, others, tied=bool(heads))
  text = json.dumps(config, indent=2, sort_keys=True)
  (directory / CONFIG_FILE).write_text(text + '\n', 'utf-8')


def _heads(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The part of a head that is the embedding, transposed, as PEFT wants it.

  Trained rows are not in it: of those PEFT ties by itself.
  """
  heads = {}
  for key, array in tensors.items():
    if f'{EMBEDDING}.lora_embedding' in key:
      half = 'B' if key.endswith('A') else 'A'
      heads[peft_tensors.factor_key(HEAD, half)] = array.T.copy()
    elif key.endswith(f'{EMBEDDING}{WHOLE}'):
      heads[f'{PREFIX}{HEAD}{WHOLE}'] = array.copy()
  return heads


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
      know, or numbers that are not finite or don't fit each other.
  """
  directory = Path(directory)
  spec, base, tied = read_config(directory / CONFIG_FILE)
  where = directory / WEIGHTS_FILE
  found = peft_tensors.find(safetensors.open_file(where))
  names = [*found.whole, *found.rows]
  if found.unknown:
    raise ModelError(
      f'{where}: not parts of a LoRA adapter: {few(found.unknown)}'
    )
  if not found.factors:
    raise ModelError(f'{where}: no adapter in it')
  try:
    # Of a name that is in no such list, PEFT would read nothing.
    whole = resolve(spec, [*found.factors], False, names) if names else {}
  except ValueError as error:
    raise ModelError(f'{where}: {one_line(error)}') from None
  stray = [
    n
    for n in names
    if not isinstance(whole.get(n), Whole) and not (tied and n == HEAD)
  ]
  if stray:
    raise ModelError(
      f'{where}: weights of modules that neither modules_to_save nor'
      f' trainable_token_indices name (of a block, name its modules):'
      f' {few(stray)}'
    )
  problems: list[str] = []
  factors, magnitudes = {}, {}
  for name, refs in found.factors.items():
    parts = {k: ref.read().astype(np.float32) for k, ref in refs.items()}
    problem = _disagreement(parts, 'dora' in spec.variants)
    if problem:
      problems.append(f'{name}: {problem}')
      continue
    factors[name] = (parts['A'], np.ascontiguousarray(parts['B'].T))
    if 'm' in parts:
      magnitudes[name] = parts['m']
  trained = {
    name: ref.read().astype(np.float32) for name, ref in found.whole.items()
  }
  for name, ref in found.rows.items():
    tokens = _tokens(spec, name)
    if len(tokens) != ref.shape[0]:
      problems.append(f'{name}: {ref.shape[0]} rows of {len(tokens)} tokens')
      continue
    trained[name] = ref.read().astype(np.float32)[np.argsort(tokens)]
  problems += [
    f'{name}: not finite'
    for name, x in trained.items()
    if not np.isfinite(x).all()
  ]
  if problems:
    raise ModelError(f'{where}: {few(problems)}')
  return LoadedAdapter(
    spec, factors, base, found.carried, magnitudes, trained, tied
  )


def _disagreement(parts: Mapping[str, np.ndarray], dora: bool) -> str:
  """What is wrong with the factors of a module; '' for nothing."""
  a, b, m = (parts.get(part) for part in ('A', 'B', 'm'))
  if a is None or b is None:
    return f'lora_{"B" if b is None else "A"} is missing'
  if a.shape[0] != b.shape[1]:
    return f'A {a.shape} and B {b.shape} do not fit'
  if (m is not None) != dora:
    said = 'missing' if dora else f'there, but not by {CONFIG_FILE}'
    return f'{MAGNITUDE[1:]} is {said}'
  if m is not None and len(m) != len(b):
    return f'B {b.shape} and magnitude {m.shape} do not fit'
  if not all(np.isfinite(x).all() for x in parts.values()):
    return 'not finite'
  return ''


def _tokens(spec: LoraSpec, name: str) -> tuple[int, ...]:
  """The tokens whose rows of an embedding are trained."""
  tables = spec.trainable_token_indices
  return next(t for table, t in tables.items() if name.endswith(table))


def on_tied(loaded: LoadedAdapter) -> LoadedAdapter:
  """The adapter on a base whose head is its embedding, where it says so too.

  PEFT writes the head's factors beside the embedding's, which they equal.

  Raises:
    ModelError: they don't.
  """
  factors, trained = dict(loaded.factors), dict(loaded.trained)
  embedding = next(
    (n for n in (*factors, *trained) if n.endswith(EMBEDDING)), None
  )
  if not loaded.tied or embedding is None:
    return loaded
  # DoRA scales columns, each side its own; patterns are looked up by name.
  same = HEAD not in loaded.magnitudes
  if embedding in factors:
    same = same and (
      place(loaded.spec, HEAD).scale == place(loaded.spec, embedding).scale
    )
  if HEAD in factors and embedding in factors:
    (a, b), (head_a, head_b) = factors[embedding], factors.pop(HEAD)
    same = same and np.array_equal(a, head_b) and np.array_equal(b, head_a)
  if HEAD in trained and embedding in trained:
    same = same and np.array_equal(trained.pop(HEAD), trained[embedding])
  if not same:
    raise ModelError(
      f'adapter does not fit the model: {HEAD} is tied to {embedding}, but is'
      ' adapted otherwise: by other numbers, another scale or DoRA'
    )
  return loaded._replace(factors=factors, trained=trained)


def equals(loaded: LoadedAdapter, tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether an adapter as read is that of `to_tensors`, bit for bit."""
  left = dict(tensors)

  def same(key: str, array: np.ndarray) -> bool:
    return key in left and np.array_equal(left.pop(key), array)

  def same_factor(name: str, half: str, array: np.ndarray) -> bool:
    keys = [peft_tensors.factor_key(name, half, e) for e in (False, True)]
    return any(same(key, array) for key in keys if key in left)

  return (
    all(
      same_factor(name, 'A', a) and same_factor(name, 'B', b.T)
      for name, (a, b) in loaded.factors.items()
    )
    and all(
      same(f'{PREFIX}{name}{MAGNITUDE}', m)
      for name, m in loaded.magnitudes.items()
    )
    and all(
      any(same(f'{PREFIX}{name}{end}', x) for end in (WHOLE, ROWS))
      for name, x in loaded.trained.items()
    )
    and not left
  )


def on_model(
  loaded: LoadedAdapter, cfg: DecoderConfig
) -> tuple[DecoderConfig, LoadedAdapter, dict[str, Placement | Whole]]:
  """How an adapter lies on a model.

  Returns:
    The model as the adapter sees it (a head that its files tie to the embedding
    is a leaf of its own, where the adapter is of one of the two alone), the
    adapter, and what is trained of each module.

  Raises:
    ModelError: it does not fit.
  """
  rows = loaded.spec.trainable_token_indices
  if any(name.endswith(HEAD) for name in rows):
    raise ModelError(f'rows of {HEAD} alone are trained: not supported')
  if cfg.tied and loaded.unties():
    if rows:
      raise ModelError(
        f'rows of {EMBEDDING} are trained beside a {HEAD} that is tied to it and'
        ' adapted: not supported'
      )
    cfg = dataclasses.replace(cfg, tied=False)
  if cfg.tied:
    loaded = on_tied(loaded)
  names, norms = params_lib.module_names(cfg), params_lib.norm_names(cfg)
  return cfg, loaded, placement(loaded, names, norms)


def attach(
  loaded: LoadedAdapter,
  placed: Mapping[str, Placement | Whole],
  cfg: DecoderConfig,
  params: Any,
) -> tuple[Any, Any]:
  """(frozen, trainable) of a model under an adapter.

  Args:
    loaded: the adapter, as `on_model` gives it.
    placed: what is trained of each module, likewise.
    cfg: of the model, likewise.
    params: its weights.

  Raises:
    ModelError: the adapter does not fit them.
  """
  names, norms = params_lib.module_names(cfg), params_lib.norm_names(cfg)
  try:
    frozen, trainable = split(
      jax.random.key(0), params, placed, names, params_lib.layout(cfg), norms
    )
  except ValueError as error:
    raise ModelError(f'adapter does not fit the model: {error}') from None
  return frozen, fill(loaded, frozen, trainable, {**names, **norms})


def placement(
  loaded: LoadedAdapter, names: Names, others: Names = _NONE
) -> dict[str, Placement | Whole]:
  """The adapter's {module name: what is trained} on a model of these names.

  Raises:
    ModelError: a rank that is not that of the factors, so that nobody makes
      arrays of a size which is but written down.
  """
  try:
    placed = resolve(loaded.spec, flat(names), False, flat(others))
  except ValueError as error:
    raise ModelError(f'adapter does not fit the model: {error}') from None
  ranks = {name: a.shape[0] for name, (a, _) in loaded.factors.items()}
  problems = [
    f'{name} has rank {place.rank} by {CONFIG_FILE}, but {ranks.get(name, 0)} in'
    f' {WEIGHTS_FILE}'
    for name, place in placed.items()
    if isinstance(place, Placement) and place.rank != ranks.get(name, 0)
  ]
  if problems:
    raise ModelError(f'adapter does not fit the model: {few(problems)}')
  return placed
