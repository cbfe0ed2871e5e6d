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
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.halves import path_of
from lorax_train.lora.updates import (
  Term,
  Update,
  check_rank,
  einsum,
  is_end,
  leafwise,
  outline,
  padded,
  ranks_of,
  truncated,
  unscaled,
)
from lorax_train.lora.weight import Adapter, Fixed, over

Array = Any
Tree = Any


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

  To be saved it needs a spec, which `lora.spec_of` reads off the frozen half.

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
    stack_shape, n_in, n_out = outline(u)
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
    return Fixed(
      fixed.w, u.scale, fixed.rate, u.ranks, fixed.axes, look_up=fixed.look_up
    )

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
