"""A run as shapes: what its step is given, and its program on one device."""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_train import config as config_lib
from lorax_train import parallel
from lorax_train.config import TrainConfig
from lorax_train.data import sequences, template
from lorax_train.data.encoded import Sizes
from lorax_train.errors import ConfigError
from lorax_train.models.attention import Kernel
from lorax_train.models.params import DecoderConfig
from lorax_train.plan import opaque
from lorax_train.train import setup
from lorax_train.train import state as state_lib
from lorax_train.train.step import TrainState

Tree = Any
Mesh = Any  # of devices, or an AbstractMesh of their number

# Of rows that nobody has read: how many choices each has, of how many tokens.
_CHOICES, _CHOICE_TOKENS = 4, 8


class Shapes(NamedTuple):
  """What a step is given, as shapes with where they lie.

  Attributes:
    model_cfg: the model as the run sees it.
    frozen: the base.
    state: adapters, what is trained whole, the optimizer's.
    batch: of a step, [micro-batches, rows, ...] each.
  """

  model_cfg: DecoderConfig
  frozen: Tree
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]


def shapes_of(
  cfg: TrainConfig, adapters: setup.Adapters, mesh: Mesh, length: int
) -> Shapes:
  """A run's shapes on a mesh, which may be one that nobody has.

  Args:
    cfg: the run.
    adapters: from `setup.plan_adapters`.
    mesh: devices, or their number alone.
    length: tokens of a row.
  """
  frozen, trainable = setup.abstract(cfg, adapters, mesh)
  tx = setup.optimizer(cfg)
  state = state_lib.abstract_state(tx, frozen, trainable, mesh)
  names = ['ids', 'labels', *(['segments', 'positions'] * cfg.data.packing)]
  of_row: dict[str, tuple[int, ...]] = dict.fromkeys(names, (length,))
  n_choices = choices_of(cfg)
  if n_choices:
    sizes = Sizes(n_choices, length, min(length, _CHOICE_TOKENS))
    of_row = sequences.shapes(sizes, length)
  batch = {
    name: jax.ShapeDtypeStruct(
      (cfg.train.grad_accum, cfg.train.batch_size, *own),
      np.int32,
      sharding=parallel.batch_sharding(mesh, axis=1),
    )
    for name, own in of_row.items()
  }
  return Shapes(adapters.model_cfg, frozen, state, batch)


def choices_of(cfg: TrainConfig) -> int:
  """Sequences that a row is, if its choices are compared; 0 if it is one.

  What the rows alone tell is taken to be four, and of what a function gives none.
  """
  if cfg.train.loss == 'tokens':
    return 0
  names = [source.template for source in config_lib.sources(cfg.data)]
  counts = (template.count_of(name) for name in names)
  return max(_CHOICES if n is None else n for n in counts)


def traced(cfg: TrainConfig, shapes: Shapes, mesh: Mesh, kernel: Kernel) -> Any:
  """The run's own step, traced on a mesh; `kernel` computes attention."""
  tx = setup.optimizer(cfg)
  # Its keys are arrays, which nobody makes on devices that are not there.
  step = setup.make_step(
    cfg, shapes.model_cfg, tx, shapes.frozen, shapes.state, mesh, kernel
  )
  real = isinstance(mesh, jax.sharding.Mesh)
  with jax.set_mesh(mesh) if real else contextlib.nullcontext():
    return step.trace(shapes.state, shapes.frozen, shapes.batch)


def program(
  cfg: TrainConfig,
  adapters: setup.Adapters,
  mesh: Mesh,
  length: int,
  platform: str,
) -> tuple[Any, Shapes]:
  """The step as each device computes it: a jaxpr, and what it is given.

  The base is whole but for what `tensor` cuts: heads, MLP, vocabulary. Rows are
  a device's own. Attention is opaque.
  """
  ways, cut = parallel.batch_ways(mesh), mesh.shape['tensor']
  own = dataclasses.replace(
    cfg,
    train=dataclasses.replace(
      cfg.train, batch_size=max(1, cfg.train.batch_size // ways)
    ),
  )
  part = _part(adapters.model_cfg, cut)
  alone = parallel.abstract_mesh(1, 1, 1, 1)
  shapes = shapes_of(own, adapters._replace(model_cfg=part), alone, length)
  kernel = setup.attention_kernel(cfg, part, platform)
  attend = functools.partial(opaque.attention, mask=kernel == 'cudnn')
  return traced(own, shapes, alone, attend).jaxpr, shapes


def _part(model_cfg: DecoderConfig, cut: int) -> DecoderConfig:
  """A model of a device's heads, MLP and vocabulary, where these can be cut."""

  def part(n: int) -> int:
    return n if n % cut else n // cut

  return dataclasses.replace(
    model_cfg,
    heads=part(model_cfg.heads),
    kv_heads=part(model_cfg.kv_heads),
    mlp=part(model_cfg.mlp),
    vocab=part(model_cfg.vocab),
  )


def mesh_of(cfg: TrainConfig, n_devices: int) -> Mesh:
  """The run's mesh on so many devices.

  Raises:
    ConfigError: it does not fit them, or cannot cut its batches.
  """
  sizes = cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor
  try:
    mesh = parallel.abstract_mesh(*sizes, n_devices)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  setup.check_batch(cfg, mesh)
  return mesh


def bytes_of(tree: Tree) -> int:
  """Bytes of a tree of shapes on one device."""

  def of(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * getattr(x.dtype, 'itemsize', 8)

  return sum(map(of, jax.tree.leaves(tree)))
