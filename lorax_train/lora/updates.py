"""dW without its base, and rules applied to several of them at each path.

What `algebra` and `mixing` stand on. An update is a tree with the outline of
`params`: where there is an adapter, an `Update`; None elsewhere.

Axis letters: R rank, I and O all axes `in` and all axes `out` of a weight,
flattened. `...` are the stack axes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora import axes as axes_lib
from lorax_train.lora.halves import path_of

Array = Any
Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
  """One weight's dW = scale A^T B: an adapter without its base.

  Attributes:
    a: [*stack, R, *in] float32.
    b: [*stack, R, *out] float32.
    scale: [*stack] float32. Kept apart: methods that work on the factors give
      other results where it is folded into one of them.
    ranks: the true rank of each stack index, row-major; static.
  """

  a: Array
  b: Array
  scale: Array
  ranks: tuple[int, ...]


jax.tree_util.register_dataclass(
  Update, data_fields=['a', 'b', 'scale'], meta_fields=['ranks']
)


def is_end(x: Any) -> bool:
  """Where the outline of an update ends."""
  return x is None or isinstance(x, Update)


class Term(NamedTuple):
  """What a rule is told of one update at one path."""

  number: int
  path: str
  weight: Array
  update: Update  # its axes in and out flattened: [..., R, I] and [..., R, O]


def outline(u: Update) -> tuple[tuple[int, ...], ...]:
  """The shapes (*stack), (*in), (*out)."""
  n = u.scale.ndim
  return u.scale.shape, u.a.shape[n + 1 :], u.b.shape[n + 1 :]


einsum = functools.partial(jnp.einsum, precision='highest')


def ranks_of(u: Update) -> np.ndarray:
  """int [*stack]."""
  return np.array(u.ranks).reshape(u.scale.shape)


def padded(x: Array, rank: int) -> Array:
  """x [..., R, I] with rows of zeros up to `rank`."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rank - x.shape[-2]), (0, 0)])


def leafwise(
  rule: Callable[[list[Term]], Update],
  updates: Sequence[Tree],
  weights: Array,
) -> Tree:
  """Applies `rule` to the updates that there are at each path."""
  if not updates:
    raise ValueError('no updates to combine')
  weights = jnp.asarray(weights, jnp.float32)
  if weights.shape != (len(updates),):
    raise ValueError(f'{len(updates)} updates, weights {weights.shape}')
  by_path = [leaves_of(update) for update in updates]
  _check_alike(by_path)

  def at(path):
    own = [(i, leaves[path]) for i, leaves in enumerate(by_path)]
    terms = [
      Term(i, path, weights[i], _flattened(u)) for i, u in own if u is not None
    ]
    if not terms:
      return None
    _, n_in, n_out = outline(next(u for _, u in own if u is not None))
    u = rule(terms)
    return dataclasses.replace(
      u,
      a=u.a.reshape(u.a.shape[:-1] + n_in),
      b=u.b.reshape(u.b.shape[:-1] + n_out),
    )

  treedef: Any = jax.tree.structure(updates[0], is_leaf=is_end)
  return treedef.unflatten([at(path) for path in by_path[0]])


def leaves_of(update: Tree) -> dict[str, Update | None]:
  """{path: Update or None} in the order of the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(update, is_leaf=is_end)
  return {path_of(path): leaf for path, leaf in leaves}


def _flattened(u: Update) -> Update:
  n = u.scale.ndim
  return dataclasses.replace(
    u, a=axes_lib.flatten(u.a, n + 1), b=axes_lib.flatten(u.b, n + 1)
  )


def unscaled(a: Array, b: Array, ranks: np.ndarray) -> Update:
  """dW = A^T B; the scale is 0 where there is no adapter, as in `split`."""
  alive = jnp.asarray(ranks > 0, jnp.float32)
  return Update(a, b, alive, tuple(ranks.ravel().tolist()))


def truncated(
  a_RI: Array, values_K: Array, b_RO: Array, ranks: np.ndarray
) -> Update:
  """The first rows of each stack index, all with axes `...` in front."""
  r = int(np.max(ranks))
  live = np.arange(r) < ranks[..., None]
  values = jnp.where(live, values_K[..., :r], 0.0)
  return unscaled(
    jnp.where(live[..., None], a_RI[..., :r, :], 0.0),
    values[..., None] * b_RO[..., :r, :],
    ranks,
  )


def check_rank(rank: int) -> None:
  """Refuses what is no rank."""
  if type(rank) is not int or rank < 1:
    raise ValueError(f'a rank of {rank} is no integer above 0')


def _check_alike(by_path: list[dict[str, Update | None]]) -> None:
  """The same paths, and at each the same shapes but for the rank."""
  problems = []
  for i, leaves in enumerate(by_path[1:], start=1):
    lost = set(by_path[0]) ^ set(leaves)
    problems += [f'{path}: not in both of updates 0 and {i}' for path in lost]
  for path in by_path[0]:
    shapes = {
      i: outline(u)
      for i, leaves in enumerate(by_path)
      if (u := leaves.get(path)) is not None
    }
    if len(set(shapes.values())) > 1:
      problems.append(f'{path}: shapes (stack, in, out) differ: {shapes}')
  if problems:
    raise ValueError('; '.join(sorted(problems)))
