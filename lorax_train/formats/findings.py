"""What a consumer of an adapter reads otherwise than PEFT, or not at all.

The rules are those of consumers.py's table, from vLLM's and llama.cpp's own
sources.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_train.formats import hf_config, plain, safetensors
from lorax_train.formats.peft_config import (
  CHANGE_BASE,
  CONFIG_FILE,
  MUST_BE_OFF,
  settings_on,
)
from lorax_train.formats.peft_tensors import (
  CARRIED,
  EMBEDDING,
  HEAD,
)
from lorax_train.formats.safetensors import few
from lorax_train.lora import resolve
from lorax_train.models import params as params_lib

CONSUMERS: Mapping[str, str] = {
  'peft': 'PEFT',
  'vllm': 'vLLM',
  'llama.cpp': 'llama.cpp',
}

# What becomes of a finding: it does no harm, baking mends it, nothing does.
NOTE, BAKE, REFUSED = 'note', 'bake', 'refused'

# Settings that say more than factors and their scales can, and what is "off"
# besides None, {}, [] and False. PEFT reads them all.
_BEYOND: Mapping[str, Any] = {
  'use_dora': False,
  'modules_to_save': None,
  'trainable_token_indices': None,
  'ensure_weight_tying': False,
  **MUST_BE_OFF,
}
# Of these, what the others refuse to load, by the setting or by the tensors
# that it brings along. The rest they pass over.
_LOUD = (
  *('use_dora', 'lora_bias', 'bias'),
  *('modules_to_save', 'trainable_token_indices'),
)
_MERGE = 'merge the adapter into the base and serve that'

# Without these keys they stop.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
  'peft': (),
  'vllm': ('r', 'lora_alpha', 'target_modules'),
  'llama.cpp': ('lora_alpha',),
}
# What --max-lora-rank can be, and what it is unless it is given.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_RANK = 16


class Finding(NamedTuple):
  """Something that a consumer reads otherwise than PEFT, or not at all.

  Attributes:
    what: keys of adapter_config.json, tensors or modules.
    text: what the consumer does about it.
    kind: NOTE, BAKE or REFUSED.
  """

  what: str
  text: str
  kind: str


def of_settings(
  config: Mapping[str, Any], consumer: str, bake: bool
) -> list[Finding]:
  """What factors and scales do not hold."""
  findings = []
  reads_all = consumer == 'peft' and not bake
  for key in settings_on(config, _BEYOND):
    if key == 'ensure_weight_tying' and (reads_all or not _ties(config)):
      continue
    if reads_all:
      does = 'reads it: its tensors are copied unchecked'
    elif consumer == 'peft':
      does = f'reads it, but it does not go into A and B: {_MERGE}'
    elif (consumer, key) == ('llama.cpp', 'alora_invocation_tokens'):
      continue  # is read, but by nobody here: `read_config` refuses it
    else:
      does = f'{"refuses" if key in _LOUD else "passes over"} it: {_MERGE}'
    findings.append(Finding(key, does, NOTE if reads_all else REFUSED))
  start = config.get('init_lora_weights')
  if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
    what = f'init_lora_weights={start}'
    does = 'changes' if consumer == 'peft' else 'does not change'
    does += ' the base by it, as PEFT does on every load'
    if not reads_all:
      does += (
        ": save the adapter again by PEFT's save_pretrained with"
        ' path_initial_model_for_weight_conversion'
      )
    findings.append(Finding(what, does, NOTE if reads_all else REFUSED))
  return findings


def _ties(config: Mapping[str, Any]) -> bool:
  """Whether targets name the embedding or the head, which a base may tie."""
  targets = str(config.get('target_modules'))
  return any(name in targets for name in (EMBEDDING, HEAD))


def of_factors(
  adapter: plain.Plain, consumer: str, bake: bool, model_dir: Path | None
) -> list[Finding]:
  """What a consumer does about a plain adapter."""
  config, placed = adapter.config, adapter.placed
  findings = _of_modules(adapter, consumer, model_dir)
  if consumer != 'peft' or bake:
    findings += _of_carried(adapter, consumer, model_dir)
  if consumer == 'peft':
    return findings
  lacking = [key for key in _REQUIRED[consumer] if key not in config]
  if lacking:
    findings.append(Finding(', '.join(lacking), 'stops without', BAKE))
  findings += _of_scales(adapter, consumer)
  # Both adapt the modules that there are factors of, whatever the config says,
  # and vLLM fuses q, k, v or gate, up with zero for the ones that are not.
  for key in ('exclude_modules', 'layers_to_transform'):
    if config.get(key) not in (None, [], ''):
      does = 'passes over it, and adapts what there are factors of: the same'
      findings.append(Finding(key, does, NOTE))
  if consumer == 'llama.cpp':
    if 'lm_head' in placed and model_dir is None:
      does = 'refuses it where the base ties its head: --model would tell'
      findings.append(Finding('lm_head', does, NOTE))
    return findings
  if adapter.rank > _VLLM_RANKS[-1]:
    does = f'takes ranks up to {_VLLM_RANKS[-1]}: {_MERGE}'
    findings.append(Finding(f'rank {adapter.rank}', does, REFUSED))
  elif adapter.rank > VLLM_RANK:
    does = (
      f'takes {VLLM_RANK} unless started with --max-lora-rank'
      f' {vllm_rank(adapter.rank)}'
    )
    findings.append(Finding(f'rank {adapter.rank}', does, NOTE))
  wide = sorted({*adapter.dtypes} & {'float32', 'float64'})
  if wide or bake:
    stored = 'float32' if bake else ', '.join(wide)
    does = "rounds the factors to the model's dtype, or to --lora-dtype"
    findings.append(Finding(stored, does, NOTE))
  return findings


def _of_scales(adapter: plain.Plain, consumer: str) -> list[Finding]:
  """Settings for whose lack a module would get another scale, or no room."""
  spec, placed = adapter.spec, adapter.placed
  rslora = bool(adapter.config.get('use_rslora'))
  if consumer == 'vllm':
    keys = ('rank_pattern', 'alpha_pattern')
    scale = spec.alpha / (math.sqrt(spec.rank) if rslora else spec.rank)
    theirs = dict.fromkeys(placed, scale)
  else:
    keys = ('use_rslora', 'alpha_pattern')
    # To it, an alpha of 0 is none given, and the scale is 1.
    theirs = {
      name: spec.alpha / place.rank if spec.alpha else 1.0
      for name, place in placed.items()
    }
  wrong = [
    name
    for name, place in placed.items()
    if not math.isclose(theirs[name], place.scale, rel_tol=1e-6)
  ]
  what = ', '.join(key for key in keys if adapter.config.get(key))
  if wrong:
    does = (
      f'does not read that: {len(wrong)} of {len(placed)} modules would get'
      ' another scale'
    )
    zero = f'lora_alpha {spec.alpha:g}'
    return [Finding(what or zero, does, BAKE)]
  if consumer == 'vllm' and adapter.rank > spec.rank:
    does = f'checks r {spec.rank} for room, and meets rank {adapter.rank}'
    return [Finding(what, does, BAKE)]
  return []


def _of_modules(
  adapter: plain.Plain, consumer: str, model_dir: Path | None
) -> list[Finding]:
  """Modules that the base has not, or has in another shape."""
  cfg = None if model_dir is None else hf_config.read_config(model_dir)
  wrong = []
  for name, (a, b) in adapter.factors.items():
    row = _row(name, name in adapter.embeddings)
    if row is None:
      wrong += [name] if cfg or consumer != 'peft' else []
    elif cfg:
      layer = re.search(r'\.(\d+)\.', name)
      there = layer is None or int(layer[1]) < cfg.layers
      shape = a.shape[1], b.shape[0]
      if not there or shape != params_lib.shape(cfg, row)[-2:]:
        wrong.append(f'{name} {list(shape)}')
  findings = []
  if wrong:
    where = 'the model' if cfg else 'a Mistral or a Llama'
    findings.append(Finding(few(wrong), f'finds no such in {where}', REFUSED))
  elif cfg:
    every = [
      n for names in params_lib.module_names(cfg).values() for n in names
    ]
    every = [*dict.fromkeys([*adapter.factors, *every])]
    lost = {*resolve(adapter.spec, every, strict=False)} - {*adapter.factors}
    if lost:
      does = f'finds no factors, though {CONFIG_FILE} targets it: damaged'
      findings.append(Finding(few(sorted(lost)), does, REFUSED))
  if (
    cfg and cfg.tied and consumer == 'llama.cpp' and 'lm_head' in adapter.placed
  ):
    does = f'refuses it, as the model ties its head: {_MERGE}'
    findings.append(Finding('lm_head', does, REFUSED))
  return findings


def _row(name: str, embedding: bool) -> params_lib.Param | None:
  """The parameter that a module has for its weight."""
  for row in params_lib.MISTRAL_PARAMS:
    pattern = re.escape(row.hf).replace(r'\{\}', r'\d+')
    right = row.path == 'embed_tokens' if embedding else row.linear
    if right and re.fullmatch(pattern, f'{name}.weight'):
      return row
  return None


def _of_carried(
  adapter: plain.Plain, consumer: str, model_dir: Path | None
) -> list[Finding]:
  """Weights of the base that PEFT saves beside the factors of the same."""
  if not adapter.carried:
    return []
  what = few([name + CARRIED for name in adapter.carried])
  if model_dir is None:
    does = "takes the base's own: give --model, to see whether this is it"
    return [Finding(what, does, REFUSED)]
  refs = safetensors.open_dir(model_dir)
  other = []
  for name, ref in adapter.carried.items():
    # A tied matrix may be stored under either name.
    own = refs.get(f'{name}.weight') or refs.get('model.embed_tokens.weight')
    theirs = ref.read()
    if own is None or not np.array_equal(own.read().astype(ref.dtype), theirs):
      other.append(name + CARRIED)
  if other:
    does = f"takes the base's own, which differs: {_MERGE}"
    return [Finding(few(other), does, REFUSED)]
  if consumer == 'vllm':
    return [Finding(what, 'refuses it in some versions, and needs none', BAKE)]
  return []


def vllm_rank(rank: int) -> int:
  """The least --max-lora-rank that admits it."""
  return next(n for n in _VLLM_RANKS if n >= rank)
