"""What training starts from: weights of files or drawn, as both halves."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_train import config as config_lib
from lorax_train import parallel
from lorax_train.config import TrainConfig
from lorax_train.formats import hf, quantised, safetensors
from lorax_train.lora.halves import key_at
from lorax_train.lora.init import FROM_INPUTS, FROM_LOST
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig
from lorax_train.train import moments, setup
from lorax_train.train.rows import Rows
from lorax_train.train.setup import Adapters

Tree = Any


def fingerprint(
  cfg: TrainConfig, model_dir: Path, model_cfg: DecoderConfig
) -> str:
  """Of the weights that a run starts from.

  Raises:
    ModelError: no weights, and none are to be drawn.
  """
  if cfg.model.init == 'random':
    # They follow from the sizes and the seed, which is a key of the run.
    return hashlib.sha256(repr(model_cfg).encode()).hexdigest()
  return safetensors.fingerprint(safetensors.open_dir(model_dir))


def halves(
  cfg: TrainConfig,
  model_dir: Path,
  adapters: Adapters,
  mesh: jax.sharding.Mesh,
  rows: Rows | None = None,
) -> tuple[Tree, Tree]:
  """(frozen, trainable) of a run before its first step, on the mesh.

  Where every weight is trained, it is the trainable half itself, of which there
  is no copy: in float32, or without gradients in model.param_dtype.

  Args:
    cfg: the run.
    model_dir: of its model.
    adapters: from `setup.plan_adapters`.
    mesh: devices, which jax has been told of.
    rows: the run's, which lora.init=whitened and qera look at.

  Raises:
    ModelError: see `hf.load_params`.
    ConfigError: see `setup.abstract`.
  """
  model_cfg = adapters.model_cfg
  dtype = jnp.dtype(cfg.model.param_dtype)
  if config_lib.trains_all(cfg):
    frozen, _ = setup.abstract(cfg, adapters)
    if cfg.model.init == 'random':
      key = jax.random.key(cfg.train.seed)
      return frozen, random_params(key, model_cfg, mesh)
    own = dtype if adapters.whole else jnp.float32
    return frozen, hf.load_params(model_dir, model_cfg, own, mesh)
  params = hf.load_params(model_dir, model_cfg, dtype, mesh)
  givens = _givens(cfg, model_dir, adapters, params, mesh, rows)
  return setup.split(cfg, params, adapters, givens)


def _givens(
  cfg: TrainConfig,
  model_dir: Path,
  adapters: Adapters,
  params: Tree,
  mesh: jax.sharding.Mesh,
  rows: Rows | None,
) -> setup.Givens | None:
  """What A and B begin from beside the base itself, see `lora.split`."""
  original: setup.Givens | None = None
  of_inputs: setup.Givens | None = None
  if adapters.spec.init in FROM_LOST:
    stored = safetensors.open_dir(model_dir)
    original = quantised.originals(stored, adapters.model_cfg, mesh)
  if adapters.spec.init in FROM_INPUTS and rows is not None:
    of_inputs = moments.of_inputs(cfg, adapters, params, rows, mesh)
  if original is None or of_inputs is None:
    return original or of_inputs
  return lambda path, layer: (original(path, layer), of_inputs(path, layer))


def random_params(
  key: jax.Array, cfg: DecoderConfig, mesh: jax.sharding.Mesh
) -> dict:
  """Weights as transformers begins with them, float32, drawn on the mesh.

  Norms are 1, all others normal with standard deviation `cfg.init_std`. The
  numbers are the same on any mesh.

  Args:
    key: typed PRNG key; each parameter's own is folded in by path.
    cfg: sizes.
    mesh: where they go.
  """
  by_path = {}
  for param in params_lib.table(cfg):
    where = parallel.sharding(
      mesh, param.axes, params_lib.axis_units(cfg, param)
    )
    draw = _draw(params_lib.shape(cfg, param), param.axes[-1] == 'norm', where)
    by_path[param.path] = draw(key_at(key, param.path), cfg.init_std)
  return params_lib.nest(by_path)


def _draw(shape: tuple[int, ...], norm: bool, where: Any) -> Any:
  @functools.partial(jax.jit, out_shardings=where)
  def draw(key, std):
    if norm:
      return jnp.ones(shape, jnp.float32)
    return std * jax.random.normal(key, shape, jnp.float32)

  return draw
