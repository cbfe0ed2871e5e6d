"""Adapters mixed as PEFT mixes them: rules of thumb, none of them the sum.

    [update, ...], weights -> update    mix_factors, magnitude_prune, ties, dare

They follow `add_weighted_adapter` of PEFT 0.21 number for number. Without
`rank` they work on A and on B, each for itself, and `mix_factors` says what
that costs; with it they work on the dense dW and then take the best
approximation of that rank (PEFT's kinds ending in `_svd`).

Axis letters: N adapters, R rank, I and O the axes `in` and `out` of a weight,
flattened. `...` are the stack axes.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.updates import (
  Term,
  Update,
  check_rank,
  einsum,
  is_end,
  leafwise,
  leaves_of,
  padded,
  ranks_of,
  truncated,
  unscaled,
)
from lorax_train.lora.weight import over

Array = Any
Tree = Any

# The matrices that a method works on, A and B or else dW, and how many entries
# of each are not padding: [..., R, I] and int [...].
_Parts = list[tuple[Array, np.ndarray]]
_Thin = Callable[[Term, _Parts], list[Array]]


def mix_factors(updates: Sequence[Tree], weights: Array) -> Tree:
  """Mixes A with A and B with B. NOT the sum of the updates.

  dW = (sum c_n A_n)^T (sum |c_n| B_n) with c = sign(w s) sqrt(|w s|), s the
  scales: besides every w_n dW_n it has all the products of one adapter's A
  and another's B. It is PEFT's `linear`, for adapters that were mixed so; the
  sum is `cat` or `svd`.

  Raises:
    ValueError: names the paths whose ranks differ.
  """
  return _merge(updates, weights, None, _keep_all)


def magnitude_prune(
  updates: Sequence[Tree],
  weights: Array,
  density: float,
  rank: int | None = None,
) -> Tree:
  """Adds what is left of each adapter after keeping its largest entries.

  Args:
    updates: N updates; without `rank`, of the same ranks.
    weights: N numbers.
    density: share of the entries of a matrix that is kept, in (0, 1].
    rank: None to work on the factors, else on dW, kept to that rank.
  """
  _check_density(density)
  return _merge(updates, weights, rank, _keep_largest(density))


def ties(
  updates: Sequence[Tree],
  weights: Array,
  density: float,
  majority: str = 'total',
  rank: int | None = None,
) -> Tree:
  """TIES (Yadav et al. 2023): trim, elect a sign, average those who have it.

  Args:
    updates: N updates; without `rank`, of the same ranks.
    weights: N numbers. They don't vote: the sign is elected without them.
    density: share of the entries of a matrix that is kept, in (0, 1].
    majority: the sign of an entry is that of the sum of its values ('total'),
      as in the paper, or of the sum of their signs ('frequency').
    rank: None to work on the factors, else on dW, kept to that rank.
  """
  _check_density(density)
  return _merge(updates, weights, rank, _keep_largest(density), majority)


def dare(
  updates: Sequence[Tree],
  weights: Array,
  density: float,
  *,
  key: Array | None = None,
  masks: Sequence[Tree] | None = None,
  majority: str | None = None,
  rank: int | None = None,
) -> Tree:
  """DARE (Yu et al. 2023): drop entries at random, rescale the rest, add.

  Args:
    updates: N updates; without `rank`, of the same ranks.
    weights: N numbers.
    density: share of the entries that is kept, in (0, 1]; what is kept is
      divided by it.
    key: typed PRNG key of the drawing. This or `masks`.
    masks: N trees; where the update is, a tuple of boolean arrays, True for
      what is kept: (of a, of b), or with `rank` (of dW [*stack, *in, *out],).
    majority: None to add; 'total' or 'frequency' to elect signs as `ties` does.
    rank: None to work on the factors, else on dW, kept to that rank.
  """
  _check_density(density)
  if (key is None) == (masks is None):
    raise ValueError('dare takes either a key or masks')
  if masks is None:
    keep = functools.partial(_drawn, key, density)
  else:
    keep = functools.partial(_given, _masks_by_path(updates, masks))

  def thin(term, parts):
    return [
      jnp.where(mask, x / density, 0.0)
      for mask, (x, _) in zip(keep(term, parts), parts, strict=True)
    ]

  return _merge(updates, weights, rank, thin, majority)


def _merge(
  updates: Sequence[Tree],
  weights: Array,
  rank: int | None,
  thin: _Thin,
  majority: str | None = None,
) -> Tree:
  """Thins out every matrix, then adds or elects signs."""
  if majority not in (None, 'total', 'frequency'):
    raise ValueError(
      f"majority {majority!r} is neither 'total' nor 'frequency'"
    )
  if rank is not None:
    check_rank(rank)

  def of_factors(terms):
    us = [term.update for term in terms]
    ranks = np.max([ranks_of(u) for u in us], axis=0)
    if any(((ranks_of(u) != ranks) & (ranks_of(u) > 0)).any() for u in us):
      raise ValueError(
        f'{terms[0].path}: ranks {[u.ranks for u in us]} differ, so their'
        ' factors cannot be combined row by row; give a rank'
      )
    c = [term.weight * term.update.scale for term in terms]
    root = [jnp.sqrt(jnp.abs(x)) for x in c]
    signed = [jnp.where(x < 0, -r, r) for x, r in zip(c, root, strict=True)]
    a, b = zip(
      *[thin(term, _factors(term.update)) for term in terms], strict=True
    )
    whole = [[padded(x, int(np.max(ranks))) for x in xs] for xs in (a, b)]
    return unscaled(
      _combined(whole[0], signed, majority),
      _combined(whole[1], root, majority),
      ranks,
    )

  def of_products(terms):
    thinned = [thin(term, _product(term.update))[0] for term in terms]
    dense = _combined(thinned, [term.weight for term in terms], majority)
    left, values, right = jnp.linalg.svd(dense, full_matrices=False)
    alive = np.any([ranks_of(term.update) > 0 for term in terms], axis=0)
    limit = min(rank, *dense.shape[-2:])
    return truncated(
      jnp.swapaxes(left, -1, -2), values, right, np.where(alive, limit, 0)
    )

  rule = of_factors if rank is None else of_products
  return leafwise(rule, updates, weights)


def _factors(u: Update) -> _Parts:
  return [(x, ranks_of(u) * x.shape[-1]) for x in (u.a, u.b)]


def _product(u: Update) -> _Parts:
  dense = einsum('...ri,...ro,...->...io', u.a, u.b, u.scale)
  return [(dense, np.full(u.scale.shape, math.prod(dense.shape[-2:])))]


def _combined(
  xs: Sequence[Array], weights: Sequence[Array], majority: str | None
) -> Array:
  """The weighted sum, or the mean of those that have the elected sign."""
  x_N = jnp.stack(xs)
  weighted = x_N * over(jnp.stack(weights), x_N)
  if majority is None:
    return jnp.sum(weighted, axis=0)
  sign = jnp.sign(x_N)
  votes = jnp.sum(x_N if majority == 'total' else sign, axis=0, keepdims=True)
  agree = sign == jnp.where(votes >= 0, 1.0, -1.0)
  count = jnp.maximum(jnp.sum(agree, axis=0, dtype=jnp.float32), 1.0)
  return jnp.sum(jnp.where(agree, weighted, 0.0), axis=0) / count


def _keep_all(term: Term, parts: _Parts) -> list[Array]:
  return [x for x, _ in parts]


def _keep_largest(density: float) -> _Thin:
  def thin(term, parts):
    thinned = []
    for x, size in parts:
      flat = x.reshape(*x.shape[:-2], -1)
      order = jnp.argsort(jnp.abs(flat), axis=-1, descending=True)
      # By place and not by value: of equal entries no more than the share.
      first = (
        np.arange(flat.shape[-1]) < (density * size).astype(int)[..., None]
      )
      keep = jnp.put_along_axis(
        jnp.zeros(flat.shape, bool), order, first, axis=-1, inplace=False
      )
      thinned.append(jnp.where(keep, flat, 0.0).reshape(x.shape))
    return thinned

  return thin


def _drawn(
  key: Array, density: float, term: Term, parts: _Parts
) -> list[Array]:
  """Masks of one update, another for each number and path."""
  key = jax.random.fold_in(key, term.number)
  key = jax.random.fold_in(key, zlib.crc32(term.path.encode()))
  keys = jax.random.split(key, len(parts))
  return [
    jax.random.bernoulli(k, density, x.shape)
    for k, (x, _) in zip(keys, parts, strict=True)
  ]


def _given(
  masks: list[dict[str, Any]], term: Term, parts: _Parts
) -> list[Array]:
  """Masks of one update, their axes flattened as its own are."""
  own = masks[term.number][term.path]
  shapes = [mask.shape for mask in own]
  if [math.prod(s) for s in shapes] != [x.size for x, _ in parts]:
    raise ValueError(
      f'{term.path}: masks of shapes {shapes} for {[x.shape for x, _ in parts]}'
    )
  return [
    jnp.asarray(mask, bool).reshape(x.shape)
    for mask, (x, _) in zip(own, parts, strict=True)
  ]


def _masks_by_path(
  updates: Sequence[Tree], masks: Sequence[Tree]
) -> list[dict[str, Any]]:
  if len(masks) != len(updates):
    raise ValueError(f'{len(updates)} updates, {len(masks)} trees of masks')
  by_path = []
  for update, of_update in zip(updates, masks, strict=True):
    treedef: Any = jax.tree.structure(update, is_leaf=is_end)
    leaves = treedef.flatten_up_to(of_update)
    by_path.append(dict(zip(leaves_of(update), leaves, strict=True)))
  return by_path


def _check_density(density: float) -> None:
  if not 0 < density <= 1:
    raise ValueError(f'a density of {density} is outside (0, 1]')
