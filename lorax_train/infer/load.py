"""A model on disk as a function, its parameters and its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_train import lora, parallel
from lorax_train.data import tokenize
from lorax_train.formats import find, hf, hf_config, peft, quant_config
from lorax_train.models.attention import plain_attention
from lorax_train.models.mistral import Decoder
from lorax_train.models.params import DecoderConfig

Apply = Callable[..., jax.Array]


def load(
  path: str,
  mesh: jax.sharding.Mesh | None = None,
  quant: str | None = None,
  *,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
) -> tuple[Apply, Any, tokenize.Tokenizer]:
  """Loads a Mistral or Llama model, and an adapter onto it.

  Args:
    path: directory in Hugging Face format, or a hub id.
    mesh: where the weights go; None for the first device.
    quant: how the linears of the layers are stored, 'nf4' or 'int8'; None for
      what the files have.
    adapter: PEFT adapter directory to bind.
    dtype: compute dtype.
    param_dtype: dtype the weights are stored in; None for `dtype`.

  Returns:
    apply: (params, ids [B, T], positions_BT=None, mask_BS=None) -> logits
      [B, T, V] float32. It can be differentiated at any order and in either
      mode, for which attention holds T x T scores.
    params: the weights; adapted ones behave as W + scale A^T B under `@`.
    tokenizer: see `data.tokenize.Tokenizer`.

  Raises:
    ConfigError: another `quant` than the files have.
    ModelError: what is wrong with the files.
  """
  directory = find.find_model(path)
  model = load_model(directory, mesh, adapter, dtype, param_dtype, quant)
  return model.apply, model.params, tokenize.load_tokenizer(directory)


class Model(NamedTuple):
  """A model under an adapter.

  Attributes:
    cfg: of the model as the adapter sees it: a head that the files tie to the
      embedding may be a leaf of its own.
    apply: see `load`.
    params: the weights under the adapter.
    base: the weights without it.
  """

  cfg: DecoderConfig
  apply: Apply
  params: Any
  base: Any


def load_model(
  directory: Path,
  mesh: jax.sharding.Mesh | None = None,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  quant: str | None = None,
) -> Model:
  """`load` for a directory that may be without a tokenizer."""
  cfg = quant_config.as_asked(hf_config.read_config(directory), quant)
  mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
  param_dtype = param_dtype or dtype
  if adapter is None:
    params = base = hf.load_params(directory, cfg, param_dtype, mesh)
  else:
    loaded = peft.load_adapter(adapter)
    cfg, loaded, placed = peft.on_model(loaded, cfg)
    base = hf.load_params(directory, cfg, param_dtype, mesh)
    params = lora.bind(*peft.attach(loaded, placed, cfg, base))
  model: Any = Decoder(cfg, dtype, kernel=plain_attention)

  def apply(params, ids_BT, positions_BT=None, mask_BS=None):
    return model.apply({'params': params}, ids_BT, positions_BT, mask_BS)

  return Model(cfg, apply, params, base)


def load_params(
  directory: Path,
  mesh: jax.sharding.Mesh | None = None,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  quant: str | None = None,
) -> tuple[Apply, Any]:
  """(apply, params) of `load_model`."""
  model = load_model(directory, mesh, adapter, dtype, param_dtype, quant)
  return model.apply, model.params
