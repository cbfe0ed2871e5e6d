"""Quantised weights: from files, where they lie, and what they take.

A matrix at a time is read, quantised where the files have it unquantised, and
cut into the parts that our devices hold; what it was made of goes at once. The
second level of NF4 is of the whole matrix, so whoever holds a part of it reads
all of it: no mesh and no number of processes changes a bit.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train import lora, parallel
from lorax_train.errors import ModelError
from lorax_train.formats import parts as parts_lib
from lorax_train.formats.safetensors import TensorRef
from lorax_train.lora.halves import is_half
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, Quant
from lorax_train.quant import (
  Int8Weight,
  Nf4Weight,
  Quantised,
  blockwise,
  int8,
  nf4,
)

Weight = Any  # of `quant`, of arrays or of shapes

_STATE = 'quant_state.bitsandbytes__nf4'
_STATE_BYTES = 65536  # more than a state ever has


def lying(weight: Weight, where: NamedSharding) -> Weight:
  """Arrays or shapes of a weight as shapes that lie as it is to lie.

  Args:
    weight: of `quant`, or an array.
    where: of the weight itself, an axis an axis.
  """

  def of(x: Any) -> jax.ShapeDtypeStruct:
    # What has no axes of the weight's own is small, and whole.
    own = where if x.ndim == weight.ndim else NamedSharding(where.mesh, P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

  return jax.tree.map(of, weight)


def load(
  like: Weight,
  names: Sequence[str],
  refs: Mapping[str, TensorRef],
  settings: Quant,
  readers: int,
) -> tuple[Weight, list[str]]:
  """A stack of quantised weights, and names of matrices that are not finite.

  Args:
    like: shapes, from `lying`.
    names: of each layer's matrix.
    refs: all tensors of the files.
    settings: what `like` is.
    readers: how many matrices are in hand at the same time.

  Raises:
    ModelError: a matrix that is not what its files say.
  """
  treedef: Any
  leaves, treedef = jax.tree.flatten(like)
  rooms = [parts_lib.rooms(leaf) for leaf in leaves]
  bad = []

  def read(layer: int) -> None:
    one = _matrix(names[layer], refs, settings)
    if one is None:
      bad.append(names[layer])
      return
    for array, parts in zip(jax.tree.leaves(one), rooms, strict=True):
      for place, part in parts.items():
        part[layer] = array[parts_lib.slices(place[1:])]

  with ThreadPoolExecutor(readers) as pool:
    list(pool.map(read, range(len(names))))  # raises what a reader raised
  arrays = [
    parts_lib.on_mesh(leaf, parts)
    for leaf, parts in zip(leaves, rooms, strict=True)
  ]
  return treedef.unflatten(jax.block_until_ready(arrays)), sorted(bad)


def originals(
  refs: Mapping[str, TensorRef], cfg: DecoderConfig, mesh: jax.sharding.Mesh
) -> Callable[[str, int], jax.Array]:
  """(path, layer) -> W [in, out] float32 as the files have it, on the mesh.

  Args:
    refs: all tensors of the files.
    cfg: of the model.
    mesh: where it goes, cut as the quantised W is.
  """
  rows = {param.path: param for param in params_lib.table(cfg)}

  def read(path: str, layer: int) -> jax.Array:
    param = rows[path]
    w = refs[params_lib.hf_names(cfg, param)[layer]].read().astype(np.float32)
    units = params_lib.axis_units(cfg, param)
    return parallel.put(w.T, parallel.sharding(mesh, param.axes[1:], units[1:]))

  return read


def kind_of(frozen: Any) -> str:
  """'nf4' or 'int8', by what a base has; 'none' where nothing is quantised."""
  kinds: dict[Any, str] = {Nf4Weight: 'nf4', Int8Weight: 'int8'}
  return next((kinds[type(w)] for w in weights(frozen) if type(w) in kinds), 'none')  # fmt: skip


def stored(frozen: Any) -> tuple[int, int]:
  """(elements, bytes) of the base, which may be shapes.

  An element is what an array has: of NF4 a byte of two weights. What scales
  them is none, but has its bytes.

  Args:
    frozen: from `lora.split`.
  """
  elements = n_bytes = 0
  for w in weights(frozen):
    arrays = jax.tree.leaves(w)
    elements += sum(math.prod(x.shape) for x in arrays[:1])
    n_bytes += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return elements, n_bytes


def weights(frozen: Any) -> Iterator[Any]:
  """Each weight of a base, those under an adapter among them."""
  for leaf in jax.tree.leaves(frozen, is_leaf=is_half):
    w = leaf.w if lora.is_trained(leaf) else leaf
    if w is not None:
      yield w


def disagreements(
  name: str,
  shape: tuple[int, ...],
  refs: Mapping[str, TensorRef],
  settings: Quant,
) -> list[str]:
  """What is wrong with a matrix that its files hold quantised.

  Args:
    name: of the matrix.
    shape: (out, in).
    refs: all tensors of the files.
    settings: from config.json.
  """
  problems = []
  for part, (dtype, of_part) in _wanted(name, shape, settings).items():
    ref = refs.get(part)
    if ref is None:
      problems.append(f'{part} is missing')
    elif part.endswith(_STATE) and ref.nbytes <= _STATE_BYTES:
      problems += _state_problems(ref, shape, settings)
    elif (ref.dtype, ref.shape) != (dtype, of_part):
      problems.append(
        f'{part} is {ref.dtype} of shape {ref.shape}, not {np.dtype(dtype)} of'
        f' {of_part} as a weight of {settings.kind} wants'
      )
  return problems


def names_of(name: str, settings: Quant) -> set[str]:
  """The tensors that a matrix is stored as."""
  return {*_wanted(name, (1, 1), settings)} | {_format_name(name)}


def _wanted(
  name: str, shape: tuple[int, ...], settings: Quant
) -> dict[str, tuple[Any, tuple[int, ...]]]:
  """{tensor: (dtype, shape)} of a matrix (out, in)."""
  if settings.kind == 'int8':
    return {name: (np.int8, shape), _scale_name(name): (np.float32, shape[:1])}
  n = math.prod(shape)
  n_blocks = -(-n // blockwise.BLOCK)
  wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
    name: (np.uint8, (-(-n // 2), 1)),
    f'{name}.quant_map': (np.float32, (16,)),
    f'{name}.{_STATE}': (np.uint8, ()),
  }
  if not settings.double:
    return wanted | {f'{name}.absmax': (np.float32, (n_blocks,))}
  return wanted | {
    f'{name}.absmax': (np.uint8, (n_blocks,)),
    f'{name}.nested_absmax': (np.float32, (-(-n_blocks // blockwise.BLOCK2),)),
    f'{name}.nested_quant_map': (np.float32, (256,)),
  }


def _scale_name(name: str) -> str:
  return f'{name.removesuffix(".weight")}.SCB'


def _format_name(name: str) -> str:
  """Of a number that says how int8 rows lie, which there is one way of."""
  return f'{name.removesuffix(".weight")}.weight_format'


def _state(ref: TensorRef) -> dict[str, Any]:
  """What bitsandbytes writes as JSON, in bytes; {} of what is none."""
  try:
    state = json.loads(ref.read().tobytes())
  except ValueError:  # of JSON, or of UTF-8
    return {}
  return state if isinstance(state, dict) else {}


def _state_problems(
  ref: TensorRef, shape: tuple[int, ...], settings: Quant
) -> list[str]:
  state = _state(ref)
  wanted: dict[str, Any] = {
    'quant_type': 'nf4', 'blocksize': blockwise.BLOCK, 'shape': list(shape),
  }  # fmt: skip
  if settings.double:
    wanted |= {'nested_blocksize': blockwise.BLOCK2, 'nested_dtype': 'float32'}
  odd = [f'{k} {state.get(k)!r} for {v!r}' for k, v in wanted.items() if state.get(k) != v]  # fmt: skip
  if settings.double and not isinstance(state.get('nested_offset'), float):
    odd.append('no nested_offset')
  return [f'{ref.name} has {", ".join(odd)}'] if odd else []


def _matrix(
  name: str, refs: Mapping[str, TensorRef], settings: Quant
) -> Weight | None:
  """One matrix quantised, of numpy arrays; None where it is not finite."""
  if not settings.stored:
    made: Weight
    w = refs[name].read()
    with np.errstate(over='ignore', invalid='ignore'):  # see below
      if settings.kind == 'int8':
        made = int8.quantise(w)
        scales = made.scale
      else:
        made = nf4.from_bitsandbytes(blockwise.quantise(w))
        scales = made.offset
    # What is not finite in float32 leaves no scale that is.
    return made if np.isfinite(scales).all() else None
  if settings.kind == 'int8':
    scale = refs[_scale_name(name)].read()
    one = Int8Weight(refs[name].read().T, scale, np.dtype(np.float32))
    return one if np.isfinite(scale).all() else None
  return _stored_nf4(name, refs, settings)


def _stored_nf4(
  name: str, refs: Mapping[str, TensorRef], settings: Quant
) -> Weight | None:
  state = _state(refs[f'{name}.{_STATE}'])
  maps = {'quant_map': blockwise.NF4}
  absmax2 = offset = None
  if settings.double:
    maps['nested_quant_map'] = blockwise.DYNAMIC
    absmax2 = refs[f'{name}.nested_absmax'].read()
    offset = np.asarray(state['nested_offset'], np.float32)
  for key, ours in maps.items():
    # Other versions of torch round the last bit of a table otherwise.
    if not np.allclose(refs[f'{name}.{key}'].read(), ours, rtol=1e-5):
      raise ModelError(f'{name}.{key}: another table than that of bitsandbytes')
  absmax = refs[f'{name}.absmax'].read()
  scales = [x for x in (absmax, absmax2, offset) if x is not None]
  if not all(np.isfinite(x).all() for x in scales):
    return None
  packed, out_in = refs[name].read()[:, 0], tuple(state['shape'])
  return nf4.from_bitsandbytes(
    Quantised(packed, absmax, absmax2, offset, out_in, np.dtype(np.float32))
  )
