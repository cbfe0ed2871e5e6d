"""What a path holds: a model, an adapter, a run or checkpoints."""

import json
import re
import sys
from pathlib import Path

from lorax_train import config as config_lib
from lorax_train.config import TrainConfig
from lorax_train.errors import ModelError, ResumeError
from lorax_train.formats.peft import CONFIG_FILE as ADAPTER_CONFIG
from lorax_train.formats.safetensors import few
from lorax_train.infer import inspection
from lorax_train.infer.inspection import Facts, aligned, table
from lorax_train.train import checkpoint, metrics, rundir

_STEP = re.compile(r'(\d+)(\.corrupt)?')
_EXPECTED = (
  'the directory of a model (config.json and safetensors), an adapter'
  f' ({ADAPTER_CONFIG}), a run ({rundir.RUN}) or its checkpoints'
)


def inspect(path: str) -> tuple[Facts, str]:
  """What a directory is, as facts for JSON and in words.

  Raises:
    ModelError: nothing that we know, or a model or adapter that is damaged.
    ResumeError: a run whose config.json or run.json is damaged.
  """
  directory = Path(path).expanduser().resolve()
  if not directory.is_dir():
    what = 'a file' if directory.exists() else 'no such directory'
    raise ModelError(f'{path}: {what}; give {_EXPECTED}')
  if (directory / ADAPTER_CONFIG).is_file():
    facts = inspection.adapter_facts(directory)
    return facts, inspection.adapter_text(facts)
  if (directory / rundir.RUN).is_file():
    facts = run_facts(directory)
    return facts, run_text(facts)
  if (directory / 'config.json').is_file() or any(
    directory.glob('model*.safetensors')
  ):
    facts = inspection.model_facts(directory)
    return facts, inspection.model_text(facts)
  if _is_step(directory):
    facts = {'kind': 'checkpoint', **_step(directory)}
    return facts, step_text(facts)
  steps = [
    p for p in directory.iterdir() if _STEP.fullmatch(p.name) and _is_step(p)
  ]
  if steps:
    steps.sort(key=lambda p: (int(p.name.partition('.')[0]), p.name))
    facts = {
      'kind': 'checkpoints',
      'path': str(directory),
      'steps': [_step(p) for p in steps],
    }
    return facts, steps_text(facts)
  found = sorted(p.name for p in directory.iterdir())
  raise ModelError(f'{path}: holds {few(found) or "nothing"}; give {_EXPECTED}')


def read_run(run_dir: Path) -> tuple[TrainConfig, dict[str, str]]:
  """(configuration, fingerprints of what it reads) of a run directory.

  Raises:
    ResumeError: not a run, or its files are damaged.
    ConfigError: a configuration of another version.
  """
  try:
    mapping = json.loads((run_dir / rundir.CONFIG).read_text('utf-8'))
    inputs = json.loads((run_dir / rundir.RUN).read_text('utf-8'))['inputs']
    inputs = dict(inputs)
  except FileNotFoundError as error:
    raise ResumeError(
      f'run {run_dir}: no {Path(error.filename).name} in it: give a run_dir'
      ' that training has written'
    ) from None
  except (OSError, ValueError, KeyError, TypeError):
    raise ResumeError(
      f'run {run_dir}: its {rundir.CONFIG} or {rundir.RUN} is damaged'
    ) from None
  return config_lib.from_mapping(mapping), inputs


def run_facts(run_dir: Path) -> Facts:
  """Configuration, progress, losses and the adapter of a run, or its model.

  One that is damaged is a fact of the run, and no error.
  """
  cfg, inputs = read_run(run_dir)
  root = run_dir / 'checkpoints'
  latest = checkpoint.latest_step(root)
  lines = metrics.read(run_dir, sys.maxsize)
  made: dict[str, Facts | None] = {'adapter': None}
  for what, facts_of in (
    ('adapter', inspection.adapter_facts),
    ('model', inspection.model_facts),
  ):
    if (run_dir / what).is_dir():
      try:
        made[what] = facts_of(run_dir / what)
      except ModelError as error:
        made[what] = {'problem': str(error)}
  return {
    'kind': 'run',
    'path': str(run_dir),
    'config': config_lib.to_mapping(cfg),
    'inputs': inputs,
    'checkpoint': latest and _step(root / str(latest)),
    'losses': _series(lines, 'loss')[-1:],
    'eval_losses': _series(lines, 'eval_loss'),
    'eval_accuracies': _series(lines, 'eval_accuracy'),
    **made,
  }


def _besides(lora: Facts) -> str:
  """What is trained beside the adapters, in words."""
  keys = ('modules_to_save', 'trainable_token_indices')
  said = [f'{key} {lora[key]}' for key in keys if lora[key]]
  return ''.join(f', {words}' for words in said)


def _sources(data: Facts) -> str:
  """Where the rows come from, in words."""
  if not data['mixture']:
    return f'{data["path"]}, template {data["template"]}'
  return '; '.join(
    f'{s["weight"]:g} x {s["path"]}, template'
    f' {s["template"] or data["template"]}'
    for s in data['mixture']
  )


def run_text(facts: Facts) -> str:
  """`run_facts` in words."""
  cfg = facts['config']
  what = 'model' if _trains_all(cfg) else 'adapter'
  made = facts.get(what)
  model, data, train = (cfg[section] for section in ('model', 'data', 'train'))
  held = f', held out: {data["eval_path"]}' if data['eval_path'] else ''
  latest = facts['checkpoint']
  lines = {
    'run': facts['path'],
    'model': (
      f'{model["path"]}, compute {model["dtype"]}, weights'
      f' {model["param_dtype"]}'
    ),
    'data': f'{_sources(data)}{held}',
    **_method(cfg),
    'steps': (
      f'{train["steps"]} of {train["batch_size"] * train["grad_accum"]}'
      f' {"packs" if data["packing"] else "rows"},'
      f' learning rate {train["learning_rate"]:g}, {train["schedule"]}, seed'
      f' {train["seed"]}'
    ),
    'checkpoint': (
      f'step {latest["step"]}, {_verdict(latest)}' if latest else 'none'
    ),
    'loss': _at(facts['losses']) or 'none yet',
    'held out': _at(facts['eval_losses']) or 'no loss',
  }
  if facts['eval_accuracies']:
    lines['accuracy'] = _at(facts['eval_accuracies'])
  if made is None:
    lines[what] = 'none yet: give the command of the run again'
  elif 'problem' in made:
    lines[what] = f'damaged: {made["problem"]}'
  else:
    text_of = {
      'adapter': inspection.adapter_text,
      'model': inspection.model_text,
    }[what]
    return f'{aligned(lines)}\n\n{text_of(made)}'
  return aligned(lines)


def _method(cfg: Facts) -> dict[str, str]:
  """What is trained, in words."""
  lora, by = cfg['lora'], cfg['train']['optimizer']
  if cfg['method'] == 'mezo':
    by = 'MeZO'
  if _trains_all(cfg):
    drawn = ', from random ones' if cfg['model']['init'] == 'random' else ''
    return {'method': f'all weights{drawn}, {by}'}
  words = (
    f'{lora["variant"]}, rank {lora["rank"]}, alpha {lora["alpha"]:g}, targets'
    f' {lora["targets"]}{_besides(lora)}'
  )
  mezo = ', MeZO' if cfg['method'] == 'mezo' else ''
  return {'lora': (lora['init_from'] or words) + mezo}


def _trains_all(cfg: Facts) -> bool:
  return config_lib.trains_all(config_lib.from_mapping(cfg))


def step_text(facts: Facts) -> str:
  """A step in words, a line a leaf."""
  lines = {
    'checkpoint': facts['path'],
    'step': str(facts['step']),
    'files': f'{facts["files"]}, {facts["bytes"]:,} bytes',
    'verdict': _verdict(facts),
  }
  leaves = table(('leaf', 'kind'), list(facts['leaves'].items()))
  return f'{aligned(lines)}\n\n{leaves}'


def steps_text(facts: Facts) -> str:
  """Steps in words, a line each."""
  rows = [
    (Path(s['path']).name, len(s['leaves']), s['files'], f'{s["bytes"]:,}',
     _verdict(s))
    for s in facts['steps']
  ]  # fmt: skip
  steps = table(('step', 'leaves', 'files', 'bytes', 'verdict'), rows)
  return f'{aligned({"checkpoints": facts["path"]})}\n\n{steps}'


def _is_step(path: Path) -> bool:
  """A step, finished or set aside; MANIFEST.json makes any name one."""
  named = _STEP.fullmatch(path.name) and (path / checkpoint.STATE).is_dir()
  return bool(named) or (path / checkpoint.MANIFEST).is_file()


def _step(directory: Path) -> Facts:
  number = _STEP.fullmatch(directory.name)
  step = int(number[1]) if number else None
  return {'step': step, **checkpoint.describe(directory)}


def _verdict(step: Facts) -> str:
  if step['problem'] is None:
    return 'every file is as it was written'
  return f'damaged: {step["problem"]}'


def _series(lines: list[Facts], key: str) -> list[Facts]:
  return [
    {'step': line['step'], key: line[key]}
    for line in lines
    if isinstance(line.get(key), float) and isinstance(line.get('step'), int)
  ]


def _at(series: list[Facts]) -> str:
  """'4.7280 at step 0, 4.6678 at step 10'; the middle of many is left out."""
  words = [
    f'{value:.4f} at step {step}' for step, value in map(dict.values, series)
  ]
  if len(words) > 5:
    words[2:-2] = ['...']
  return ', '.join(words)
