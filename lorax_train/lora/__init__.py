"""LoRA as pure functions over pytrees (Hu et al. 2021). Needs jax alone.

from lorax_train import lora

frozen, trainable = lora.split(key, params, lora.LoraSpec('q_proj', rank=8))
grads = jax.grad(lambda t: loss(lora.bind(frozen, t), batch))(trainable)
merged = lora.merge(frozen, trainable)
"""

from lorax_train.lora import algebra, mixing
from lorax_train.lora.halves import (
  bind,
  count,
  fixed_factors,
  is_trained,
  merge,
  path_of,
  spec_of,
  with_fixed_factors,
)
from lorax_train.lora.layout import layout
from lorax_train.lora.matching import adapted, resolve
from lorax_train.lora.spec import LoraSpec, Placement, Whole
from lorax_train.lora.split import split
from lorax_train.lora.transform import LowRankError, transform
from lorax_train.lora.weight import Adapter, Fixed, LoraWeight
from lorax_train.lora.whole import Original, TunedTable, all_whole

__all__ = [
  'Adapter',
  'Fixed',
  'LoraSpec',
  'LoraWeight',
  'LowRankError',
  'Original',
  'Placement',
  'TunedTable',
  'Whole',
  'adapted',
  'algebra',
  'all_whole',
  'bind',
  'count',
  'fixed_factors',
  'is_trained',
  'layout',
  'merge',
  'mixing',
  'path_of',
  'resolve',
  'spec_of',
  'split',
  'transform',
  'with_fixed_factors',
]
