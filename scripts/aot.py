"""Compiles runs for devices that are not there, and compares with the formula.

  python scripts/aot.py [--only NAME ...] [--out FILE]
  python scripts/aot.py --table FILE ...

Each case is the step of a real run, as `lorax-train plan` compiles it, in a process
of its own: 20 to 250 s and up to 2 GB of memory each. Cases for TPU want libtpu
(jax[tpu]), those for GPU jax's CUDA plugin with cuDNN (jax[cuda12]); what is not
installed is left out. A line of JSON a case is printed, and added to --out.

The two `edge` cases are a batch just under and one just over what four v5e chips
hold: formula and compiler must judge them alike. Of a quantised base `float_stacks`
names the matrices that stand as floats for all layers at once: none should.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  # Without these libtpu asks the network, and complains.
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Case(NamedTuple):
  """A run.

  Attributes:
    topology: devices, see `plan.chips.topology`.
    model: a size's name.
    rows: of a micro-batch.
    length: tokens of a row.
    remat: policy, or auto.
    targets: what is adapted.
    rank: of it.
    tensor: size of that mesh axis; the others go to fsdp.
    grad_accum: micro-batches.
    quant: of the base.
    mezo: weights that are trained without gradients, lora or all; '' for LoRA by
      gradients.
  """

  topology: str
  model: str
  rows: int
  length: int
  remat: str = 'full'
  targets: str = 'all-linear'
  rank: int = 16
  tensor: int = 1
  grad_accum: int = 1
  quant: str = 'none'
  mezo: str = ''


CASES = {
  # The reference run, its rows at once and not 4 by 4. On 8 devices 24 of them: with
  # 16 a device has as many tokens as k_proj has outputs, and a product of rows could
  # not be told from a gradient of W.
  'reference-v5e-16': Case('v5e-16', 'mistral-7b', 16, 512, targets='q_proj,v_proj', rank=64),
  'reference-v6e-8': Case('v6e-8', 'mistral-7b', 24, 512, targets='q_proj,v_proj', rank=64),
  'reference-h100-8': Case('h100-8', 'mistral-7b', 24, 512, targets='q_proj,v_proj', rank=64),
  'linear-v5e-16': Case('v5e-16', 'mistral-7b', 16, 2048),
  'linear-v6e-8': Case('v6e-8', 'mistral-7b', 24, 2048, 'auto'),
  'linear-h100-8': Case('h100-8', 'mistral-7b', 24, 2048, 'auto'),
  'one-card': Case('h100-1', 'mistral-7b', 8, 2048, 'auto'),
  'one-card-accum': Case('h100-1', 'mistral-7b', 4, 2048, grad_accum=4),
  'long-rows': Case('v5e-16', 'mistral-7b', 16, 32768, 'auto'),
  'tensor-v5e-16': Case('v5e-16', 'mistral-7b', 16, 2048, tensor=4),
  'tensor-h100-8': Case('h100-8', 'mistral-7b', 16, 2048, tensor=2),
  'vocabulary': Case('h100-1', 'nemo-12b', 1, 8192),
  'heads-of-64': Case('v5e-4', 'tinyllama-1.1b', 32, 1536),
  'small-none': Case('h100-1', 'tinyllama-1.1b', 8, 1024, 'none'),
  'small-dots': Case('v5e-1', 'tinyllama-1.1b', 4, 1024, 'dots'),
  'qlora-h100': Case('h100-1', 'mistral-7b', 4, 512, targets='q_proj,v_proj', rank=64, quant='nf4'),
  'qlora-h100-dots': Case('h100-1', 'mistral-7b', 4, 512, 'dots', targets='q_proj,v_proj', rank=64, quant='nf4'),
  'qlora-h100-8': Case('h100-8', 'mistral-7b', 24, 512, targets='q_proj,v_proj', rank=64, quant='nf4'),
  'qlora-v5e-1': Case('v5e-1', 'mistral-7b', 1, 2048, targets='q_proj,v_proj', rank=64, quant='nf4'),
  'mezo-all': Case('h100-1', 'mistral-7b', 1, 2048, 'none', mezo='all'),
  'mezo-all-rows': Case('h100-1', 'mistral-7b', 16, 400, 'none', mezo='all'),
  'mezo-all-v5e-4': Case('v5e-4', 'mistral-7b', 4, 2048, 'none', mezo='all'),
  'mezo-lora': Case('h100-1', 'mistral-7b', 1, 2048, 'none', 'q_proj,v_proj', 8, mezo='lora'),
  'edge-under': Case('v5e-4', 'mistral-7b', 52, 2048),
  'edge-over': Case('v5e-4', 'mistral-7b', 60, 2048),
}  # fmt: skip


def run(name: str) -> dict[str, Any]:
  """Compiles a case, in this process."""
  import jax

  from lorax_train import config
  from lorax_train.formats import quantised
  from lorax_train.plan import chips, compiled, hlo, sizes, text, verdict
  from lorax_train.train import setup

  of = CASES[name]
  mapping = config.defaults()
  mapping['model'].update(path=of.model, remat=of.remat, quant=of.quant)
  mapping['data'].update(path='.', max_length=of.length)
  if of.mezo != 'all':
    mapping['lora'].update(targets=of.targets, rank=of.rank)
  if of.mezo:
    mapping['method'] = 'mezo'
    mapping['mezo'].update(weights=of.mezo)
  mapping['mesh'].update(tensor=of.tensor)
  mapping['train'].update(batch_size=of.rows, grad_accum=of.grad_accum)
  cfg = config.from_mapping(mapping)
  topology = chips.topology(of.topology)
  adapters = setup.plan_adapters(cfg, sizes.model_config(of.model))
  planned = verdict.case(cfg, adapters, topology)
  began, cpu = time.monotonic(), time.process_time()
  found, program = compiled.compile_step(
    planned.cfg, adapters, topology, planned.length
  )
  facts = text.facts(planned, None, found)
  matrices = {
    w.shape[-2:]
    for w in quantised.weights(setup.abstract(cfg, adapters)[0])
    if hasattr(w, 'dequantised')
  }
  layers = adapters.model_cfg.layers
  libraries = {'jax': jax.__version__}
  for library in ('libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin'):
    try:
      libraries[library] = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    'name': name,
    **facts,
    'float_stacks': sorted(hlo.float_stacks(program, matrices, layers)),
    'libraries': libraries,
    'seconds_wall': time.monotonic() - began,
    'seconds_cpu': time.process_time() - cpu,
    'program_bytes': len(program),
  }


def missing(name: str) -> str:
  """Why a case cannot be compiled here; '' where it can."""
  from lorax_train.plan import chips, compiled

  return compiled.missing(chips.topology(CASES[name].topology))


def table(rows: list[dict[str, Any]]) -> str:
  """Cases as a table in Markdown.

  `dW` is how many frozen weights have a gradient, ? where a product of rows would
  look like one; `sum` the largest all-reduce in MiB, `A, B` the adapters'.
  """
  lines = [
    '| case | devices | step | remat | formula GiB | compiler GiB | ratio |'
    ' FLOPs/N a token | kernels | dW | sum | A, B | s |',
    '|' + '---|' * 13,
  ]
  for row in rows:
    own, step = row['compiled'], row['step']
    formula, peak = row['bytes']['peak'], own['peak']
    mesh = ', '.join(map(str, row['topology']['mesh'].values()))
    kernels = {
      k.replace('__cudnn$fmha', ''): n
      for k, n in own['kernels'].items()
      if 'fmha' in k or k == 'tpu_custom_call'
    }
    found = own['weight_gradients']
    largest = own['collectives'].get('all-reduce', {'largest': 0})['largest']
    cells = [
      row['name'],
      f'{row["topology"]["name"]} ({mesh})',
      f'{step["grad_accum"]} x {step["batch_size"]} x {step["length"]}',
      step['remat'],
      f'{formula / 2**30:.2f}',
      f'{peak / 2**30:.2f}' if peak else f'refused: {own["refusal"][-60:]}',
      f'{formula / peak:.3f}' if peak else '',
      f'{row["flops"]["token_over_n"]:.2f}',
      ', '.join(f'{n} x {k}' for k, n in kernels.items()),
      '?' if found is None else str(len(found)),
      f'{largest / 2**20:.1f}',
      f'{row["bytes"].get("adapters", 0) / 2**20:.0f}',
      f'{row["seconds_wall"]:.0f}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> int:
  """Runs cases, or prints the table of what others have run."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', nargs='+', choices=CASES, default=list(CASES))
  parser.add_argument('--out', help='file of JSON lines, added to')
  parser.add_argument('--table', nargs='+', help='print these files as a table')
  parser.add_argument('--here', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.table:
    lines = [x for f in args.table for x in Path(f).read_text().splitlines()]
    print(table(list(map(json.loads, lines))))
    return 0
  if args.here:
    print(json.dumps(run(args.here)))
    return 0
  done, failed = [], []
  for name in args.only:
    lacking = missing(name)
    if lacking:
      print(f'{name}: left out: {lacking}', file=sys.stderr)
      continue
    child = subprocess.run(
      [sys.executable, __file__, '--here', name],
      env=os.environ | ENVIRONMENT,
      capture_output=True,
      text=True,
      check=False,
    )
    if child.returncode:
      print(f'{name}: {child.stderr[-2000:]}', file=sys.stderr)
      failed.append(name)
      continue
    line = child.stdout.splitlines()[-1]
    print(line, flush=True)
    done.append(json.loads(line))
    if args.out:
      with open(args.out, 'a', encoding='utf-8') as file:
        file.write(line + '\n')
  print(table(done), file=sys.stderr)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
