"""A Hugging Face model directory from parameters: the inverse of hf.py.

Everything that is not a weight is the source directory's own: its config.json
with the dtype changed, its tokenizer, its generation_config.json. The
directory is built under another name and moved in one step.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax_train import lora
from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import hf_config, safetensors
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.formats.whole import whole
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, Param

SHARD_BYTES = 4_000_000_000
# What belongs to a model beside its weights and config.json.
COPIED = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
)


class _Tensor(NamedTuple):
  """A tensor to be written: stack index `layer` of `param`."""

  name: str
  param: Param
  layer: int
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes on disk."""
    return math.prod(self.shape) * self.dtype.itemsize


def save_params(
  directory: str | os.PathLike,
  source: Path,
  params: Any,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
  files: Mapping[str, bytes] | None = None,
) -> int:
  """Writes a model directory that transformers, and `hf.load_params`, read.

  A weight under an adapter is written as W + scale A^T B, summed in float32
  and rounded once, one layer at a time: the sum of all is never held.

  Args:
    directory: must not exist.
    source: the directory that the parameters came from.
    params: as `hf.load_params` gives them; some may be `LoraWeight`s, or
      others that have `merged`. Of a quantised one what it stands for is
      written. With a head of its own, where `source` ties
      it, the written model ties it no more.
    dtype: what to store; None for what each tensor has in `source`, where it is
      quantised for that of the embedding. Load in
      `exact_dtype`, or it is rounded twice.
    shard_bytes: above this much, several files and an index.
    files: {name: content} of what to write in place of the source's own.

  Returns:
    The number of parameters.

  Raises:
    ConfigError: `directory` exists.
    ModelError: numbers that are not finite in `dtype`.
    OSError: disk full, no rights; nothing is left behind.
  """
  directory = Path(directory)
  check_absent(directory)
  with whole(directory, 'model not written') as building:
    return write(building, source, params, dtype, shard_bytes, files)


def write(
  building: Path,
  source: Path,
  params: Any,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
  files: Mapping[str, bytes] | None = None,
) -> int:
  """`save_params` into an empty directory that is there."""
  cfg, parted = _written_config(source, params)
  shards = _shards(_tensors(cfg, source, dtype), shard_bytes)
  _write_weights(building, shards, params)
  _write_config(building, source, dtype, parted)
  for name in COPIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, building / name)
  for name, content in (files or {}).items():
    (building / name).write_bytes(content)
  return params_lib.total(cfg)


def equals(directory: Path, source: Path, params: Any, dtype: Any) -> bool:
  """Whether what `write` has written reads back as it was, bit for bit."""
  refs = safetensors.open_dir(directory)
  by_path = _by_path(params)
  cfg, _ = _written_config(source, params)
  tensors = _tensors(cfg, source, dtype)
  if refs.keys() != {t.name for t in tensors}:
    return False
  for tensor in tensors:
    want = _array(tensor, by_path[tensor.param.path])
    got = refs[tensor.name].read()
    if not np.array_equal(got.view(np.uint8), want.view(np.uint8)):
      return False
  return True


def _written_config(source: Path, params: Any) -> tuple[DecoderConfig, bool]:
  """The model as it is written, and whether it has parted what was tied."""
  cfg = hf_config.read_config(source)
  parted = cfg.tied and 'lm_head' in params
  return dataclasses.replace(cfg, tied=cfg.tied and not parted), parted


def check_absent(directory: str | os.PathLike) -> None:
  """Refuses to write where there is something already.

  Raises:
    ConfigError: there is.
  """
  if os.path.lexists(directory):
    raise ConfigError(
      f'{directory} exists already: name another directory, or remove it first'
    )


def exact_dtype(source: Path, dtype: Any = None) -> np.dtype:
  """The dtype to load in, so that saving in `dtype` rounds once.

  The stored one, where it is that of all and stays so; else float32, which
  holds all of them.
  """
  stored = {ref.dtype for ref in safetensors.open_dir(source).values()}
  wanted = stored if dtype is None else {np.dtype(dtype)}
  if len(stored) == 1 and stored == wanted and max(stored).itemsize <= 4:
    return stored.pop()
  return np.dtype(np.float32)


def _tensors(cfg: DecoderConfig, source: Path, dtype: Any) -> list[_Tensor]:
  """Everything to be written, in the order of the table, layer by layer."""
  refs = safetensors.open_dir(source) if dtype is None else {}
  tensors = []
  for param in params_lib.table(cfg):
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    for layer, name in enumerate(params_lib.hf_names(cfg, param)):
      stored = np.dtype(dtype) if dtype else _stored_dtype(refs, name)
      tensors.append(_Tensor(name, param, layer, shape, stored))
  return sorted(tensors, key=lambda t: t.layer)


def _stored_dtype(refs: Mapping[str, TensorRef], name: str) -> np.dtype:
  """A tensor's own, or the embedding's where it is quantised.

  A tied matrix may be stored under either name.
  """
  for other in (name, 'model.embed_tokens.weight', 'lm_head.weight'):
    if other in refs and jnp.issubdtype(refs[other].dtype, jnp.floating):
      return refs[other].dtype
  raise AssertionError('a model without an embedding was loaded')


def _shards(tensors: Sequence[_Tensor], limit: int) -> dict[str, list[_Tensor]]:
  """{file name: its tensors}; a file passes the limit by one tensor alone."""
  groups: list[list[_Tensor]] = [[]]
  size = 0
  for tensor in tensors:
    if groups[-1] and size + tensor.nbytes > limit:
      groups.append([])
      size = 0
    groups[-1].append(tensor)
    size += tensor.nbytes
  if len(groups) == 1:
    return {'model.safetensors': groups[0]}
  return {
    f'model-{n:05}-of-{len(groups):05}.safetensors': group
    for n, group in enumerate(groups, 1)
  }


def _write_weights(
  directory: Path, shards: Mapping[str, Sequence[_Tensor]], params: Any
) -> None:
  by_path = _by_path(params)
  for file, tensors in shards.items():
    arrays = {t.name: _array(t, by_path[t.param.path]) for t in tensors}
    bad = [n for n, x in arrays.items() if not np.isfinite(x).all()]
    if bad:
      raise ModelError(
        f'numbers that {tensors[0].dtype} cannot hold in {few(bad)}: write'
        ' float32'
      )
    save_file(arrays, directory / file, metadata={'format': 'pt'})
  if len(shards) > 1:
    every = [tensor for tensors in shards.values() for tensor in tensors]
    index = {
      'metadata': {'total_size': sum(t.nbytes for t in every)},
      'weight_map': {t.name: f for f, ts in shards.items() for t in ts},
    }
    _write_json(directory / 'model.safetensors.index.json', index)


def _by_path(params: Any) -> dict[str, Any]:
  return {
    lora.path_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=_is_made
    )
  }


@np.errstate(over='ignore')  # what is past the dtype is not finite, and named
def _array(tensor: _Tensor, leaf: Any) -> np.ndarray:
  """One layer's matrix as Hugging Face stores it."""
  if tensor.param.stacked:
    leaf = jax.tree.map(lambda x: x[tensor.layer], leaf)
  if hasattr(leaf, 'merged'):
    # In true float32 on any device, where the default may be less.
    with jax.default_matmul_precision('highest'):
      leaf = leaf.merged()
  elif hasattr(leaf, 'dequantised'):
    leaf = leaf.dequantised(jnp.float32)
  array = np.asarray(leaf)
  array = array.T if tensor.param.linear else array
  return np.ascontiguousarray(array.astype(tensor.dtype))


def _is_made(leaf: Any) -> bool:
  """A weight that is a sum, has rows of its own, or is quantised."""
  return hasattr(leaf, 'merged') or hasattr(leaf, 'dequantised')


def _write_config(
  directory: Path, source: Path, dtype: Any, parted: bool
) -> None:
  """The source's config.json, saying what the weights are now."""
  raw = read_object(source / 'config.json')
  raw.pop('quantization_config', None)  # nothing is, of what we write
  if parted:
    raw['tie_word_embeddings'] = False
  if dtype is not None:
    # transformers 5 writes `dtype` and reads both, older ones `torch_dtype`.
    keys = [key for key in ('dtype', 'torch_dtype') if key in raw]
    raw |= dict.fromkeys(keys or ['torch_dtype'], np.dtype(dtype).name)
  _write_json(directory / 'config.json', raw)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
