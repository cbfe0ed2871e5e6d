"""config.json of a Hugging Face model directory.

Checked against transformers 5.23. The file is untrusted input: a key that
changes the maths has a supported value or is refused, by name.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_train.errors import ModelError
from lorax_train.formats import quant_config
from lorax_train.formats.jsonfile import read_object
from lorax_train.models.params import DecoderConfig, RopeScaling

MODEL_TYPES = ('mistral', 'llama')


def read_config(directory: Path) -> DecoderConfig:
  """config.json of transformers v4 or v5 as our configuration.

  Raises:
    ModelError: lists all missing keys and unsupported values at once.
  """
  path = directory / 'config.json'
  return config_from_hf(read_object(path, ': is this a model?'), str(path))


def config_from_hf(
  raw: Mapping[str, Any], where: str = 'config.json'
) -> DecoderConfig:
  """The mapping in config.json as our configuration; see `read_config`."""
  problems = _unsupported(raw)
  sizes: dict[str, Any] = {}
  for ours, theirs in {
    'vocab': 'vocab_size',
    'hidden': 'hidden_size',
    'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'mlp': 'intermediate_size',
  }.items():
    sizes[ours] = _positive_int(raw, theirs, problems)
  heads = sizes['heads']
  kv_heads = _positive_int(
    raw, 'num_key_value_heads', problems, _kv_heads_default(raw, heads)
  )
  if heads % kv_heads:
    problems.append(
      f'num_attention_heads {heads} is no multiple of num_key_value_heads'
      f' {kv_heads}'
    )
  head_dim = _positive_int(raw, 'head_dim', problems, sizes['hidden'] // heads)
  if head_dim % 2:
    problems.append(f'head_dim {head_dim} is odd: rotary pairs need it even')
  theta, scaling = _rope(raw, problems)
  window = _window(raw, problems)
  norm_eps = _positive(raw, 'rms_norm_eps', problems, 1e-6)
  init_std = _positive(raw, 'initializer_range', problems, 0.02)
  tied = raw.get('tie_word_embeddings') or False
  if not isinstance(tied, bool):
    problems.append(f'tie_word_embeddings is {tied!r}, not true or false')
  cfg = DecoderConfig(
    **sizes,
    kv_heads=kv_heads,
    head_dim=head_dim,
    norm_eps=norm_eps,
    rope_theta=theta,
    rope_scaling=scaling,
    window=window,
    tied=tied,
    init_std=init_std,
  )
  quant = quant_config.stored(raw, cfg, problems)
  if problems:
    raise ModelError(f'{where}: {"; ".join(problems)}')
  return dataclasses.replace(cfg, quant=quant)


def _positive_int(
  raw: Mapping[str, Any], key: str, problems: list[str], default: int = 0
) -> int:
  """A size; an absent one with no default is reported and becomes 1."""
  value = raw.get(key)
  if value is None:
    value = default
    if not default:
      problems.append(f'{key} is missing')
  elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
    problems.append(f'{key} is {value!r}, not a positive integer')
    value = 0
  return value or 1


def _positive(
  raw: Mapping[str, Any], key: str, problems: list[str], default: float
) -> float:
  """A number above 0; an absent one is the default."""
  value = raw.get(key, default)
  if _is_positive(value):
    return float(value)
  problems.append(f'{key} is {value!r}, not a positive number')
  return default


def _is_positive(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and 0 < value <= sys.float_info.max
  )


def _kv_heads_default(raw: Mapping[str, Any], heads: int) -> int:
  """null is as many as heads; Mistral's class default is another."""
  absent = 'num_key_value_heads' not in raw
  return 8 if absent and raw.get('model_type') == 'mistral' else heads


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
  """Keys that change the maths, with values that we don't compute."""
  problems = []
  kind = raw.get('model_type')
  if kind not in MODEL_TYPES:
    problems.append(
      f'model_type {kind!r} is not supported; supported:'
      f' {", ".join(MODEL_TYPES)}'
    )
  act = raw.get('hidden_act', 'silu')
  if act not in ('silu', 'swish'):
    problems.append(f'hidden_act {act!r} is not supported; supported: silu')
  for key in ('attention_bias', 'mlp_bias'):
    if raw.get(key):
      problems.append(f'{key} is not supported')
  full = _window(raw, []) is None
  wanted = 'full_attention' if full else 'sliding_attention'
  types = raw.get('layer_types') or []
  types = types if isinstance(types, list) else [types]
  odd = sorted({str(t) for t in types} - {wanted})
  if odd:
    problems.append(f'layer_types {odd} beside {wanted} are not supported')
  return problems


def _window(raw: Mapping[str, Any], problems: list[str]) -> int | None:
  """The sliding window; Llama has none, Mistral's class default is 4096."""
  null = raw.get('sliding_window', 4096) is None
  if null or raw.get('model_type') != 'mistral':
    return None
  return _positive_int(raw, 'sliding_window', problems, 4096)


def _rope(
  raw: Mapping[str, Any], problems: list[str]
) -> tuple[float, RopeScaling | None]:
  """theta and scaling from v5's rope_parameters or v4's two keys."""
  rope = raw.get('rope_scaling') or raw.get('rope_parameters') or {}
  if not isinstance(rope, dict) or any(
    isinstance(v, dict) for v in rope.values()
  ):
    problems.append(f'rope parameters {rope!r} are not one set for all layers')
    return 1.0, None
  # As in transformers: theta counts where it stands inside, the original
  # length where it stands outside.
  rope = {'rope_theta': raw.get('rope_theta', 10000.0), **rope}
  original = 'original_max_position_embeddings'
  if original in raw:
    rope[original] = raw[original]
  partial = rope.get('partial_rotary_factor', raw.get('partial_rotary_factor'))
  if partial not in (None, 1):
    problems.append(f'partial_rotary_factor {partial!r} is not supported')
  theta = _positive(rope, 'rope_theta', problems, 10000.0)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return theta, None
  keys = {
    'linear': {'factor': 'factor'},
    'llama3': {
      'factor': 'factor',
      'low_freq_factor': 'low_freq_factor',
      'high_freq_factor': 'high_freq_factor',
      'original_max_position_embeddings': 'original_max_positions',
    },
  }.get(str(kind))
  if keys is None:
    problems.append(
      f'rope_type {kind!r} is not supported; supported: default, linear, llama3'
    )
    return theta, None
  missing = [k for k in keys if not _is_positive(rope.get(k))]
  if missing:
    problems.append(
      f'rope_type {kind} wants positive numbers for {", ".join(missing)}'
    )
    return theta, None
  scaling = RopeScaling(kind, **{v: rope[k] for k, v in keys.items()})
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    problems.append('low_freq_factor is not below high_freq_factor')
  return theta, scaling
