"""Weights moved along random directions that nobody keeps (MeZO's).

A direction z ~ N(0, 1) is never stored: it follows from a key, and is drawn
again wherever it is wanted, here and only here, so that the step that uses z
goes where z was tried (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).
Numbers are drawn by threefry, which gives the same ones on any mesh.

Drawing takes some 16 bytes a number, so it goes by parts: the matrices of a
layer scan one layer at a time, where they are used, and a large array by chunks
of its rows. A chunk is every n-th row, for rows that devices share stay where
they are; of rows that nothing near n divides, which no mesh cuts either, a block.

Axis letters: P directions, L layers, R rank.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_train.lora.halves import is_half, is_trained, path_of
from lorax_train.lora.weight import Around, Fixed, node, product
from lorax_train.lora.whole import Original

Array = Any
Params = Any

# Numbers drawn at once, at most, where the rows can be cut so.
AT_ONCE = 2**22
# What is folded into a key for the bits that round, apart from those of z.
_ROUNDING = 0x526F


@node('w', 'key', 'epsilon')
class Perturbed(Around):
  """W + epsilon z, made of one layer where it is used and then dropped.

  Attributes:
    w: [*stack, in, out].
    key: [*stack] typed PRNG keys, a direction's.
    epsilon: [*stack] float32, with its sign.
  """

  w: Array
  key: Array
  epsilon: Array

  def astype(self, dtype: Any) -> 'Perturbed':
    """Itself: the sum is rounded once, to what it is multiplied with."""
    if dtype != self.dtype:
      raise ValueError(f'perturbed weights of {self.dtype} stay in it')
    return self

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x [..., in] @ (W + epsilon z), the sum rounded to x's dtype."""
    if self.ndim != 2:
      raise ValueError('a perturbed weight is one layer: scan the stack')
    w = moved(self.w, self.key[None], self.epsilon[None], x.dtype)
    return product(x, w, out_dtype)


def perturb(
  frozen: Params, trainable: Params, key: Array, epsilon: Array
) -> Params:
  """`trainable` moved by epsilon along a direction: what `bind` then takes.

  The matrices of a stack that are trained whole, in their own dtype, are moved
  a layer at a time where they are used; all else is made here.

  Args:
    frozen: from `split`.
    trainable: from `split`, or trained.
    key: typed PRNG key of the direction.
    epsilon: float32 scalar, how far; negative for the other way.

  >>> import jax
  >>> from lorax_train.lora import LoraSpec, split
  >>> params = {'q': jax.numpy.ones((3, 5))}
  >>> halves = split(jax.random.key(0), params, LoraSpec('q', rank=2))
  >>> near = perturb(*halves, jax.random.key(1), 1e-3)['q']
  >>> float(abs(near.b).max()) < 1e-2
  True
  """

  def of(half: Any, w: Array, keys: Array, of_layers: Array) -> Any:
    if _by_layers(half, w):
      return Perturbed(w, of_layers[0], jnp.full(len(w), epsilon, jnp.float32))
    return moved(w, keys, jnp.reshape(epsilon, 1), w.dtype)

  return _mapped(of, frozen, trainable, key[None])


def stepped(
  frozen: Params, trainable: Params, keys: Array, scales: Array
) -> Params:
  """`trainable` plus the sum over P directions of scales times z.

  Numbers in bfloat16 are rounded up or down by chance, in proportion to what is
  lost: a step is far smaller than what separates two of them, and to the
  nearest it would be lost whole. The chance too follows from the keys.

  Args:
    frozen: from `split`.
    trainable: from `split`, or trained; written over where it is donated.
    keys: [P] typed PRNG keys, of the directions.
    scales: [P] float32.
  """

  def of(half: Any, w: Array, keys: Array, of_layers: Array) -> Array:
    if not _by_layers(half, w):
      return moved(w, keys, scales)

    def layer(at, w):
      one = moved(w[at], of_layers[:, at], scales)
      return lax.dynamic_update_index_in_dim(w, one, at, 0)

    return lax.fori_loop(0, len(w), layer, w)

  return _mapped(of, frozen, trainable, keys)


def _by_layers(half: Any, w: Array) -> bool:
  """Whether a leaf is a stack of matrices that `bind` leaves as it is."""
  return (
    isinstance(half, Original)
    and half.part is None
    and half.axes[0] == 's'
    and w.ndim > 2
    and w.dtype == half.dtype
  )


def _mapped(
  fn: Callable[[Any, Array, Array, Array], Any],
  frozen: Params,
  trainable: Params,
  keys: Array,
) -> Params:
  """fn(frozen half, leaf, its keys [P], those of its layers) of each leaf.

  What pads a factor, and the magnitude of a layer that has no adapter, stays.
  """
  halves = jax.tree.map(
    lambda half, own: jax.tree.map(lambda _: half, own),
    frozen,
    trainable,
    is_leaf=is_half,
  )
  tree: Any
  leaves, tree = jax.tree_util.tree_flatten_with_path(trainable)
  of_leaf = jax.tree.leaves(halves, is_leaf=is_trained)
  n_layers = [len(w) for (_, w), h in zip(leaves, of_leaf, strict=True) if _by_layers(h, w)]  # fmt: skip
  # All at once: each drawing by itself is one more to be compiled.
  crcs = [zlib.crc32(path_of(path).encode()) for path, _ in leaves]
  keys = _folded(keys, np.array(crcs, np.uint32))
  of_layers = _folded(keys, np.arange(max(n_layers, default=1)))
  moved_leaves = []
  for i, ((path, w), half) in enumerate(zip(leaves, of_leaf, strict=True)):
    n = len(w) if _by_layers(half, w) else 0
    new = fn(half, w, keys[:, i], of_layers[:, i, :n])
    if isinstance(half, Fixed):
      name = path_of(path[-1:])
      new = jnp.where(_live(half, name, w), new, w)
    moved_leaves.append(new)
  return tree.unflatten(moved_leaves)


def _folded(keys: Array, numbers: np.ndarray) -> Array:
  """`jax.random.fold_in` of each number into each key, [*keys, numbers]."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  for _ in keys.shape:
    fold = jax.vmap(fold, (0, None))
  return fold(keys, numbers)


def _live(fixed: Fixed, name: str, part: Array) -> np.ndarray:
  """Which numbers of a part of an adapter are trained, broadcast over it."""
  ranks = np.array(fixed.ranks).reshape(fixed.scale.shape)
  live = ranks > 0
  if name != 'm':
    live = np.arange(part.shape[ranks.ndim]) < ranks[..., None]
  return live.reshape(live.shape + (1,) * (part.ndim - live.ndim))


def moved(w: Array, keys: Array, scales: Array, dtype: Any = None) -> Array:
  """w plus the sum over P directions of scales times z, summed in float32.

  Args:
    w: of any shape.
    keys: [P] typed PRNG keys, the leaf's own.
    scales: [P] float32.
    dtype: of the result, rounded to the nearest. None: w's own, w is written
      over where that can be, and bfloat16 is rounded by chance.
  """
  rows, *rest = w.shape or (1,)
  n = chunks_of(rows, math.prod(rest))

  def chunk(w: Array, keys: Array) -> Array:
    total = w.astype(jnp.float32)

    def add(total, direction):
      key, scale = direction
      return total + scale * jax.random.normal(key, total.shape), None

    total, _ = lax.scan(add, total, (keys, scales))
    if dtype is not None or w.dtype == jnp.float32:
      return total.astype(dtype or w.dtype)
    return rounded(total, jax.random.fold_in(keys[0], _ROUNDING), w.dtype)

  if n == 1:
    return chunk(w, keys)
  strided = rows % n == 0
  length = -(-rows // n)
  source = w.reshape(length, n, *rest) if strided else w

  def put(at, out):
    whole = out if dtype is None else source
    of_chunk = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
    if strided:
      part = chunk(lax.dynamic_index_in_dim(whole, at, 1, False), of_chunk)
      return lax.dynamic_update_index_in_dim(out, part, at, 1)
    # The last block begins early, and leaves what it shares with another.
    first = jnp.minimum(at * length, rows - length)
    part = chunk(lax.dynamic_slice_in_dim(whole, first, length), of_chunk)
    own = first + jnp.arange(length) >= at * length
    own = own.reshape(length, *(1 for _ in rest))
    before = lax.dynamic_slice_in_dim(out, first, length)
    part = jnp.where(own, part, before)
    return lax.dynamic_update_slice_in_dim(out, part, first, 0)

  out = source if dtype is None else jnp.zeros(source.shape, dtype)
  return lax.fori_loop(0, n, put, out).reshape(w.shape)


def chunks_of(rows: int, numbers: int) -> int:
  """Into how many chunks of whole rows an array is cut, by its shape alone.

  As many as divide the rows, if that is not far more than are needed.

  >>> chunks_of(14336, 4096), chunks_of(32000, 4096), chunks_of(30, 576)
  (14, 32, 1)
  >>> chunks_of(32001, 4096)
  32
  """
  least = min(max(1, -(-rows * numbers // AT_ONCE)), rows)
  return next((n for n in range(least, 4 * least) if rows % n == 0), least)


def rounded(x: Array, key: Array, dtype: Any) -> Array:
  """float32 as bfloat16, up or down by chance, so that it is right in the mean.

  >>> x = jnp.full(10000, 1 + 2**-9)
  >>> y = rounded(x, jax.random.key(0), jnp.bfloat16).astype(jnp.float32)
  >>> abs(float(y.mean() - x[0])) < 1e-4, float(y.min()), float(y.max())
  (True, 1.0, 1.0078125)
  """
  if dtype != jnp.bfloat16:
    raise ValueError(f'rounding by chance is to bfloat16, not {dtype}')
  lost = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = lax.bitcast_convert_type(x, jnp.uint32) + lost
  kept = (bits >> 16).astype(jnp.uint16)
  return lax.bitcast_convert_type(kept, jnp.bfloat16)
