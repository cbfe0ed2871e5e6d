"""Ways of tuning beside each other: one base, one task, the same rows.

  python scripts/compare.py [--config configs/quickstart.py] [--out runs/compare]
      [--methods lora,full] [--config.train.steps=30 ...] [--mezo.train.steps=90 ...]

Trains the config once for each of

  lora   as the config has it
  qlora  the same with the base in NF4 (model.quant=nf4)
  mezo   LoRA's B by MeZO: forward passes alone, A as it began
  full   every weight

each in a process of its own, after which a table and a plot (compare.md,
compare.png in --out) say what each costs and gives: held-out loss before and
after, numbers trained, what a step holds in memory by the formula of `plan`, what
the whole process held at most on this machine (Python, XLA's compiler and the
files that were read included), seconds by the clock and of the CPU (compilation
and evaluation included), and what it leaves on disk.

--config.KEY=VALUE goes to all of them, --METHOD.KEY=VALUE to one. MeZO and full
tuning want learning rates of their own; those in METHODS below are for the
quickstart's task.

Runs that are done are not made again: --out has their figures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_train import main
from lorax_train.config import defaults
from lorax_train.plan import story
from lorax_train.train import plot

ROOT = Path(__file__).parents[1]

METHODS: dict[str, dict[str, Any]] = {
  'lora': {},
  'qlora': {'model.quant': 'nf4'},
  'mezo': {
    'method': 'mezo',
    'lora.variant': 'lora_fa',
    'mezo.epsilon': 1e-2,
    'train.learning_rate': 1e-3,
  },
  'full': {
    'method': 'full',
    'train.learning_rate': 5e-5,
    # Keys of adapters say nothing there, and are refused.
    **{f'lora.{key}': value for key, value in defaults()['lora'].items()},
  },
}

Result = dict[str, Any]


def run(
  name: str, config: str, overrides: Mapping[str, Any], out: Path
) -> Result:
  """Trains in a process of its own; what it cost and gave.

  Raises:
    SystemExit: the run failed.
  """
  run_dir = out / name
  kept = run_dir / 'compare.json'
  if kept.is_file():
    return json.loads(kept.read_text('utf-8'))
  given = {'eval.samples': 0, **overrides, 'run_dir': str(run_dir)}
  flags = [f'--config={config}', *(f'--config.{k}={v}' for k, v in given.items())]  # fmt: skip
  cfg = main.parse(['compare', *flags])
  print(f'== {name}: {" ".join(flags)}', flush=True)
  began = time.monotonic()
  command = [sys.executable, '-m', 'lorax_train.main', *flags]
  process = subprocess.Popen(command, cwd=ROOT)
  try:
    _, status, usage = os.wait4(process.pid, 0)
  except KeyboardInterrupt:  # the run has it too, and ends at its own pace
    sys.exit(process.wait() or 130)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f'{name}: the run ended with exit code {process.returncode}: see above')  # fmt: skip
  text = (run_dir / 'metrics.jsonl').read_text('utf-8')
  lines = [json.loads(line) for line in text.splitlines()]
  planned = story.plan(cfg, formula=True)
  result = {
    'method': name,
    'steps': cfg.train.steps,
    'trained': planned['model']['trained'],
    'curve': plot.series(lines, 'eval_loss'),
    'step_bytes': planned['bytes']['peak'],
    'process_bytes': usage.ru_maxrss * 1024,  # Linux counts in KiB
    'seconds': time.monotonic() - began,
    'cpu_seconds': usage.ru_utime + usage.ru_stime,
    'artefact_bytes': artefact_bytes(run_dir),
  }
  kept.write_text(json.dumps(result, indent=2) + '\n', 'utf-8')
  return result


def artefact_bytes(run_dir: Path) -> int:
  """Bytes of the weights that a run leaves, adapter or model."""
  return sum(
    path.stat().st_size
    for folder in ('adapter', 'model')
    for path in (run_dir / folder).glob('*.safetensors')
  )


def table(results: Sequence[Result]) -> str:
  """Markdown, a row a method."""
  lines = [
    '| method | steps | held-out loss | trained | a step | the process | seconds |'
    ' CPU seconds | on disk |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for r in results:
    first, last = r['curve'][1][0], r['curve'][1][-1]
    lines.append(
      f'| {r["method"]} | {r["steps"]} | {first:.4f} -> {last:.4f}'
      f' ({100 * (last / first - 1):+.1f} %) | {r["trained"]:,} |'
      f' {r["step_bytes"] / 2**30:.2f} GiB | {r["process_bytes"] / 2**30:.2f} GiB |'
      f' {r["seconds"]:,.0f} | {r["cpu_seconds"]:,.0f} |'
      f' {r["artefact_bytes"] / 1e6:,.1f} MB |'
    )
  return '\n'.join(lines) + '\n'


def draw(results: Sequence[Result], path: Path) -> None:
  """Held-out loss over steps, a line a method."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  for r in results:
    axes.plot(*r['curve'], 'o-', label=r['method'])
  axes.set_xlabel('step')
  axes.set_ylabel('held-out loss a learned token')
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path)


def parsed(
  argv: Sequence[str],
) -> tuple[argparse.Namespace, dict[str, dict[str, str]]]:
  """(options, {method: overrides}), 'config' for all methods."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default=str(ROOT / 'configs/quickstart.py'))
  parser.add_argument('--methods', default=','.join(METHODS))
  parser.add_argument('--out', default='runs/compare')
  overrides: dict[str, dict[str, str]] = {n: {} for n in ('config', *METHODS)}
  ours = []
  for flag in argv:
    whose, dot, rest = flag.removeprefix('--').partition('.')
    key, equals, value = rest.partition('=')
    if not dot or whose not in overrides:
      ours.append(flag)
    elif not equals:
      parser.error(f'{flag}: write --{whose}.KEY=VALUE')
    else:
      overrides[whose][key] = value
  options = parser.parse_args(ours)
  unknown = [m for m in options.methods.split(',') if m not in METHODS]
  if unknown:
    parser.error(f'--methods {unknown[0]}: known are {", ".join(METHODS)}')
  return options, overrides


def compare(argv: Sequence[str]) -> None:
  """The whole comparison."""
  options, overrides = parsed(argv)
  out = Path(options.out).expanduser().absolute()
  out.mkdir(parents=True, exist_ok=True)
  results = []
  for name in options.methods.split(','):
    given = {**METHODS[name], **overrides['config'], **overrides[name]}
    results.append(run(name, options.config, given, out))
    (out / 'compare.md').write_text(table(results), 'utf-8')
    draw(results, out / 'compare.png')
  print(f'\n{table(results)}\n{out / "compare.md"}, {out / "compare.png"}')


if __name__ == '__main__':
  compare(sys.argv[1:])
