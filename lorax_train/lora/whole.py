"""Leaves that are trained themselves: whole, or some of their rows.

PEFT calls them `modules_to_save` and `trainable_token_indices`. The trainable
half is an array, float32 but for `all_whole`; its frozen half says what it belongs to.

Axis letters: V vocab, D model, K trained rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.lora.spec import Whole
from lorax_train.lora.weight import is_quantised, node, product

Array = Any


@node('w', static=('shape', 'dtype', 'axes', 'rows', 'layers'))
class Original:
  """The frozen half of a leaf that is trained itself.

  Attributes:
    w: the leaf as it was; None where all of it is trained, which needs no
      second copy.
    shape: of the leaf.
    dtype: of the leaf, in which the model sees the trained numbers too.
    axes: what each axis is, in a layout's letters.
    rows: which rows of an embedding are trained; None for all.
    layers: which indices of a stack are trained; None for all.
  """

  w: Array | None
  shape: tuple[int, ...]
  dtype: Any
  axes: str
  rows: tuple[int, ...] | None = None
  layers: tuple[int, ...] | None = None

  @property
  def part(self) -> tuple[int, ...] | None:
    """Which indices of the first axis are trained; None for all."""
    return self.layers if self.rows is None else self.rows

  @property
  def trained_shape(self) -> tuple[int, ...]:
    """Shape of the trainable half."""
    part = self.part
    return self.shape if part is None else (len(part), *self.shape[1:])

  def taken(self, w: Array) -> Array:
    """What of a leaf like this is trained, in float32 and never w itself."""
    part = w if self.part is None else w[np.array(self.part)]
    return jnp.array(part, jnp.float32, copy=True)

  def replaced(self, own: Array) -> Array:
    """The leaf with the trained numbers in it, in its own dtype."""
    own = own.astype(self.dtype)
    if self.part is None or self.w is None:
      return own
    return self.w.at[np.array(self.part)].set(own)


@node('w', 'own', static=('rows',))
class TunedTable:
  """An embedding W [V, D] of which K rows are trained: others stay in place.

  Behaves as W with `own` [K, D] in these rows, without a copy of W.
  """

  w: Array
  own: Array
  rows: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of W."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Dtype W is stored in."""
    return self.w.dtype

  def __getitem__(self, ids: Array) -> Array:
    """Rows at ids [...], [..., D]; ids count from the end, and stop, as W's."""
    size = self.w.shape[0]
    ids = ids.astype(jnp.int32)
    ids = jnp.clip(jnp.where(ids < 0, ids + size, ids), 0, size - 1)
    rows = jnp.asarray(self.rows, jnp.int32)
    at = jnp.minimum(jnp.searchsorted(rows, ids), len(self.rows) - 1)
    found = self.w[ids]
    own = self.own.astype(found.dtype)[at]
    return jnp.where((rows[at] == ids)[..., None], own, found)

  @property
  def T(self) -> 'TunedHead':
    """The tied head."""
    return TunedHead(self.w, self.own, self.rows)

  def merged(self) -> Array:
    """W with its trained rows, in its own dtype."""
    return self.w.at[np.array(self.rows)].set(self.own.astype(self.w.dtype))


@node('w', 'own', static=('rows',))
class TunedHead:
  """The transpose [D, V] of a TunedTable, for `x @ w`."""

  w: Array
  own: Array
  rows: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the transpose."""
    return self.w.shape[::-1]

  @property
  def dtype(self) -> Any:
    """Dtype W is stored in."""
    return self.w.dtype

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x [..., D] -> [..., V], in x's dtype or `out_dtype`."""
    y = product(x, self.w.T, out_dtype)
    own = self.own.astype(self.w.dtype).T.astype(x.dtype)
    own = product(x, own, out_dtype)
    return y.at[..., np.array(self.rows)].set(own)

  def __rmatmul__(self, x: Array) -> Array:
    return self.apply_to(x)


def begin(
  w: Array, axes: str, places: Sequence[Any]
) -> tuple[Original, jax.Array]:
  """Both halves of a leaf before the first step.

  Args:
    w: the leaf, a plain array.
    axes: of it, in a layout's letters.
    places: a `Whole` or None for each stack index; at least one is there.

  Raises:
    ValueError: what can't be trained so.
  """
  some = next(p for p in places if p)
  if is_quantised(w):
    raise ValueError(
      'a quantised weight is not trained whole: load the model unquantised, or'
      ' give the module an adapter'
    )
  if not jnp.issubdtype(w.dtype, jnp.floating) or hasattr(w, 'apply_to'):
    raise ValueError(f'a leaf of {w.dtype} is not trained whole')
  if not all(isinstance(p, Whole | None) for p in places):
    raise ValueError(
      'some of its layers have an adapter and others are trained whole, which'
      ' one leaf cannot be'
    )
  rows, layers = some.rows, None
  if rows is not None and axes != 'vo':
    raise ValueError(
      f'single rows are trained of an embedding [V, D] alone, not of a leaf of'
      f' shape {tuple(w.shape)}'
    )
  if rows is not None and max(rows) >= w.shape[0]:
    raise ValueError(
      f'token {max(rows)} is past the last row of {w.shape[0]}: resize the'
      ' embedding first'
    )
  if rows is None and not all(places):
    if len(places) != w.shape[0]:
      raise ValueError('some indices of a stack of several axes: give all')
    layers = tuple(i for i, place in enumerate(places) if place)
  original = Original(
    w if rows or layers else None,
    tuple(w.shape),
    jnp.dtype(w.dtype),
    axes,
    rows,
    layers,
  )
  # A step gives up the buffers that it updates: never W's own.
  return original, original.taken(w)


def all_whole(params: Any, layout: Mapping[str, str]) -> tuple[Any, Any]:
  """(frozen, trainable) where every leaf is trained whole, in its own dtype.

  The trainable half is `params`, the very arrays: a step may give them up.

  Args:
    params: plain arrays, or shapes.
    layout: {path: letters of its axes}, see `split`.

  >>> frozen, trainable = all_whole({'q': jnp.ones((3, 5))}, {'q': 'io'})
  >>> frozen['q'].shape, trainable['q'].shape
  ((3, 5), (3, 5))
  """

  def of(path, w):
    letters = layout[jax.tree_util.keystr(path, simple=True, separator='/')]
    return Original(None, tuple(w.shape), jnp.dtype(w.dtype), letters)

  return jax.tree_util.tree_map_with_path(of, params), params


def size(original: Original) -> int:
  """How many numbers of it are trained."""
  return math.prod(original.trained_shape)
