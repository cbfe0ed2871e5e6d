"""adapter_model.safetensors: what PEFT 0.21 calls the tensors of an adapter.

    .lora_A.weight, .lora_B.weight            (r, in), (out, r) of a linear
    .lora_embedding_A, .lora_embedding_B      (r, vocab), (dim, r)
    .lora_magnitude_vector                    (out,), DoRA's
    .weight                                   a module of modules_to_save
    .token_adapter.trainable_tokens_delta     (tokens, dim), whole rows
    .base_layer.weight                        the base's own, carried along

behind `base_model.model.` and the module's name.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax_train.formats.safetensors import TensorRef
from lorax_train.lora import LoraSpec

WEIGHTS_FILE = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
CARRIED = '.base_layer.weight'
MAGNITUDE = '.lora_magnitude_vector'
ROWS = '.token_adapter.trainable_tokens_delta'
WHOLE = '.weight'

# The two modules that are one matrix in some models.
EMBEDDING, HEAD = 'embed_tokens', 'lm_head'
_NONE: Mapping[str, Any] = MappingProxyType({})

_FACTOR = re.compile(r'(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))')


def factor_key(name: str, half: str, embedding: bool = False) -> str:
  """The key of A or B of a module."""
  end = f'embedding_{half}' if embedding else f'{half}.weight'
  return f'{PREFIX}{name}.lora_{end}'


class LoadedAdapter(NamedTuple):
  """A PEFT adapter as read.

  Attributes:
    spec: what it adapts, by PEFT's rules.
    factors: {module name: (A [r, in], B [r, out])} float32; in is the
      vocabulary where the module is an embedding.
    base: base_model_name_or_path, '' if not given.
    carried: {module name: the base's own weight (out, in), saved along}.
    magnitudes: {module name: m [out]} float32, of DoRA.
    trained: {module name: all of its weight, or the trained rows of it in
      ascending order} float32, as Hugging Face stores it.
    tied: see `peft_config.Settings`.
  """

  spec: LoraSpec
  factors: dict[str, tuple[np.ndarray, np.ndarray]]
  base: str
  carried: Mapping[str, TensorRef] = _NONE
  magnitudes: Mapping[str, np.ndarray] = _NONE
  trained: Mapping[str, np.ndarray] = _NONE
  tied: bool = False

  def unties(self) -> bool:
    """Whether a head and an embedding that are one become two under it."""
    rows = self.spec.trainable_token_indices
    touched = {
      name.rpartition('.')[2]
      for name in (*self.factors, *self.trained)
      if not any(name.endswith(table) for table in rows)
    }
    return not self.tied and not touched.isdisjoint((HEAD, EMBEDDING))


class Found(NamedTuple):
  """The tensors of an adapter by what they are.

  Attributes:
    factors: {module: {'A', 'B', 'm'}}.
    embeddings: modules whose factors are those of an embedding.
    carried: {module: the base's own weight}.
    whole: {module: all of its weight}.
    rows: {module: some rows of its weight}.
    unknown: the others, in words.
  """

  factors: dict[str, dict[str, TensorRef]]
  embeddings: set[str]
  carried: dict[str, TensorRef]
  whole: dict[str, TensorRef]
  rows: dict[str, TensorRef]
  unknown: list[str]


def find(refs: Mapping[str, TensorRef]) -> Found:
  """Sorts the tensors of a file; shapes are looked at, numbers are not."""
  found = Found({}, set(), {}, {}, {}, [])
  for key, ref in refs.items():
    name = key.removeprefix(PREFIX)
    factor = _FACTOR.fullmatch(name)
    floating = jnp.issubdtype(ref.dtype, jnp.floating)
    if not key.startswith(PREFIX) or not floating:
      found.unknown.append(f'{key} {ref.dtype}{list(ref.shape)}')
    elif factor and len(ref.shape) == 2:
      half = factor[2] or factor[3]
      found.factors.setdefault(factor[1], {})[half] = ref
      if factor[3]:
        found.embeddings.add(factor[1])
    elif name.endswith(MAGNITUDE) and len(ref.shape) == 1:
      module = name.removesuffix(MAGNITUDE)
      found.factors.setdefault(module, {})['m'] = ref
    elif name.endswith(CARRIED):
      found.carried[name.removesuffix(CARRIED)] = ref
    elif name.endswith(ROWS) and len(ref.shape) == 2:
      found.rows[name.removesuffix(ROWS)] = ref
    elif name.endswith(WHOLE) and '.lora_' not in name:
      found.whole[name.removesuffix(WHOLE)] = ref
    else:
      found.unknown.append(f'{key} {ref.dtype}{list(ref.shape)}')
  return found
