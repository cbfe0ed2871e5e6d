"""The optimizer: clipping, AdamW and others, a schedule, LoRA+.

Leaves under `layers` are stacks, [L, ...]: what looks at whole matrices or
tensors (Adafactor, Muon) looks at each layer's own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from lorax_train import lora

Tree = Any

_STACKS = 'layers'
# Of Muon's update, an orthogonal matrix, the root mean square is made that of
# Adam's, so that one rate does for both (Liu et al. 2025, section 2.2).
_MUON_RMS = 0.2
# Of the largest root mean square of an update of Adafactor's.
_ADAFACTOR_CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """See `config.TrainSection`, which has the same names.

  Attributes:
    full: every weight is trained, and none of them is an adapter's.
  """

  steps: int
  learning_rate: float
  schedule: str = 'constant'
  warmup_steps: int = 0
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  clip_norm: float = 0.0
  lora_plus_ratio: float = 1.0
  optimizer: str = 'adamw'
  momentum: float = 0.95
  full: bool = False


def make_schedule(cfg: OptimConfig) -> optax.Schedule:
  """Learning rate of step 0, 1, ...: transformers' schedules of that name.

  A linear rise from 0 over `warmup_steps`, then constant, or linear or half a
  cosine to 0 at `steps`.
  """
  peak, rest = cfg.learning_rate, max(cfg.steps - cfg.warmup_steps, 1)
  after = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest),
  }[cfg.schedule]()
  if not cfg.warmup_steps:
    return after
  rise = optax.linear_schedule(0.0, peak, cfg.warmup_steps)
  return optax.join_schedules([rise, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
  """clip by global norm -> the optimizer, with decoupled decay -> LoRA+.

  AdamW (Loshchilov & Hutter 2019); Adafactor (Shazeer & Stern 2018) without its
  relative steps, as transformers' Trainer has it; Muon (Jordan et al. 2024) of
  the layers' matrices, AdamW of the rest; Lion (Chen et al. 2023); SGD with
  momentum.
  """
  rule = {
    'adamw': _adamw,
    'adafactor': _adafactor,
    'muon': _muon,
    'lion': _lion,
    'sgd': _sgd,
  }[cfg.optimizer]
  parts = [rule(cfg)]
  if cfg.clip_norm:
    parts.insert(0, optax.clip_by_global_norm(cfg.clip_norm))
  if cfg.lora_plus_ratio != 1.0:
    parts.append(lora_plus(cfg.lora_plus_ratio))
  return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _adamw(cfg: OptimConfig) -> optax.GradientTransformation:
  return optax.adamw(
    make_schedule(cfg),
    b1=cfg.beta1,
    b2=cfg.beta2,
    eps=cfg.epsilon,
    weight_decay=cfg.weight_decay,
    mask=_decayed(cfg),
  )


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
  rule = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(_ADAFACTOR_CLIP),
  )
  return _followed(cfg, by_layer(rule, rule))


def _muon(cfg: OptimConfig) -> optax.GradientTransformation:
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)
  muon = optax.chain(
    optax.contrib.scale_by_muon(
      beta=cfg.momentum, weight_dimension_numbers=_as_matrices
    ),
    optax.stateless(
      lambda updates, _: jax.tree.map(
        lambda x: x * _MUON_RMS * math.sqrt(max(x.shape)), updates
      )
    ),
  )
  of_layer = optax.partition(
    {'muon': muon, 'adam': adam},
    lambda params: jax.tree.map(
      lambda x: 'muon' if x.ndim == 2 else 'adam', params
    ),
  )
  return _followed(cfg, by_layer(of_layer, adam, in_turn=True))


def _as_matrices(params: Tree) -> Tree:
  """That they are, each."""
  return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def _lion(cfg: OptimConfig) -> optax.GradientTransformation:
  return _followed(cfg, optax.scale_by_lion(cfg.beta1, cfg.beta2))


def _sgd(cfg: OptimConfig) -> optax.GradientTransformation:
  momentum = optax.trace(cfg.momentum)
  return _followed(cfg, momentum if cfg.momentum else optax.identity())


def _followed(
  cfg: OptimConfig, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
  """A rule, then decay, then the rate: w is made less by rate * decay * w."""
  return optax.chain(
    rule,
    optax.add_decayed_weights(cfg.weight_decay, _decayed(cfg)),
    optax.scale_by_learning_rate(make_schedule(cfg)),
  )


def _decayed(cfg: OptimConfig) -> Callable[[Tree], Tree] | None:
  """Which leaves decay: of all weights none that is a vector, of factors all."""
  if not cfg.full:
    return None
  return lambda params: _by_leaf(
    lambda stacked, x: x.ndim - stacked > 1, params
  )


def by_layer(
  of_layer: optax.GradientTransformation,
  of_rest: optax.GradientTransformation,
  in_turn: bool = False,
) -> optax.GradientTransformation:
  """One transformation of each layer's leaves, another of all others.

  Its state is a pair: of the stacks, with L in front of everything, a list by
  their lengths; and of the rest.

  Args:
    of_layer: for the leaves of a layer, without L.
    of_rest: for leaves that are no stack.
    in_turn: layers one after the other: what a rule makes of a matrix on its way,
      or puts together from a mesh, is there for one of them at a time.
  """

  def init(params: Tree) -> tuple[Tree, Tree]:
    stacks, rest = _parted(params)
    each = _by_length(stacks)
    return list(map(jax.vmap(of_layer.init), each)), of_rest.init(rest)

  def of_stack(args: tuple[Tree, Tree, Tree]) -> tuple[Tree, Tree]:
    if in_turn:
      return jax.lax.map(lambda one: of_layer.update(*one), args)
    return jax.vmap(of_layer.update)(*args)

  def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
    (stacks, rest), (own, own_rest) = _parted(updates), _parted(params)
    each = zip(_by_length(stacks), state[0], _by_length(own), strict=True)
    of_stacks = list(map(of_stack, each))
    of_others = of_rest.update(rest, state[1], own_rest)
    joined = jax.tree.map(
      lambda _, *found: next((x for x in found if x is not None), None),
      updates, of_others[0], *(found for found, _ in of_stacks),
      is_leaf=lambda x: x is None,
    )  # fmt: skip
    return joined, ([own for _, own in of_stacks], of_others[1])

  return optax.GradientTransformation(init, update)


def _by_length(stacks: Tree) -> list[Tree]:
  """The stacks of each length, None where one has another.

  All have the model's layers but those of which some layers alone are trained.
  """
  lengths = sorted({len(x) for x in jax.tree.leaves(stacks)})
  return [
    jax.tree.map(lambda x, n=n: x if len(x) == n else None, stacks)
    for n in lengths
  ]


def _parted(tree: Tree) -> tuple[Tree, Tree]:
  """(stacks, the rest): None in each where the other has a leaf."""
  return (
    _by_leaf(lambda stacked, x: x if stacked else None, tree),
    _by_leaf(lambda stacked, x: None if stacked else x, tree),
  )


def _by_leaf(function: Callable[[bool, Any], Any], tree: Tree) -> Tree:
  """A tree of function(is a stack, leaf)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: function(
      lora.path_of(path).partition('/')[0] == _STACKS, x
    ),
    tree,
  )


def lora_plus(ratio: float) -> optax.GradientTransformation:
  """B's updates times `ratio`: LoRA+ (Hayou et al. 2024)."""

  def faster(x):
    is_adapter = isinstance(x, lora.Adapter)
    return dataclasses.replace(x, b=x.b * ratio) if is_adapter else x

  return optax.stateless(
    lambda updates, _: jax.tree.map(
      faster, updates, is_leaf=lambda x: isinstance(x, lora.Adapter)
    )
  )
