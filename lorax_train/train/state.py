"""The state of a run on a mesh: what is in it, and where each part of it lies."""

import functools
from typing import Any

import jax
import optax

from lorax_train import parallel
from lorax_train.train import step as step_lib
from lorax_train.train.step import TrainState

Tree = Any


def abstract_state(
  tx: optax.GradientTransformation,
  frozen: Tree,
  trainable: Tree,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """The state as shapes, each with where it lies; the halves may be shapes."""
  of_factors = parallel.trainable_shardings(frozen, trainable)
  whole = parallel.replicated(mesh)
  shapes = jax.eval_shape(functools.partial(step_lib.init_state, tx=tx), trainable)  # fmt: skip
  shardings = TrainState(
    whole,
    of_factors,
    optax.tree_utils.tree_map_params(
      tx,
      lambda _, sharding: sharding,
      shapes.opt_state,
      of_factors,
      transform_non_params=lambda _: whole,
    ),
  )
  return jax.tree.map(lying, shapes, shardings)


def init_state(
  tx: optax.GradientTransformation, trainable: Tree, like: TrainState
) -> TrainState:
  """The state before the first step, lying as `like` does."""
  init = jax.jit(
    functools.partial(step_lib.init_state, tx=tx),
    out_shardings=shardings_of(like),
  )
  return init(trainable)


def lying(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  """An array, or shape, as a shape that lies there."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def shapes_of(tree: Tree) -> Tree:
  """A tree of arrays as shapes, each with where it lies."""
  return jax.tree.map(lambda x: lying(x, x.sharding), tree)


def shardings_of(tree: Tree) -> Tree:
  """Where each array, or shape, of a tree lies."""
  return jax.tree.map(lambda x: x.sharding, tree)
