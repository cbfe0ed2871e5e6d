"""Hugging Face model directories: found, checked, and put onto a mesh."""

import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train import parallel
from lorax_train.errors import ModelError
from lorax_train.formats import safetensors
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, Param

# Buffers that old checkpoints carry and nobody reads.
_IGNORED_SUFFIX = '.rotary_emb.inv_freq'


def find_model(path: str, remedy: str = 'give a local directory') -> Path:
  """A model directory: `path` itself, or the hub's copy of a repo id.

  Local paths touch no network. For a repo id only the files that we read are
  fetched: configs, tokenizer and safetensors.

  Args:
    path: as the user gave it.
    remedy: what to do where the hub can't be reached.

  Raises:
    ModelError: no such directory, or the hub can't be reached or refuses.
  """
  local = Path(os.path.expanduser(path))
  if local.is_dir():
    return local
  looks_local = path.startswith(('.', '/', '~')) or path.count('/') != 1
  if local.exists() or looks_local:
    what = 'is a file' if local.exists() else 'no such directory'
    raise ModelError(
      f'model {path}: {what}; give a directory with config.json and'
      ' safetensors, or a hub id such as mistralai/Mistral-7B-v0.1'
    )
  return _download(path, remedy)


def _download(repo_id: str, remedy: str) -> Path:
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repo_id,
        allow_patterns=[
          '*.json',
          'model*.safetensors',
          'tokenizer.model',
          '*.jinja',
        ],
        etag_timeout=5,
      )
    )
  except Exception as error:  # the hub's clients raise kinds of their own
    kind = type(error).__name__
    if 'Gated' in kind:
      remedy = f'accept its terms at the hub page of {repo_id} and set HF_TOKEN'
    raise ModelError(
      f'model {repo_id}: cannot be had from the hub ({kind}); {remedy}'
    ) from None


def load_params(
  directory: Path,
  cfg: DecoderConfig,
  dtype: Any,
  mesh: jax.sharding.Mesh,
) -> dict:
  """The weights of a model directory, on the mesh.

  Each device's part of each parameter is read from the files by byte range
  and cast on arrival; linears are transposed to [in, out] and layers stacked.

  Args:
    directory: with safetensors.
    cfg: from `hf_config.read_config`.
    dtype: dtype to store the weights in.
    mesh: where they go.

  Returns:
    The tree of `params.abstract(cfg, dtype)`.

  Raises:
    ModelError: names every tensor that is missing, too many, of another
      shape or not finite.
  """
  sources = _match(directory, cfg, safetensors.open_dir(directory))
  by_path = {}
  for param in params_lib.table(cfg):
    sharding = parallel.sharding(
      mesh, param.axes, params_lib.axis_units(cfg, param)
    )
    by_path[param.path] = jax.make_array_from_callback(
      params_lib.shape(cfg, param),
      sharding,
      _reader(param, sources[param.path], np.dtype(dtype)),
    )
  _check_finite(directory, cfg, by_path, sources, mesh)
  return params_lib.nest(by_path)


def _reader(
  param: Param, refs: Sequence[TensorRef], dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
  """What brings one device's slice of a parameter from the files."""

  def one(ref: TensorRef, index: Sequence[slice]) -> np.ndarray:
    if param.linear:
      return ref.read(index[::-1]).T
    return ref.read(index)

  @np.errstate(over='ignore')  # what is past the dtype is not finite, and named
  def read(index: tuple[slice, ...]) -> np.ndarray:
    if not param.stacked:
      return one(refs[0], index).astype(dtype)
    layers = refs[index[0]]
    parts = (one(ref, index[1:]) for ref in layers)
    first = next(parts)
    out = np.empty((len(layers), *first.shape), dtype)
    out[0] = first
    for i, part in enumerate(parts, 1):
      out[i] = part
    return out

  return read


def _match(
  directory: Path, cfg: DecoderConfig, refs: Mapping[str, TensorRef]
) -> dict[str, tuple[TensorRef, ...]]:
  """{path: its tensors in stack order}; every disagreement in one error."""
  refs = dict(refs)
  _settle_tied(directory, cfg, refs)
  problems: list[str] = []
  sources = {}
  used: set[str] = set()
  for param in params_lib.table(cfg):
    names = params_lib.hf_names(cfg, param)
    used.update(names)
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    for name in names:
      problems += _disagreement(name, shape, refs)
    sources[param.path] = tuple(refs[n] for n in names if n in refs)
  extra = [
    name
    for name in refs
    if name not in used and not name.endswith(_IGNORED_SUFFIX)
  ]
  if extra:
    problems.append(
      f'tensors that a model of this config.json has not: {few(extra)}'
    )
  if problems:
    raise ModelError(f'{directory}: {few(problems, 20)}')
  return sources


def _disagreement(
  name: str, shape: tuple[int, ...], refs: Mapping[str, TensorRef]
) -> list[str]:
  ref = refs.get(name)
  if ref is None:
    near = difflib.get_close_matches(name, refs, 1, 0.9)
    hint = f' (there is {near[0]})' if near else ''
    return [f'{name} is missing{hint}']
  if ref.shape != shape:
    return [f'{name} has shape {ref.shape}, config.json says {shape}']
  if not jnp.issubdtype(ref.dtype, jnp.floating):
    return [f'{name} is {ref.dtype}, not a float']
  return []


def _settle_tied(
  directory: Path, cfg: DecoderConfig, refs: dict[str, TensorRef]
) -> None:
  """A tied matrix may be stored under either name, or twice and equal."""
  embed, head = 'model.embed_tokens.weight', 'lm_head.weight'
  if not cfg.tied or head not in refs:
    return
  stored = refs.pop(head)
  kept = refs.setdefault(embed, stored)
  if kept is not stored and not np.array_equal(kept.read(), stored.read()):
    raise ModelError(
      f'{directory}: config.json ties the embeddings but {embed} and {head}'
      ' differ: set tie_word_embeddings to false, or drop one of them'
    )


def _check_finite(
  directory: Path,
  cfg: DecoderConfig,
  by_path: Mapping[str, jax.Array],
  sources: Mapping[str, Sequence[TensorRef]],
  mesh: jax.sharding.Mesh,
) -> None:
  """No NaN or infinity in the base: they would surface as a bad loss."""
  finite = _finite(mesh)
  bad = []
  for param in params_lib.table(cfg):
    axes = tuple(range(1 if param.stacked else 0, len(param.axes)))
    fine = np.asarray(finite(by_path[param.path], axes))
    refs = sources[param.path]
    bad += [ref.name for ref, ok in zip(refs, fine, strict=True) if not ok]
  if bad:
    raise ModelError(f'{directory}: weights that are not finite: {few(bad)}')


@functools.cache
def _finite(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  """(x, axes) -> whether all of x over these axes is finite, [...] or [1]."""
  # Every host of a run needs the answer, whoever holds the weights.
  return jax.jit(
    lambda x, axes: jnp.atleast_1d(jnp.isfinite(x).all(axes)),
    static_argnums=1,
    out_shardings=parallel.replicated(mesh),
  )
