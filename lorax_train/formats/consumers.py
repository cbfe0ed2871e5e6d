"""Who else reads an adapter directory, and one that they read right.

PEFT computes what adapter_config.json says. Others read less of it, and pass
over the rest without a word:

               scale of a module                     rank of its factors
    vLLM       lora_alpha / r for all, or, with      --max-lora-rank
               use_rslora, lora_alpha / sqrt(r)
    llama.cpp  lora_alpha / rank of its factors      any

A baked directory says the same to all of them: one rank, to which narrower
factors are padded with zeros, lora_alpha = r, and each module's scale in its B.
"""

import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import find, hf_config, hf_save, plain, safetensors
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.peft import CARRIED, WEIGHTS_FILE
from lorax_train.formats.peft_config import (
  CHANGE_BASE,
  CONFIG_FILE,
  MUST_BE_OFF,
  settings_on,
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
_BEYOND: Mapping[str, Any] = {'use_dora': False, **MUST_BE_OFF}
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
_VLLM_RANK = 16


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


def export(
  adapter: str,
  consumer: str,
  out: str,
  bake: bool = False,
  model: str | None = None,
) -> dict[str, Any]:
  """Writes an adapter directory of which a consumer computes what PEFT does.

  Args:
    adapter: PEFT adapter directory.
    consumer: one of CONSUMERS.
    out: a directory, which must not exist or be empty.
    bake: write the plain form (see the head of this file) and not a copy.
    model: the base, for what only it can tell: names and shapes, whether its
      head is tied, whether a base weight that PEFT saved along is its own.

  Returns:
    What was found and what was written; `text` has it in words.

  Raises:
    ConfigError: no such consumer, or something is at `out` already.
    ModelError: a damaged adapter, or one that the consumer would not compute
      as PEFT does.
    OSError: disk full, no rights; nothing is left behind.
  """
  if consumer not in CONSUMERS:
    raise ConfigError(f'--for {consumer!r} is none of {", ".join(CONSUMERS)}')
  target = Path(os.path.abspath(os.path.expanduser(out)))
  _check_vacant(target)
  directory = Path(adapter).expanduser()
  path = directory / CONFIG_FILE
  config = read_object(path, ': is this an adapter?')
  if config.get('peft_type') != 'LORA':
    raise ModelError(f'{path}: peft_type is not LORA')
  findings = _of_settings(config, consumer, bake)
  read = None
  if findings:  # what else is in the tensors is not ours to judge
    safetensors.open_file(directory / WEIGHTS_FILE)
  else:
    read = plain.read(directory, config)
    model_dir = None if model is None else find.find_model(model)
    findings = _of_factors(read, consumer, bake, model_dir)
  _refuse(path, CONSUMERS[consumer], findings, bake)
  plain.write(
    target, directory, *(plain.bake(read) if bake and read else (None, {}))
  )
  ranks = [place.rank for place in read.placed.values()] if read else []
  return {
    'adapter': adapter,
    'for': consumer,
    'modules': len(ranks) or None,
    'ranks': [min(ranks), max(ranks)] if ranks else None,
    'findings': [finding._asdict() for finding in findings],
    'baked': bake,
    'out': out,
    'use': _use(config, consumer, max(ranks, default=1), out, model),
  }


def text(report: Mapping[str, Any]) -> str:
  """What `export` gives back, in words."""
  name = CONSUMERS[report['for']]
  lines = [('adapter', report['adapter'])]
  how = 'a copy'
  if report['ranks']:
    low, high = report['ranks']
    ranks = f'rank {high}' if low == high else f'ranks {low} to {high}'
    lines.append(('modules', f'{report["modules"]}, {ranks}'))
    if report['baked']:
      how = f'r {high}, lora_alpha {high}, every scale folded into B'
  for found in report['findings']:
    kind = 'mended' if found['kind'] == BAKE else found['kind']
    lines.append((kind, f'{found["what"]}: {name} {found["text"]}'))
  lines += [('written', f'{report["out"]}: {how}'), ('use', report['use'])]
  return '\n'.join(f'{key:<11} {value}' for key, value in lines)


def _check_vacant(out: Path) -> None:
  if not out.is_dir() or out.is_symlink() or any(out.iterdir()):
    hf_save.check_absent(out)


def _of_settings(
  config: Mapping[str, Any], consumer: str, bake: bool
) -> list[Finding]:
  """What factors and scales do not hold."""
  findings = []
  reads_all = consumer == 'peft' and not bake
  for key in settings_on(config, _BEYOND):
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


def _of_factors(
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
  elif adapter.rank > _VLLM_RANK:
    does = (
      f'takes {_VLLM_RANK} unless started with --max-lora-rank'
      f' {_vllm_rank(adapter.rank)}'
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


def _refuse(path: Path, name: str, findings: list[Finding], bake: bool) -> None:
  """Raises for what would not come out as PEFT computes it, all at once."""
  kinds = {REFUSED} if bake else {REFUSED, BAKE}
  told = [found for found in findings if found.kind in kinds]
  if told:
    listed = '; '.join(f'{f.what}: {name} {f.text}' for f in told)
    mended = all(found.kind == BAKE for found in told)
    remedy = (
      '; --bake mends that: one rank, scales folded into B' if mended else ''
    )
    raise ModelError(f'{path}: {listed}{remedy}')


def _vllm_rank(rank: int) -> int:
  """The least --max-lora-rank that admits it."""
  return next(n for n in _VLLM_RANKS if n >= rank)


def _use(
  config: Mapping[str, Any],
  consumer: str,
  rank: int,
  out: str,
  model: str | None,
) -> str:
  """The command that takes the directory."""
  base = model or config.get('base_model_name_or_path') or 'BASE'
  if consumer == 'peft':
    return f'PeftModel.from_pretrained(base_model, {out!r})'
  base, out = shlex.quote(base), shlex.quote(out)
  if consumer == 'llama.cpp':
    return f'python convert_lora_to_gguf.py --base {base} {out}'
  room = f' --max-lora-rank {_vllm_rank(rank)}' if rank > _VLLM_RANK else ''
  return f'vllm serve {base} --enable-lora{room} --lora-modules NAME={out}'
