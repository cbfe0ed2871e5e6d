"""quantization_config of a config.json, as bitsandbytes' checkpoints have it.

Checked against transformers 5.23. The files say what is quantised; where they
say nothing, `as_asked` says what the loader is to make of them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_train.errors import ConfigError
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, Quant

KINDS = ('nf4', 'int8')

# What of a 4-bit checkpoint we read, and what an absent key means.
_FOUR_BIT = {
  'bnb_4bit_quant_type': ('nf4', 'fp4'),
  'bnb_4bit_quant_storage': ('uint8', 'uint8'),
}


def as_asked(cfg: DecoderConfig, kind: str | None) -> DecoderConfig:
  """The model with its linears in a kind of `model.quant`.

  Args:
    cfg: of the files.
    kind: 'nf4' or 'int8'; 'none' or None for what the files have.

  Raises:
    ConfigError: no such kind, or the files have them in another.
  """
  if kind in (None, 'none', cfg.quant.kind):
    return cfg
  if kind not in KINDS:
    raise ConfigError(
      f'quant {kind!r}: no such kind; give {" or ".join(KINDS)}'
    )
  if cfg.quant.stored:
    raise ConfigError(
      f'quant {kind}: the weights of this model are stored in {cfg.quant.kind},'
      ' and what they were made of is not there: leave it out'
    )
  return dataclasses.replace(cfg, quant=Quant(kind))


def stored(
  raw: Mapping[str, Any], cfg: DecoderConfig, problems: list[str]
) -> Quant:
  """How the files of a config.json hold their linears.

  Args:
    raw: the mapping in config.json.
    cfg: of it.
    problems: what is not supported is added to them.
  """
  said = raw.get('quantization_config')
  if not said:
    return Quant()
  said = said if isinstance(said, dict) else {}
  bits = {n: said.get(f'load_in_{n}bit') is True for n in (4, 8)}
  method = said.get('quant_method', 'bitsandbytes' if any(bits.values()) else 'in some way')  # fmt: skip
  if method != 'bitsandbytes' or bits[4] == bits[8]:
    problems.append(
      f'the weights are quantised ({method}): use the repository with the'
      ' unquantised weights'
    )
    return Quant()
  if bits[4]:
    for key, (ours, absent) in _FOUR_BIT.items():
      if (value := said.get(key, absent)) != ours:
        problems.append(f'{key} {value!r} is not supported; supported: {ours}')
  elif said.get('llm_int8_has_fp16_weight'):
    problems.append('llm_int8_has_fp16_weight is not supported')
  return Quant(
    'nf4' if bits[4] else 'int8',
    double=said.get('bnb_4bit_use_double_quant') is True,
    stored=True,
    kept=_kept(said.get('llm_int8_skip_modules') or (), cfg, problems),
  )


def _kept(
  skipped: Any, cfg: DecoderConfig, problems: list[str]
) -> tuple[str, ...]:
  """Paths of the linears that a checkpoint leaves as they were."""
  if not isinstance(skipped, list | tuple) or not all(
    isinstance(x, str) for x in skipped
  ):
    problems.append(
      f'llm_int8_skip_modules is {skipped!r}, not a list of names'
    )
    return ()
  try:
    for key in skipped:
      re.compile(key)
  except re.error as error:
    problems.append(f'llm_int8_skip_modules: {key!r} is no regex: {error}')
    return ()
  kept = []
  for param in params_lib.table(cfg):
    if not (param.stacked and param.linear):
      continue
    names = params_lib.hf_names(cfg, param)
    found = [_is_skipped(n.removesuffix('.weight'), skipped) for n in names]
    if all(found):
      kept.append(param.path)
    elif any(found):
      problems.append(
        f'llm_int8_skip_modules keeps {sum(found)} of {len(found)} layers of'
        f' {param.path}: all of them or none'
      )
  return tuple(kept)


def _is_skipped(name: str, skipped: Sequence[str]) -> bool:
  """As transformers has it: up to a dot, as a regex so, or as an ending."""
  return any(
    name.endswith(key) or re.match(rf'(?:{key})(?:(?<=\.)|(?=\.|$))', name)
    for key in skipped
  )
