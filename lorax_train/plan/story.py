"""The verb: what a run needs, said before anything is bought or loaded."""

import dataclasses
from typing import Any

import jax

from lorax_train import config as config_lib
from lorax_train import errors
from lorax_train.config import TrainConfig
from lorax_train.plan import chips, compiled, sizes, text, verdict
from lorax_train.train import setup


def plan(
  cfg: TrainConfig, topology: str = '', formula: bool = False
) -> dict[str, Any]:
  """Whether a run fits, and how fast it can be at best.

  No weights and no rows are read. `model.path` may be a size's name or a
  config.json as well.

  Args:
    cfg: the run.
    topology: devices by name, see `chips.topology`; '' for those at hand.
    formula: leave the compiler alone.

  Returns:
    See `text.facts`.

  Raises:
    ConfigError: no such topology; the mesh does not fit it, or the batch.
    ModelError: no such model.
  """
  model_cfg = sizes.model_config(cfg.model.path)
  if topology:
    there = chips.topology(topology)
    # The devices that are here are left alone: they may be busy, or broken.
    jax.config.update('jax_platforms', 'cpu')
  else:
    there = chips.here(jax.devices(), jax.local_devices())
  adapters = setup.plan_adapters(cfg, model_cfg)
  case = verdict.case(cfg, adapters, there)
  missing = 'as asked' if formula else compiled.missing(there)
  found = None
  if not missing:
    try:
      found = compiled.compile_step(case.cfg, adapters, there, case.length)[0]
    except RuntimeError as error:
      # Half of it is installed, or of two versions.
      missing = errors.first_and_last(error)[:200]
  change = None
  if text.fits(case, found) in ('no', 'close'):
    change = verdict.nearest(case)
  return text.facts(case, change, found, missing)


def of_model(model: str, topology: str) -> TrainConfig:
  """A run that one may start from: all defaults, a row a device at least.

  Args:
    model: directory, config.json, hub id or a size's name.
    topology: devices by name; '' for those at hand.
  """
  n = chips.topology(topology).devices if topology else jax.device_count()
  mapping = config_lib.defaults()
  mapping['model']['path'] = model
  mapping['data']['path'] = '.'  # read by nobody here
  cfg = config_lib.from_mapping(mapping)
  rows = max(cfg.train.batch_size, n)
  train = dataclasses.replace(cfg.train, batch_size=-(-rows // n) * n)
  return dataclasses.replace(cfg, train=train)
