"""Whether a run fits, by which remat, and what would make it fit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorax_train import config as config_lib
from lorax_train import parallel
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError, UserError
from lorax_train.formats import find, hf_config
from lorax_train.hardware import GIB, SHARES, fraction
from lorax_train.models.remat import POLICIES
from lorax_train.plan import chips, shapes
from lorax_train.plan.chips import Topology
from lorax_train.plan.estimate import ERROR, SPARE, Estimate, estimate
from lorax_train.train import inspection, losses, setup

AUTO = 'auto'
# Of what 'auto' chooses from, the first that fits. 'none' is not among them: it makes
# no product less than 'dots', and keeps seven times as much, to be written and read.
LADDER = POLICIES[1:]

_LEAST_ROW = 64  # tokens: batches of short rows may be of as few
_LEAST_CUT = 256  # rows are not advised to be cut below


class Case(NamedTuple):
  """A run on devices.

  Attributes:
    cfg: the run; its remat is a policy.
    adapters: what is trained.
    topology: the devices.
    mesh: the run's, of their number.
    length: tokens of a row.
    found: what its step needs.
  """

  cfg: TrainConfig
  adapters: setup.Adapters
  topology: Topology
  mesh: shapes.Mesh
  length: int
  found: Estimate

  @property
  def share(self) -> float:
    """What part of a device's memory it takes; 0 where nobody knows."""
    limit = self.topology.limit
    return self.found.peak / limit if limit else 0.0


class Change(NamedTuple):
  """What would make a run fit.

  Attributes:
    words: as flags, where there are any.
    case: the run with it.
  """

  words: str
  case: Case


def case(
  cfg: TrainConfig,
  adapters: setup.Adapters,
  topology: Topology,
  length: int | None = None,
) -> Case:
  """A run on devices, its remat chosen where it is to be.

  Args:
    cfg: the run.
    adapters: from `setup.plan_adapters`.
    topology: the devices.
    length: tokens of a row; of the longest by default.

  Raises:
    ConfigError: the mesh does not fit the devices or the batch.
  """
  mesh = shapes.mesh_of(cfg, topology.devices)
  length = length or cfg.data.max_length
  ladder = LADDER if cfg.model.remat == AUTO else (cfg.model.remat,)
  if topology.limit is None:
    ladder = ladder[-1:]
  for policy in ladder:
    own = _with(cfg, 'model', remat=policy)
    found = estimate(own, adapters, mesh, length, topology.platform)
    done = Case(own, adapters, topology, mesh, length, found)
    if done.share <= 1 - SPARE:
      break
  return done


def nearest(of: Case) -> Change | None:
  """The first change, from the cheapest on, that makes a run fit; or none."""
  for there, cfg, topology in _changes(of):
    try:
      changed = case(cfg, of.adapters, topology)
    except ConfigError:
      continue  # a mesh that cannot cut those batches
    if changed.share <= 1 - SPARE:
      words = ' '.join([there, *_flags(of.cfg, changed.cfg)])
      return Change(words.strip(), changed)
  return None


def _with(cfg: TrainConfig, section: str, **values: Any) -> TrainConfig:
  own = dataclasses.replace(getattr(cfg, section), **values)
  return dataclasses.replace(cfg, **{section: own})


def _changes(of: Case) -> Iterator[tuple[str, TrainConfig, Topology]]:
  """(other devices, run, devices): each goes on from what cost the least."""
  cfg, topology = of.cfg, of.topology
  there = ''
  most = losses.chunk_of(of.adapters.model_cfg.vocab)
  made = of.found.made
  heavy = made['logits'] > made['saved activations']
  if heavy and cfg.train.loss_chunk > most:
    yield there, (cfg := _with(cfg, 'train', loss_chunk=0)), topology
  for policy in POLICIES[POLICIES.index(cfg.model.remat) + 1 :]:
    yield there, (cfg := _with(cfg, 'model', remat=policy)), topology
  chip = topology.chip
  if topology.platform == 'gpu' and chip and fraction() < 0.9:
    limit = int(chip.hbm * 0.95) // chip.devices
    if topology.limit and limit > topology.limit:
      topology = topology._replace(limit=limit)
      there = f'{SHARES[0]}=0.95'
      yield there, cfg, topology
  if of.mesh.shape['fsdp'] < topology.devices:
    yield there, _with(cfg, 'mesh', data=1, fsdp=-1, tensor=1), topology
  ways = parallel.batch_ways(of.mesh)
  rows, n_micro = cfg.train.batch_size, cfg.train.grad_accum
  while rows % 2 == 0 and (rows // 2) % ways == 0:
    rows, n_micro = rows // 2, n_micro * 2
    cfg = _with(cfg, 'train', batch_size=rows, grad_accum=n_micro)
    yield there, cfg, topology
  length = of.length
  while length // 2 >= _LEAST_CUT:
    length //= 2
    yield there, _with(cfg, 'data', max_length=length), topology
  if topology.chip:
    yield from _more_chips(of, cfg, there, topology)


def _more_chips(
  of: Case, cfg: TrainConfig, there: str, topology: Topology
) -> Iterator[tuple[str, TrainConfig, Topology]]:
  """Slices twice, four times ... as large, all of them cutting the weights.

  A row a device, and as many rows a step as before, or just above.
  """
  cfg = _with(cfg, 'mesh', data=1, fsdp=-1, tensor=1)
  rows = of.cfg.train.batch_size * of.cfg.train.grad_accum
  for times in (2, 4, 8, 16):
    chips_, n = topology.chips * times, topology.devices * times
    wider = _with(cfg, 'train', batch_size=n, grad_accum=-(-rows // n))
    larger = topology._replace(name=f'{chips_} chips', chips=chips_, devices=n)
    said = f'{chips_} chips in place of {topology.chips}'
    yield f'{said} {there}'.strip(), wider, larger


def _flags(before: TrainConfig, after: TrainConfig) -> list[str]:
  """What makes one run of the other, on the command line."""
  was, is_ = (config_lib.to_mapping(cfg) for cfg in (before, after))
  return [
    f'--config.{section}.{key}={value}'
    for section in ('train', 'model', 'mesh', 'data')
    for key, value in is_[section].items()
    if value != was[section][key]
  ]


def gib(n: float) -> str:
  """'3.25 GiB'."""
  return f'{n / GIB:.2f} GiB'


def prepare(
  cfg: TrainConfig, topology: Topology | None = None
) -> tuple[TrainConfig, list[str]]:
  """Before anything is loaded: the run with its remat, and what is to be said.

  It takes no weights, no rows and no device, and less than a second where the
  run fits. Rows may be shorter than data.max_length: what fits only with shorter
  ones is let through, with a warning.

  Args:
    cfg: the run.
    topology: the devices; by default those at hand.

  Raises:
    ConfigError: it cannot fit, whatever the rows, by more than the formula may
      be wrong.
    ModelError: no such model.
  """
  topology = topology or chips.here(jax.devices(), jax.local_devices())
  model_dir = find.find_model(cfg.model.path, find.WITHOUT_HUB, False)
  adapters = setup.plan_adapters(cfg, hf_config.read_config(model_dir))
  longest = _as_before(cfg, adapters, topology)
  longest = longest or case(cfg, adapters, topology)
  chosen = longest.cfg
  lines = []
  if cfg.model.remat == AUTO:
    needs = f'a step takes about {_needs(longest)}'
    lines.append(f'remat      {chosen.model.remat}: {needs}')
  if longest.share <= 1 + ERROR:
    return chosen, lines
  least = longest
  if not cfg.data.packing:
    shortest = min(_LEAST_ROW, cfg.data.max_length)
    least = case(chosen, adapters, topology, shortest)
  change = nearest(longest)
  way_out = f'; what would fit: {change.words}' if change else ''
  if least.share > 1 + ERROR:
    raise ConfigError(f'does not fit: {_needs(least)}{way_out}')
  lines.append(
    f'warning    rows of {longest.length} tokens may not fit: {_needs(longest)}'
    f'{way_out}'
  )
  return chosen, lines


def _as_before(
  cfg: TrainConfig, adapters: setup.Adapters, topology: Topology
) -> Case | None:
  """A run that goes on, by the remat it began with, where that still fits.

  Another one might give other bits.
  """
  if cfg.model.remat != AUTO:
    return None
  try:
    before, _ = inspection.read_run(Path(cfg.run_dir).expanduser())
  except UserError:
    return None  # none yet, or none that can go on: the run will say so
  again = _with(cfg, 'model', remat=before.model.remat)
  done = case(again, adapters, topology)
  return done if done.share <= 1 else None


def _needs(of: Case) -> str:
  """'23.10 GiB a device of 15.75 GiB (v5e-4): weights 13.50, ...'."""
  found, limit = of.found, of.topology.limit
  kinds = {**found.given, **found.made}
  largest = sorted(kinds, key=lambda k: -kinds[k])[:3]
  parts = ', '.join(f'{kind} {kinds[kind] / GIB:.2f}' for kind in largest)
  there = f' of {gib(limit)}' if limit else ''
  return f'{gib(found.peak)} a device{there} ({of.topology.name}): {parts}'
