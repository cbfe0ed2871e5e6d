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

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import find, hf_save, plain, safetensors
from lorax_train.formats.findings import (
  BAKE,
  CONSUMERS,
  REFUSED,
  VLLM_RANK,
  Finding,
  of_factors,
  of_settings,
  vllm_rank,
)
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.peft_config import CONFIG_FILE
from lorax_train.formats.peft_tensors import WEIGHTS_FILE


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
  findings = of_settings(config, consumer, bake)
  read = None
  if findings:  # what else is in the tensors is not ours to judge
    safetensors.open_file(directory / WEIGHTS_FILE)
  else:
    read = plain.read(directory, config)
    model_dir = None if model is None else find.find_model(model)
    findings = of_factors(read, consumer, bake, model_dir)
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
  room = f' --max-lora-rank {vllm_rank(rank)}' if rank > VLLM_RANK else ''
  return f'vllm serve {base} --enable-lora{room} --lora-modules NAME={out}'
