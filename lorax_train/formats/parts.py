"""Arrays of a mesh, filled part by part from files that nobody holds whole."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

# In bytes: what XLA wants of memory that a CPU device is to use as it is.
_ALIGNMENT = 64

# (begin, end) of each axis.
Place = tuple[tuple[int, int], ...]
Parts = Mapping[Place, np.ndarray]


def rooms(like: jax.ShapeDtypeStruct) -> Parts:
  """{place: room for it, not filled} of the parts that our devices hold.

  Devices that hold the same part are given the same memory; those of a CPU
  keep it as it is, so the part is in memory once.

  Args:
    like: shape and dtype of the array, and where it lies.
  """
  parts: dict[Place, np.ndarray] = {}
  for index in like.sharding.addressable_devices_indices_map(
    like.shape
  ).values():
    place = _place(index, like.shape)
    if place not in parts:
      sizes = [end - begin for begin, end in place]
      parts[place] = _aligned(sizes, np.dtype(like.dtype))
  return parts


def on_mesh(like: jax.ShapeDtypeStruct, parts: Parts) -> jax.Array:
  """The array of what `rooms` gave, once all of it is filled."""
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: parts[_place(index, like.shape)]
  )


def slices(place: Place) -> tuple[slice, ...]:
  """A place as an index."""
  return tuple(slice(*ends) for ends in place)


def _place(index: Sequence[slice] | None, shape: Sequence[int]) -> Place:
  """(begin, end) of each axis: a slice is no key of a dict."""
  assert index is not None  # which jax allows of arrays that have no axes
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Room for an array, not filled, which no CPU device needs to copy."""
  nbytes = math.prod(shape) * dtype.itemsize
  room = np.empty(nbytes + _ALIGNMENT, np.uint8)
  begin = -room.ctypes.data % _ALIGNMENT
  return room[begin : begin + nbytes].view(dtype).reshape(shape)
