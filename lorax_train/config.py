"""TrainConfig: everything a run is told, one frozen dataclass a section.

A config file is a Python file whose `get_config()` starts from `defaults()`;
see configs/mistral_lora.py, and sections.py for the keys.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_train.checked import build, indices, pattern
from lorax_train.checked import key as _key
from lorax_train.errors import ConfigError
from lorax_train.lora import LoraSpec
from lorax_train.sections import (
  CheckpointSection,
  DataSection,
  EvalSection,
  LoraSection,
  MeshSection,
  MezoSection,
  ModelSection,
  Source,
  TrainSection,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A run.

  Attributes:
    model: the base model.
    method: how it is trained: adapters by their gradients (lora), every weight by
      its own (full), or either by the loss alone, without gradients (mezo).
    lora: the adapters.
    mezo: how method mezo steps.
    data: the rows.
    train: optimisation.
    mesh: devices.
    checkpoint: checkpoints.
    eval: held-out loss.
    run_dir: where everything that the run makes goes; made where absent.
  """

  model: ModelSection = dataclasses.field(default_factory=ModelSection)
  method: str = _key('lora', choices=('lora', 'full', 'mezo'))
  lora: LoraSection = dataclasses.field(default_factory=LoraSection)
  mezo: MezoSection = dataclasses.field(default_factory=MezoSection)
  data: DataSection = dataclasses.field(default_factory=DataSection)
  train: TrainSection = dataclasses.field(default_factory=TrainSection)
  mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
  checkpoint: CheckpointSection = dataclasses.field(
    default_factory=CheckpointSection
  )
  eval: EvalSection = dataclasses.field(default_factory=EvalSection)
  run_dir: str = 'runs/lora'


def defaults() -> dict[str, Any]:
  """Every key with its default, nested by section."""
  return to_mapping(TrainConfig())


def to_mapping(cfg: TrainConfig) -> dict[str, Any]:
  """The configuration as nested plain dicts, ready for JSON."""
  return dataclasses.asdict(cfg)


def from_mapping(mapping: Mapping[str, Any]) -> TrainConfig:
  """A checked configuration from nested mappings.

  Keys left out, and keys that are None, take their defaults.

  Raises:
    ConfigError: lists all unknown keys, wrong types, values out of range and
      required keys that are empty, at once.
  """
  problems: list[str] = []
  cfg = build(TrainConfig, mapping, '', problems)
  of_mixture = any(p.startswith('data.mixture') for p in problems)
  problems += [
    f'{name} is required'
    for name, value in {
      'model.path': cfg.model.path,
      # A mixture is empty here where it is no tuple of sections.
      'data.path': cfg.data.path or cfg.data.mixture or of_mixture,
      'run_dir': cfg.run_dir,
    }.items()
    if not value
  ]
  if not problems:
    problems += _data_problems(cfg.data) + _method_problems(cfg)
    try:
      lora_spec(cfg.lora)
    except ValueError as error:
      problems.append(f'lora: {error}')
  if problems:
    raise ConfigError('config: ' + '; '.join(problems))
  return cfg


def sources(section: DataSection) -> tuple[Source, ...]:
  """Where the rows come from, each with its template: one, or a mixture.

  >>> sources(DataSection(path='a.json'))
  (Source(path='a.json', weight=1.0, template='alpaca'),)
  """
  return tuple(
    dataclasses.replace(s, template=s.template or section.template)
    for s in section.mixture or (Source(section.path),)
  )


def buckets(section: DataSection) -> tuple[int, ...]:
  """'128, 256' -> (128, 256).

  Raises:
    ValueError: what is wrong with it.
  """
  bounds = indices('buckets', section.buckets)
  if len(set(bounds)) < len(bounds):
    raise ValueError(f'buckets {section.buckets!r} names a length twice')
  for bound in bounds:
    if not 2 <= bound <= section.max_length:
      raise ValueError(
        f'buckets {section.buckets!r}: {bound} is not between 2 and'
        f' max_length, {section.max_length}'
      )
  return bounds


def _method_problems(cfg: TrainConfig) -> list[str]:
  """Keys that say something which the method has no ear for."""
  problems = []
  if cfg.model.init == 'random' and cfg.method != 'full':
    problems.append(
      'model.init=random: an adapter of random weights is of no use, nor are steps'
      ' without gradients from them: give method=full'
    )
  if cfg.method == 'lora' and cfg.train.optimizer == 'muon':
    problems.append(
      'train.optimizer=muon makes the update of a whole matrix orthogonal,'
      ' which A and B apart are not: give method=full, or another optimizer'
    )
  if trains_all(cfg):
    fields = [field.name for field in dataclasses.fields(cfg.lora)]
    odd = [f'lora.{key}' for key in _changed(cfg.lora, fields)]
    if cfg.method == 'full' and cfg.train.lora_plus_ratio != 1.0:
      odd.append('train.lora_plus_ratio')
    if cfg.model.quant != 'none':
      problems.append(
        f'model.quant={cfg.model.quant}: quantised weights stay as they are: leave it'
        ' out, or train adapters'
      )
    if odd:
      problems.append(
        f'{", ".join(odd)}: method={cfg.method} of all weights has no adapter:'
        ' leave that out, or train adapters'
      )
  if cfg.method != 'mezo' and cfg.mezo != MezoSection():
    problems.append(
      'mezo: its keys are of method=mezo: give that, or none of them'
    )
  if cfg.method == 'mezo':
    problems += [
      f'{name}.{key}={getattr(section, key)!r}: method=mezo makes no use of it:'
      ' leave it out'
      for name, keys in _OF_GRADIENTS.items()
      for section in [getattr(cfg, name)]
      for key in _changed(section, keys)
    ]
  return problems


def _changed(section: Any, keys: Sequence[str]) -> list[str]:
  """Those keys of a section that are not at their default."""
  usual = type(section)()
  return [key for key in keys if getattr(section, key) != getattr(usual, key)]


# What a step without gradients has no use for.
_OF_GRADIENTS = {
  'train': (
    'optimizer',
    'momentum',
    'lora_plus_ratio',
    'neftune_alpha',
    'weight_decay',
    'beta1',
    'beta2',
    'epsilon',
    'clip_norm',
  ),
  'lora': ('dropout',),
}


def trains_all(cfg: TrainConfig) -> bool:
  """Whether the model's own weights are trained, and not adapters."""
  return cfg.method == 'full' or (
    cfg.method == 'mezo' and cfg.mezo.weights == 'all'
  )


def _data_problems(section: DataSection) -> list[str]:
  """What no single key of the section shows."""
  problems = []
  if section.path and section.mixture:
    problems.append(
      'data.path and data.mixture are both given: empty one, as by'
      ' --config.data.path='
    )
  if section.rows and section.mixture:
    problems.append('data.rows goes with data.path, not with data.mixture')
  given = [
    (s.path, s.template) for s in (sources(section) if section.mixture else ())
  ]
  for i, (path, template) in enumerate(given):
    if not path:
      problems.append(f'data.mixture[{i}].path is required')
    elif (path, template) in given[:i]:
      problems.append(
        f'data.mixture[{i}].path is {path!r} with template {template!r} for a'
        ' second time: leave it out, and raise the weight of the first'
      )
  if section.packing and section.buckets:
    problems.append('data.packing and data.buckets are both given: empty one')
  try:
    buckets(section)
  except ValueError as error:
    problems.append(f'data.{error}')
  return problems


def lora_spec(section: LoraSection) -> LoraSpec:
  """The section as the library's LoraSpec.

  Raises:
    ValueError: what is wrong with it.
  """
  tokens = indices('trainable_token_indices', section.trainable_token_indices)
  return LoraSpec(
    targets=section.targets,
    rank=section.rank,
    alpha=section.alpha,
    dropout=section.dropout,
    variant=section.variant,
    init=section.init,
    exclude=section.exclude,
    rank_pattern=pattern(section.rank_pattern, int),
    alpha_pattern=pattern(section.alpha_pattern, float),
    layers_to_transform=indices(
      'layers_to_transform', section.layers_to_transform
    ),
    modules_to_save=section.modules_to_save,
    trainable_token_indices={'embed_tokens': tokens} if tokens else {},
  )
