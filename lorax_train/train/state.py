"""The state of a run on a mesh: what is in it, and where each part of it lies."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
    _beside(trainable, of_factors, shapes.opt_state, whole),
  )
  return jax.tree.map(lying, shapes, shardings)


def _beside(
  trainable: Tree, shardings: Tree, opt_state: Tree, whole: NamedSharding
) -> Tree:
  """Where the optimizer's leaves lie, by whose they are and by their shapes.

  A moment lies as its leaf; what has an axis less, as Adafactor's rows and
  columns, lies as the leaf's other axes; the rest is whole everywhere.
  """
  flatten = jax.tree_util.tree_leaves_with_path
  of = {
    path: (x.shape, where)
    for (path, x), where in zip(
      flatten(trainable), jax.tree.leaves(shardings), strict=True
    )
  }

  def place(path: tuple, x: Any) -> NamedSharding:
    ends = (path[i:] for i in range(len(path) + 1))
    shape, where = next((of[end] for end in ends if end in of), ((), whole))
    spec = (*where.spec, *(None,) * (len(shape) - len(where.spec)))
    for left_out in range(len(shape), -1, -1):
      kept = [i for i in range(len(shape)) if i != left_out]
      if x.shape == tuple(shape[i] for i in kept):
        return NamedSharding(where.mesh, P(*(spec[i] for i in kept)))
    return whole

  return jax.tree_util.tree_map_with_path(place, opt_state)


def init_state(
  tx: optax.GradientTransformation,
  trainable: Tree,
  like: TrainState,
  alone: bool = False,
) -> TrainState:
  """The state before the first step, lying as `like` does.

  Args:
    tx: the optimizer.
    trainable: its trainable half.
    like: from `abstract_state`.
    alone: nobody else has these arrays, and no copy of them is made.
  """
  init = jax.jit(
    functools.partial(step_lib.init_state, tx=tx),
    out_shardings=shardings_of(like),
    donate_argnums=0 if alone else (),
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
