"""An adapter as plain factors: ranks and scales settled for each module.

Read from any directory of PEFT's whose settings say no more than that, and
written so that one rank and a scale of 1 are all that there is to know.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lorax_train.errors import ModelError, one_line
from lorax_train.formats import hf_save, peft_tensors, safetensors
from lorax_train.formats.peft_config import CONFIG_FILE, read_config, to_config
from lorax_train.formats.peft_tensors import WEIGHTS_FILE
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.formats.whole import whole
from lorax_train.lora import LoraSpec, Placement, adapted, resolve


class Plain(NamedTuple):
  """What A, B and a scale a module say.

  Attributes:
    directory: where it lies.
    config: adapter_config.json.
    spec: the same, by PEFT's rules.
    factors: {module: (A, B)} float32, as PEFT stores them.
    embeddings: the modules that are no linears.
    dtypes: what they were stored in.
    carried: {module: the base's own weight, saved along}.
    placed: {module: rank and scale}.
  """

  directory: Path
  config: Mapping[str, Any]
  spec: LoraSpec
  factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
  embeddings: frozenset[str]
  dtypes: frozenset[str]
  carried: Mapping[str, TensorRef]
  placed: Mapping[str, Placement]

  @property
  def rank(self) -> int:
    """The widest of all."""
    return max(place.rank for place in self.placed.values())


def read(directory: Path, config: Mapping[str, Any]) -> Plain:
  """The adapter of a directory whose settings are plain ones.

  Raises:
    ModelError: tensors that are no factors, not whole or not finite, or not
      those that adapter_config.json speaks of.
  """
  spec = read_config(directory / CONFIG_FILE).spec
  where = directory / WEIGHTS_FILE
  found = peft_tensors.find(safetensors.open_file(where))
  problems = [
    f'{what} is no factor of a module'
    for what in (*found.unknown, *found.whole, *found.rows)
  ]
  factors = {}
  for name, refs in found.factors.items():
    if {*refs} == {'A', 'B'}:
      a, b = (refs[side].read().astype(np.float32) for side in 'AB')
      factors[name] = a, b
      if a.shape[0] != b.shape[1]:
        problems.append(f'{name}: A {a.shape} and B {b.shape} do not fit')
      elif not (np.isfinite(a).all() and np.isfinite(b).all()):
        problems.append(f'{name}: not finite')
    elif 'm' in refs:
      problems.append(f'{name}: a magnitude is no factor of a module')
    else:
      problems.append(f'{name}: lora_{"AB"["A" in refs]} is missing')
  if problems or not factors:
    raise ModelError(f'{where}: {few(problems) or "no adapter in it"}')
  try:
    placed = adapted(resolve(spec, [*factors], strict=False))
  except ValueError as error:
    raise ModelError(f'{where}: {one_line(error)}') from None
  for name, (a, _) in factors.items():
    place = placed.get(name)
    if place is None:
      problems.append(f'{name}: not a target by {CONFIG_FILE}')
    elif place.rank != a.shape[0]:
      problems.append(
        f'{name}: rank {a.shape[0]}, by {CONFIG_FILE} {place.rank}'
      )
  if problems:
    raise ModelError(f'{where}: {few(problems)}')
  dtypes = frozenset(
    str(ref.dtype) for refs in found.factors.values() for ref in refs.values()
  )
  return Plain(
    directory,
    config,
    spec,
    factors,
    frozenset(found.embeddings),
    dtypes,
    found.carried,
    placed,
  )


def bake(plain: Plain) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(adapter_config.json, tensors) in which one scale of 1 is all there is.

  Raises:
    ModelError: a scale takes B past what float32 holds.
  """
  rank, names = plain.rank, tuple(sorted(plain.factors))
  tensors, over = {}, []
  for name in names:
    a, b = plain.factors[name]
    wide_a = np.zeros((rank, a.shape[1]), np.float32)
    wide_b = np.zeros((b.shape[0], rank), np.float32)
    wide_a[: a.shape[0]] = a
    with np.errstate(over='ignore'):  # what overflows is named
      wide_b[:, : b.shape[1]] = b.astype(np.float64) * plain.placed[name].scale
    if not np.isfinite(wide_b).all():
      over.append(name)
    embedding = name in plain.embeddings
    for half, factor in (('A', wide_a), ('B', wide_b)):
      tensors[peft_tensors.factor_key(name, half, embedding)] = factor
  if over:
    raise ModelError(
      f'{plain.directory / WEIGHTS_FILE}: B times its scale is past float32 in'
      f' {few(over)}: merge the adapter into the base instead'
    )
  # Each module is named in full: PEFT starts an adapter of its own for every
  # other that a target matches, and the others do not read targets at all, so
  # nobody needs factors of zero.
  spec = LoraSpec(
    ','.join(names), rank=rank, alpha=rank, dropout=plain.spec.dropout
  )
  base = plain.config.get('base_model_name_or_path') or ''
  return to_config(spec, {'': names}, base), tensors


def write(
  out: Path,
  source: Path,
  config: Mapping[str, Any] | None,
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Writes an adapter directory in one move.

  Args:
    out: does not exist, or is empty.
    source: the directory whose tokenizer and README.md come along.
    config: adapter_config.json; None to copy it and the tensors.
    tensors: {key: array}.

  Raises:
    OSError: disk full, no rights; nothing is left behind.
  """
  with whole(out, 'adapter not written') as building:
    copied = ['README.md', *hf_save.COPIED]
    if config is None:
      copied += [CONFIG_FILE, WEIGHTS_FILE]
    else:
      save_file(dict(tensors), building / WEIGHTS_FILE, {'format': 'pt'})
      words = json.dumps(config, indent=2, sort_keys=True) + '\n'
      (building / CONFIG_FILE).write_text(words, 'utf-8')
    for name in copied:
      if (source / name).is_file():
        shutil.copyfile(source / name, building / name)
