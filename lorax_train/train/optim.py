"""The optimizer: clipping, AdamW on the factors, a schedule, LoRA+."""

import dataclasses

import jax
import optax

from lorax_train import lora


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """See `config.TrainSection`, which has the same names."""

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
  """clip by global norm -> AdamW (Loshchilov & Hutter 2019) -> LoRA+."""
  parts = [
    optax.adamw(
      make_schedule(cfg),
      b1=cfg.beta1,
      b2=cfg.beta2,
      eps=cfg.epsilon,
      weight_decay=cfg.weight_decay,
    )
  ]
  if cfg.clip_norm:
    parts.insert(0, optax.clip_by_global_norm(cfg.clip_norm))
  if cfg.lora_plus_ratio != 1.0:
    parts.append(lora_plus(cfg.lora_plus_ratio))
  return parts[0] if len(parts) == 1 else optax.chain(*parts)


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
