"""Hugging Face model directories: checked, and put onto a mesh."""

import concurrent.futures
import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train import parallel, together
from lorax_train.errors import ModelError
from lorax_train.formats import hf_config, quantised, safetensors
from lorax_train.formats import parts as parts_lib
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, Param

# Buffers that old checkpoints carry and nobody reads.
_IGNORED_SUFFIX = '.rotary_emb.inv_freq'
# Layers of a parameter that are read at the same time.
_READERS = min(8, os.cpu_count() or 1)


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
  refs = safetensors.open_dir(directory)
  sources = _match(directory, cfg, refs)
  by_path = {}
  bad: list[str] = []
  with together.together():
    for param in params_lib.table(cfg):
      path, names = param.path, params_lib.hf_names(cfg, param)
      like = quantised.lying(
        params_lib.abstract_leaf(cfg, param, np.dtype(dtype)),
        parallel.sharding(mesh, param.axes, params_lib.axis_units(cfg, param)),
      )
      if params_lib.quant_of(cfg, param) == 'none':
        by_path[path] = _load(param, sources[path], like)
      else:
        by_path[path], odd = quantised.load(
          like, names, refs, cfg.quant, _READERS
        )
        bad += odd
  _check_finite(directory, cfg, by_path, sources, mesh, bad)
  return params_lib.nest(by_path)


def check_headers(directory: Path, cfg: DecoderConfig) -> int:
  """Compares names, shapes and dtypes of the weights with config.json.

  Of the weights themselves only those are read that the model ties and that are
  stored twice.

  Returns:
    How many tensors there are.

  Raises:
    ModelError: names every tensor that is missing, too many or of another shape.
  """
  sources = _match(directory, cfg, safetensors.open_dir(directory))
  return sum(map(len, sources.values()))


def _load(
  param: Param, refs: Sequence[TensorRef], like: jax.ShapeDtypeStruct
) -> jax.Array:
  """One parameter: the parts that our devices hold, each read once."""
  rooms = parts_lib.rooms(like)

  @np.errstate(over='ignore')  # what is past the dtype is not finite, and named
  def read(layer: int) -> None:
    wanted = []
    for place, part in rooms.items():
      index, out = parts_lib.slices(place), part
      if param.stacked:  # no mesh axis cuts `layers`
        index, out = index[1:], part[layer]
      wanted.append((index[::-1], out.T) if param.linear else (index, out))
    refs[layer].read_into(wanted)

  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    list(pool.map(read, range(len(refs))))  # raises what a reader raised
  # On its way to an accelerator, one parameter at a time is in our memory.
  return jax.block_until_ready(parts_lib.on_mesh(like, rooms))


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
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    stored = cfg.quant.stored and params_lib.quant_of(cfg, param) != 'none'
    for name in names:
      if stored:
        used.update(quantised.names_of(name, cfg.quant))
        problems += quantised.disagreements(name, shape, refs, cfg.quant)
      else:
        used.add(name)
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
  """A tied matrix may be stored under either name, or twice and equal.

  Where `cfg` has parted what the files tie, both names get the same tensor.
  """
  embed, head = 'model.embed_tokens.weight', 'lm_head.weight'
  stored = [refs[name] for name in (embed, head) if name in refs]
  tied = cfg.tied or hf_config.read_config(directory).tied
  if not tied or not stored:
    return
  if len(stored) == 2 and not np.array_equal(
    stored[0].read(), stored[1].read()
  ):
    raise ModelError(
      f'{directory}: config.json ties the embeddings but {embed} and {head}'
      ' differ: set tie_word_embeddings to false, or drop one of them'
    )
  refs.pop(head, None)
  refs[embed] = stored[0]
  if not cfg.tied:
    refs[head] = stored[0]


def _check_finite(
  directory: Path,
  cfg: DecoderConfig,
  by_path: Mapping[str, Any],
  sources: Mapping[str, Sequence[TensorRef]],
  mesh: jax.sharding.Mesh,
  bad: Sequence[str],
) -> None:
  """No NaN or infinity in the base: they would surface as a bad loss.

  Matrices that were quantised were looked at before, and are `bad`.
  """
  finite = _finite(mesh)
  bad = [*bad]
  for param in params_lib.table(cfg):
    if params_lib.quant_of(cfg, param) != 'none':
      continue
    axes = tuple(range(1 if param.stacked else 0, len(param.axes)))
    fine = np.asarray(finite(by_path[param.path], axes))
    refs = sources[param.path]
    bad += [ref.name for ref, ok in zip(refs, fine, strict=True) if not ok]
  if bad:
    raise ModelError(f'{directory}: weights that are not finite: {few(bad)}')


@functools.cache
def _finite(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  """(x, axes) -> whether all of x over these axes is finite, [...] or [1]."""
  # Every host of a run needs the answer, whoever holds the weights. A number
  # times 0 is 0 where it is finite and NaN where it isn't. On a CPU,
  # isfinite(x).all() would hold as many booleans, and max() may lose a NaN.
  return jax.jit(
    lambda x, axes: jnp.atleast_1d((x * 0).sum(axes, dtype=jnp.float32) == 0),
    static_argnums=1,
    out_shardings=parallel.replicated(mesh),
  )
