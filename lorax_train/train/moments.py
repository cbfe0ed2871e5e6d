"""Second moments of the inputs of a run's targets, over some of its rows."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lorax_train import lora
from lorax_train.lora import inputs
from lorax_train.lora.halves import is_weight
from lorax_train.train import setup
from lorax_train.train import step as step_lib
from lorax_train.train.rows import Rows

Tree = Any

# Rows looked at: the first that the run trains on, ROWS of them, or fewer where a
# matrix of each target, in the mean over layers, has INPUTS inputs for each `in`.
ROWS = 256
INPUTS = 4


def of_inputs(
  cfg: setup.TrainConfig,
  adapters: setup.Adapters,
  params: Tree,
  rows: Rows,
  mesh: jax.sharding.Mesh,
) -> setup.Givens:
  """(path, layer) -> mean of x x^T, [in, in], over the inputs of a target.

  Inputs are those at tokens that the loss depends on.

  Args:
    cfg: the run.
    adapters: from `setup.plan_adapters`.
    params: the base, on the mesh.
    rows: the run's.
    mesh: devices.
  """
  kernel = setup.attention_kernel(
    cfg, adapters.model_cfg, mesh.devices.flat[0].platform
  )
  apply = setup.make_apply(cfg, adapters.model_cfg, kernel)
  loss = step_lib.make_loss(apply, loss_chunk=cfg.train.loss_chunk)
  none = jax.tree.map(lambda _: None, params, is_leaf=is_weight)

  def total(of: dict[str, inputs.Moments], params: Tree, batch: Tree) -> Any:
    frozen = inputs.watched(params, of)
    losses = jax.lax.map(lambda own: loss(none, frozen, own, None)[0], batch)
    return jnp.sum(losses)

  paths = {
    path
    for path, names in adapters.names.items()
    if any(isinstance(adapters.placed.get(n), lora.Placement) for n in names)
  }
  zeros = inputs.no_moments(params, paths)

  @jax.jit
  def add(found: Tree, params: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
    seen = jax.grad(total)(zeros, params, batch)
    found = jax.tree.map(jnp.add, found, seen)
    each = [jnp.mean(m.count) / m.total.shape[-1] for m in found.values()]
    return found, jnp.min(jnp.stack(each))

  found = zeros
  rows_a_step = cfg.train.grad_accum * cfg.train.batch_size
  for step in range(math.ceil(ROWS / rows_a_step)):
    batch, _ = rows.batch(cfg, mesh, step)
    # One at a time: collectives of programs that wait in line for CPU devices
    # can wait for each other.
    found, fewest = add(found, params, batch)
    if float(fewest) >= INPUTS:
      break

  def mean(path: str, layer: int) -> jax.Array:
    total, count = found[path]
    if total.ndim > 2:
      total, count = total[layer], count[layer]
    return total / jnp.maximum(count, 1.0)

  return mean
