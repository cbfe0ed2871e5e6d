"""A model on disk as a function, its parameters and its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_train import lora, parallel
from lorax_train.data import tokenize
from lorax_train.formats import find, hf, hf_config, peft
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder

Apply = Callable[..., jax.Array]


def load(
  path: str,
  mesh: jax.sharding.Mesh | None = None,
  *,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
) -> tuple[Apply, Any, tokenize.Tokenizer]:
  """Loads a Mistral or Llama model, and an adapter onto it.

  Args:
    path: directory in Hugging Face format, or a hub id.
    mesh: where the weights go; None for the first device.
    adapter: PEFT adapter directory to bind.
    dtype: compute dtype.
    param_dtype: dtype the weights are stored in; None for `dtype`.

  Returns:
    apply: (params, ids [B, T], positions_BT=None, mask_BS=None) -> logits
      [B, T, V] float32.
    params: the weights; adapted ones behave as W + scale A^T B under `@`.
    tokenizer: see `data.tokenize.Tokenizer`.

  Raises:
    ModelError: what is wrong with the files.
  """
  directory = find.find_model(path)
  apply, params = load_params(directory, mesh, adapter, dtype, param_dtype)
  return apply, params, tokenize.load_tokenizer(directory)


def load_params(
  directory: Path,
  mesh: jax.sharding.Mesh | None = None,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
) -> tuple[Apply, Any]:
  """`load` for a directory that may be without a tokenizer."""
  cfg = hf_config.read_config(directory)
  mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
  loaded = None if adapter is None else peft.load_adapter(adapter)
  params = hf.load_params(directory, cfg, param_dtype or dtype, mesh)
  if loaded is not None:
    names = params_lib.module_names(cfg)
    placed = peft.placement(loaded, names)
    frozen, trainable = lora.split(jax.random.key(0), params, placed, names)
    trainable = peft.fill(loaded, frozen, trainable, names)
    params = lora.bind(frozen, trainable)
  model: Any = Decoder(cfg, dtype)

  def apply(params, ids_BT, positions_BT=None, mask_BS=None):
    return model.apply({'params': params}, ids_BT, positions_BT, mask_BS)

  return apply, params
