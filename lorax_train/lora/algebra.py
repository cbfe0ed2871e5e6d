"""Adapters on one base as vectors: scale, add, compress, switch.

    (frozen, trainable) <-> update      as_update, as_adapter
    update, c -> update                 scale
    [update, ...], weights -> update    cat, svd: the sum, and its best
                                        approximation of a lower rank
    [update, ...] -> lanes -> update    stack, select

An update is a tree with the outline of `params`: where there is an adapter, an
`Update`, which stands for dW = scale A^T B; None, a dW of zero, elsewhere.
Adding such differences is the task arithmetic of Ilharco et al. 2022. All of it
is pure and goes through `jax.jit`: ranks alone are static. Mixtures that are
not the sum are in `mixing.py`.

Axis letters: N adapters, R rank, K singular values, I and O all axes `in` and
all axes `out` of a weight, flattened. `...` are the stack axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora import axes as axes_lib
from lorax_train.lora.split import path_of
from lorax_train.lora.weight import Adapter, Fixed, over

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


def as_update(frozen: Tree, trainable: Tree) -> Tree:
  """The update of an adapter, without the base.

  Args:
    frozen: from `split`.
    trainable: from `split`, or trained. What the adapter started from and
      subtracts (PiSSA, OLoRA) becomes part of the update.

  Raises:
    ValueError: names the paths where more is trained than A and B: whole
      arrays, DoRA's magnitudes.

  >>> from lorax_train.lora import LoraSpec, split
  >>> spec = LoraSpec('q', rank=2, alpha=6)
  >>> halves = split(jax.random.key(0), {'q': jnp.ones((3, 5))}, spec)
  >>> update = as_update(*halves)['q']
  >>> update.a.shape, update.b.shape, float(update.scale), update.ranks
  ((2, 3), (2, 5), 3.0, (2,))
  """
  problems = []

  def join(path, adapter, fixed):
    if adapter is None:
      return None
    if not isinstance(adapter, Adapter) or adapter.m is not None:
      what = 'a magnitude' if isinstance(adapter, Adapter) else 'a whole array'
      problems.append(f'{path_of(path)}: {what} is trained, not A and B alone')
      return None
    now = _update(fixed.a_of(adapter), adapter.b, fixed)
    if fixed.a0 is None:
      return now
    return cat([now, _update(fixed.a0, fixed.b0, fixed)], (1.0, -1.0))

  update = jax.tree_util.tree_map_with_path(
    join,
    trainable,
    frozen,
    is_leaf=lambda x: x is None or isinstance(x, Adapter),
  )
  if problems:
    raise ValueError('; '.join(problems))
  return update


def _update(a: Array, b: Array, fixed: Fixed) -> Update:
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return Update(a, b, fixed.scale, fixed.ranks)


def as_adapter(frozen: Tree, update: Tree) -> tuple[Tree, Tree]:
  """(frozen, trainable) of an update: what `bind` and export take.

  Args:
    frozen: from `split`; what it says of scales and ranks is replaced.
    update: of weights that `frozen` has split. Where it is None and `frozen`
      has a split weight, the plain weight comes back.

  Raises:
    ValueError: names an update that has no weight of its shape in `frozen`.
  """
  problems = []

  def half(path, u, fixed):
    if u is None:
      return fixed.w if isinstance(fixed, Fixed) else fixed
    stack_shape, n_in, n_out = _outline(u)
    size = math.prod(stack_shape + n_in + n_out)
    if (
      not isinstance(fixed, Fixed)
      or fixed.scale.shape != stack_shape
      or math.prod(fixed.w.shape) != size
    ):
      problems.append(
        f'{path_of(path)}: an update of stack {stack_shape}, in {n_in} and out'
        f' {n_out}, but no frozen half of that size'
      )
      return fixed
    return Fixed(fixed.w, u.scale, fixed.rate, u.ranks, fixed.axes)

  half_frozen = jax.tree_util.tree_map_with_path(
    half, update, frozen, is_leaf=is_end
  )
  if problems:
    raise ValueError('; '.join(problems))
  trainable = jax.tree.map(
    lambda u: None if u is None else Adapter(u.a, u.b), update, is_leaf=is_end
  )
  return half_frozen, trainable


def scale(update: Tree, c: Array) -> Tree:
  """c dW; with c = -1 what undoes an adapter (Ilharco et al. 2022)."""
  return jax.tree.map(
    lambda u: None if u is None else dataclasses.replace(u, scale=u.scale * c),
    update,
    is_leaf=is_end,
  )


def cat(updates: Sequence[Tree], weights: Array) -> Tree:
  """The sum of w_n dW_n, exactly: the factors side by side along the rank.

  Args:
    updates: N updates of any ranks.
    weights: N numbers, which may be negative.

  Returns:
    An update whose ranks are the sums of the ranks.
  """
  return leafwise(_cat, updates, weights)


def svd(updates: Sequence[Tree], weights: Array, rank: int) -> Tree:
  """The best approximation of rank `rank` of the sum of w_n dW_n.

  Best in the Frobenius norm (Eckart and Young 1936). dW is never formed: of
  the factors of `cat`, A^T = Q P and B^T = U T, so that dW = Q (P T^T) U^T,
  and the small matrix in the middle has dW's singular values.

  Args:
    updates: N updates of any ranks.
    weights: N numbers.
    rank: the largest rank to keep.

  Returns:
    An update; its A has orthonormal rows, its B rows of the lengths of the
    singular values, the largest first.
  """
  check_rank(rank)

  def rule(terms):
    whole = _cat(terms)
    (q_IK, p_KR), (u_OK, t_KR) = (
      jnp.linalg.qr(jnp.swapaxes(x, -1, -2)) for x in (whole.a, whole.b)
    )
    sides = (whole.a.shape[-1], whole.b.shape[-1])
    core = einsum('...kr,...lr->...kl', p_KR, t_KR)
    left, values, right = jnp.linalg.svd(core, full_matrices=False)
    return truncated(
      einsum('...ik,...kr->...ri', q_IK, left),
      values,
      einsum('...rk,...ok->...ro', right, u_OK),
      np.minimum(ranks_of(whole), min(rank, *sides)),
    )

  return leafwise(rule, updates, weights)


def stack(updates: Sequence[Tree]) -> Tree:
  """N updates as lanes: every array gets an axis N in front.

  Smaller ranks are padded with zeros, and an update that leaves a weight alone
  has zeros there. Map over the lanes with `jax.vmap`, or `select` one.
  """

  def rule(terms):
    empty = jax.tree.map(jnp.zeros_like, terms[0].update)
    lanes = [empty] * len(updates)
    for term in terms:
      lanes[term.number] = term.update
    ranks = tuple(np.max([u.ranks for u in lanes], axis=0).tolist())
    return Update(
      jnp.stack([padded(u.a, max(ranks)) for u in lanes]),
      jnp.stack([padded(u.b, max(ranks)) for u in lanes]),
      jnp.stack([u.scale for u in lanes]),
      ranks,
    )

  return leafwise(rule, updates, np.ones(len(updates), np.float32))


def select(lanes: Tree, index: Array) -> Tree:
  """The update of one lane. `index` may be traced, so switching is free.

  An index out of range gives NaN, not a neighbour.

  >>> u = Update(jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.float32(3), (2,))
  >>> lanes = stack([{'q': u}, scale({'q': u}, -1)])
  >>> lanes['q'].a.shape, float(select(lanes, 1)['q'].scale)
  ((2, 2, 3), -3.0)
  """
  return jax.tree.map(
    lambda x: x.at[index].get(mode='fill', fill_value=jnp.nan), lanes
  )


class Term(NamedTuple):
  """What a rule is told of one update at one path."""

  number: int
  path: str
  weight: Array
  update: Update  # its axes in and out flattened: [..., R, I] and [..., R, O]


def _outline(u: Update) -> tuple[tuple[int, ...], ...]:
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
    _, n_in, n_out = _outline(next(u for _, u in own if u is not None))
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
    u, a=axes_lib.flatten(u.a, n), b=axes_lib.flatten(u.b, n)
  )


def _cat(terms: list[Term]) -> Update:
  """Factors side by side, the rows of true ranks first."""
  us = [term.update for term in terms]
  a = jnp.concatenate([u.a for u in us], axis=-2)
  b = jnp.concatenate(
    [u.b * over(u.scale * w, u.b) for _, _, w, u in terms], axis=-2
  )
  padding = np.concatenate(
    [np.arange(u.a.shape[-2]) >= ranks_of(u)[..., None] for u in us], axis=-1
  )
  ranks = np.sum([ranks_of(u) for u in us], axis=0)
  order = np.argsort(padding, axis=-1, kind='stable')[..., : np.max(ranks)]
  return unscaled(
    jnp.take_along_axis(a, order[..., None], axis=-2),
    jnp.take_along_axis(b, order[..., None], axis=-2),
    ranks,
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
      i: _outline(u)
      for i, leaves in enumerate(by_path)
      if (u := leaves.get(path)) is not None
    }
    if len(set(shapes.values())) > 1:
      problems.append(f'{path}: shapes (stack, in, out) differ: {shapes}')
  if problems:
    raise ValueError('; '.join(sorted(problems)))
