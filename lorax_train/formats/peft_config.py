"""adapter_config.json: a LoraSpec as PEFT 0.21 writes it, and back.

What we write is a small subset that older PEFT, vLLM and llama.cpp read too.
What we read is untrusted: a setting that changes what the adapter computes is
one that we compute, or it is refused by name.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lorax_train.errors import ModelError, one_line
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.peft_tensors import EMBEDDING, HEAD
from lorax_train.formats.safetensors import few
from lorax_train.lora import LoraSpec, adapted, resolve
from lorax_train.lora.matching import flat, place
from lorax_train.lora.spec import ALL_LINEAR, target_list

CONFIG_FILE = 'adapter_config.json'

# Settings under which the adapter computes something that we don't, and the
# value that means "off" where it is not None, {} or False.
MUST_BE_OFF: Mapping[str, Any] = {
  'use_qalora': False,
  'use_bdlora': None,
  'lora_bias': False,
  'bias': 'none',
  'fan_in_fan_out': False,
  'target_parameters': None,
  'layer_replication': None,
  'layers_pattern': None,
  'alora_invocation_tokens': None,
  'arrow_config': None,
  'kasa_config': None,
  'monteclora_config': None,
}
# Initialisations that take the adapter's first value out of the base weights:
# on load PEFT does so again, so A and B alone are not the adapter.
CHANGE_BASE = ('pissa', 'corda', 'olora', 'loftq', 'lora_ga')

# The keys we read, what kind they are, and what kind is in them.
_NUMBER = (int, float)
_NAMES = (str, list, type(None))
_KINDS: Mapping[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
  'r': ((int,), ()),
  'lora_alpha': (_NUMBER, ()),
  'lora_dropout': (_NUMBER, ()),
  'use_rslora': ((bool, type(None)), ()),
  'use_dora': ((bool, type(None)), ()),
  'target_modules': (_NAMES, (str,)),
  'exclude_modules': (_NAMES, (str,)),
  'rank_pattern': ((dict, type(None)), (int,)),
  'alpha_pattern': ((dict, type(None)), _NUMBER),
  'layers_to_transform': ((int, list, type(None)), (int,)),
  'modules_to_save': ((list, type(None)), (str,)),
  'trainable_token_indices': ((list, dict, type(None)), (int, list)),
  'ensure_weight_tying': ((bool, type(None)), ()),
  'base_model_name_or_path': ((str, type(None)), ()),
}


class Settings(NamedTuple):
  """What adapter_config.json says.

  Attributes:
    spec: what is adapted.
    base: base_model_name_or_path, '' if not given.
    tied: ensure_weight_tying: in a base whose head is its embedding, both are
      one leaf under the adapter too.
  """

  spec: LoraSpec
  base: str
  tied: bool


def to_config(
  spec: LoraSpec,
  names: Mapping[str, tuple[str, ...]],
  base: str,
  others: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
  tied: bool = False,
) -> dict[str, Any]:
  """adapter_config.json of an adapter made by this spec.

  The first pattern that matches wins, but PEFT sorts the patterns when it
  writes them again. Where that would change a rank or a scale, each module is
  named in full instead. So it is where a regex for targets also matches what
  takes no adapter: we pass over that, PEFT refuses.

  Args:
    spec: what is adapted.
    names: {path: module names} of what could be.
    base: what base_model_name_or_path shall say.
    others: {path: module names} of what takes no adapter.
    tied: see `Settings`.
  """
  every, rest = flat(names), flat(others)
  patterns: dict[str, Any] = {
    'rank_pattern': dict(sorted(spec.rank_pattern.items())),
    'alpha_pattern': dict(sorted(spec.alpha_pattern.items())),
  }
  placed = adapted(resolve(spec, every, strict=False))
  by_sorted = dataclasses.replace(spec, **patterns)
  embedding = next((n for n in placed if n.endswith(EMBEDDING)), None)
  if tied and embedding:
    # PEFT looks its rank and scale up under the head's own name.
    placed[HEAD] = placed[embedding]
  now = adapted(resolve(by_sorted, every, strict=False))
  if HEAD in placed and HEAD not in now:
    now[HEAD] = place(by_sorted, HEAD)
  if now != placed:
    root = math.sqrt if 'rslora' in spec.variants else float
    patterns = {
      'rank_pattern': {n: p.rank for n, p in placed.items()},
      'alpha_pattern': {n: p.scale * root(p.rank) for n, p in placed.items()},
    }
  targets = _to_targets(spec.targets)
  if target_list(spec.targets) is None and _hits_more(
    spec.targets, every, rest
  ):
    targets = sorted(n for n in placed if n in every)
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
    'modules_to_save': sorted(target_list(spec.modules_to_save) or []) or None,
    'peft_type': 'LORA',
    'r': spec.rank,
    'target_modules': targets,
    'task_type': 'CAUSAL_LM',
    **_to_tokens(spec),
    **({'ensure_weight_tying': True} if tied else {}),
    'use_dora': 'dora' in spec.variants,
    'use_rslora': 'rslora' in spec.variants,
  }


def _to_tokens(spec: LoraSpec) -> dict[str, Any]:
  tokens = {n: sorted(t) for n, t in spec.trainable_token_indices.items()}
  return {'trainable_token_indices': tokens} if tokens else {}


def read_config(path: Path) -> Settings:
  """PEFT's file or ours.

  Raises:
    ModelError: not of a LoRA adapter, or a setting that we don't compute.
  """
  raw = read_object(path, ': is this an adapter?')
  if raw.get('peft_type') != 'LORA':
    raise ModelError(f'{path}: peft_type is not LORA')
  on = [f'{key}={raw[key]!r}' for key in settings_on(raw, MUST_BE_OFF)]
  start = raw.get('init_lora_weights')
  if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
    on.append(f'init_lora_weights={start!r}, which changes the base')
  if on:
    raise ModelError(f'{path}: settings that are not supported: {few(on)}')
  odd = [
    f'{key}={raw[key]!r}'
    for key, (kind, inside) in _KINDS.items()
    if key in raw and not _is_of(raw[key], kind, inside)
  ]
  if odd:
    raise ModelError(f'{path}: values of the wrong kind: {few(odd)}')
  layers = raw.get('layers_to_transform')
  tokens = raw.get('trainable_token_indices') or {}
  tokens = {'embed_tokens': tokens} if isinstance(tokens, list) else tokens
  try:
    spec = LoraSpec(
      targets=_from_targets(raw.get('target_modules') or ['q_proj', 'v_proj']),
      rank=raw.get('r', 8),
      alpha=raw.get('lora_alpha', 8),
      dropout=raw.get('lora_dropout', 0.0),
      variant='+'.join(
        [v for v in ('rslora', 'dora') if raw.get(f'use_{v}')] or ['lora']
      ),
      exclude=_from_targets(raw.get('exclude_modules') or ''),
      rank_pattern=raw.get('rank_pattern') or {},
      alpha_pattern=raw.get('alpha_pattern') or {},
      layers_to_transform=tuple(
        [layers] if isinstance(layers, int) else layers or ()
      ),
      modules_to_save=','.join(raw.get('modules_to_save') or ()),
      trainable_token_indices={n: tuple(t) for n, t in tokens.items()},
    )
  except (ValueError, TypeError) as error:
    raise ModelError(f'{path}: {one_line(error)}') from None
  return Settings(
    spec,
    raw.get('base_model_name_or_path') or '',
    bool(raw.get('ensure_weight_tying')),
  )


def settings_on(raw: Mapping[str, Any], off: Mapping[str, Any]) -> list[str]:
  """Keys of `off` that a config sets to another value than that or none."""
  return [
    key
    for key, value in off.items()
    if raw.get(key) not in (value, None, False, {}, [])
  ]


def _is_of(
  value: Any, kind: tuple[type, ...], inside: tuple[type, ...]
) -> bool:
  if isinstance(value, bool):  # an int to Python, but not to us
    return bool in kind
  # Written so that NaN is none either.
  if isinstance(value, _NUMBER) and not abs(value) <= sys.float_info.max:
    return False
  held = value.values() if isinstance(value, dict) else value
  if isinstance(value, list | dict) and inside:
    return type(value) in kind and all(_is_of(v, inside, ()) for v in held)
  return isinstance(value, kind)


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
    return ','.join(sorted(v for v in value if target_list(v) == [v]))
  if value.lower() == ALL_LINEAR:
    return ALL_LINEAR
  # PEFT reads any other string as a regex, also one that looks like a name.
  return f'(?:{value})' if target_list(value) else value


def _hits_more(regex: str, names: Sequence[str], others: Sequence[str]) -> bool:
  """Whether it matches blocks of modules, or what takes no adapter."""
  parts = [name.split('.') for name in (*names, *others)]
  blocks = {'.'.join(p[:i]) for p in parts for i in range(1, len(p))}
  return any(re.fullmatch(regex, name) for name in (*blocks, *others))


def _plain(number: float) -> int | float:
  """16.0 -> 16: PEFT and llama.cpp expect an integer where it is one."""
  return int(number) if math.isclose(number, int(number)) else number
