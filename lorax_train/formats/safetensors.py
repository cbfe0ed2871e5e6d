"""Safetensors files: validated by the safetensors library, read by range.

The library checks a header (lengths, overlaps, holes, dtypes) and refuses
what is wrong; a reader of ranges that trusts the header would read past the
data. So every file is opened by the library first, and only then are the
bytes of a slice read straight from the file.
"""

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lorax_train.errors import ModelError, one_line
from lorax_train.formats.jsonfile import read_object

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}

_HEAD_BYTES = 65536
# Of a transposed copy: a tile is to fit in the second-level cache. Its rows are
# a cache line longer than a power of 2.
_TILE = (128, 512)
_PAD_BYTES = 64
_LFS_HEAD = b'version https://git-lfs.github.com'


class TensorRef(NamedTuple):
  """A tensor's place on disk; `read` brings any rectangle of it."""

  file: Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    """Bytes of the whole tensor."""
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
    """The tensor, or the part of it at `index`, as a new array.

    Args:
      index: one slice of step 1 an axis; None for all.
    """
    return np.array(self._mapped()[... if index is None else tuple(index)])

  def read_into(
    self, parts: Iterable[tuple[Sequence[slice], np.ndarray]]
  ) -> None:
    """Several parts of the tensor, each into an array that is there already.

    No part is held a second time on the way, and the file is mapped once.

    Args:
      parts: slices as for `read`, and where they go: an array of that part's
        shape, in any order of memory; numbers are cast to its dtype.
    """
    mapped = self._mapped()
    for index, out in parts:
      _copy(mapped[tuple(index)], out)

  def _mapped(self) -> np.ndarray:
    """The tensor as a view of its file, of which nothing is read yet."""
    if not self.nbytes:  # there is nothing to map
      return np.zeros(self.shape, self.dtype)
    return np.memmap(
      self.file, self.dtype, 'r', offset=self.offset, shape=self.shape
    )


def _copy(source: np.ndarray, out: np.ndarray) -> None:
  """Writes `source` into `out`, cast to its dtype.

  A matrix that comes to stand transposed goes by tiles. Read down the columns
  of the file, rows whose length is a power of 2 all fall on the same few lines
  of the cache; those of a tile, a little longer, do not.
  """
  assert source.shape == out.shape
  if source.dtype == out.dtype:
    source, out = _bits(source), _bits(out)
  if out.ndim != 2 or out.strides[0] >= out.strides[1]:
    np.copyto(out, source, casting='unsafe')
    return
  rows, columns = _TILE
  room = np.empty((rows, columns + _PAD_BYTES // out.itemsize), out.dtype)
  out = _bits(out)
  for i in range(0, len(source), rows):
    for j in range(0, source.shape[1], columns):
      part = source[i : i + rows, j : j + columns]
      tile = room[: part.shape[0], : part.shape[1]]
      np.copyto(tile, part, casting='unsafe')
      out[i : i + rows, j : j + columns] = _bits(tile)


def _bits(x: np.ndarray) -> np.ndarray:
  """The same numbers as unsigned integers, which numpy copies fastest."""
  return x.view(f'u{x.itemsize}')


def open_file(path: str | os.PathLike) -> dict[str, TensorRef]:
  """Every tensor of a file, by name. No tensor data is read.

  Raises:
    ModelError: absent, damaged, or of a dtype we can't represent.
  """
  path = Path(path)
  if not path.is_file():
    raise ModelError(f'{path}: no such file')
  try:
    with safe_open(path, framework='numpy') as opened:
      names = list(opened.keys())
  except SafetensorError as error:
    raise ModelError(f'{path}: {_why_damaged(path, error)}') from None
  with open(path, 'rb') as file:
    (length,) = struct.unpack('<Q', file.read(8))
    header = json.loads(file.read(length))
  refs, unknown = {}, []
  for name in names:
    entry = header[name]
    dtype = DTYPES.get(entry['dtype'])
    if dtype is None:
      unknown.append(f'{name} ({entry["dtype"]})')
      continue
    shape = tuple(entry['shape'])
    # Without elements, the library lets any other dimension pass.
    if math.prod(n or 1 for n in shape) * dtype.itemsize > sys.maxsize:
      raise ModelError(f'{path}: {name} has shape {shape}: too large')
    begin = 8 + length + entry['data_offsets'][0]
    refs[name] = TensorRef(path, name, dtype, shape, begin)
  if unknown:
    raise ModelError(
      f'{path}: dtypes that are not supported: {few(unknown)}; supported:'
      f' {", ".join(DTYPES)}'
    )
  return refs


def open_dir(directory: Path) -> dict[str, TensorRef]:
  """Every tensor of a model directory, by name.

  model.safetensors.index.json, where there is one, decides which file a
  tensor is in; files it doesn't list are not looked at. Otherwise there is
  one model.safetensors.

  Raises:
    ModelError: shards missing, damaged, or not holding what the index says.
  """
  index = directory / 'model.safetensors.index.json'
  if index.exists():
    return _open_sharded(directory, _read_index(index))
  single = directory / 'model.safetensors'
  if single.exists():
    return open_file(single)
  pickles = sorted(
    p.name for p in directory.glob('*') if p.suffix in ('.bin', '.pt', '.pth')
  )
  if pickles:
    raise ModelError(
      f'{directory}: holds {few(pickles)} but no safetensors; pickles can run'
      ' code and are never read: convert them to safetensors first'
    )
  raise ModelError(
    f'{directory}: no model.safetensors and no model.safetensors.index.json'
  )


def fingerprint(refs: Mapping[str, TensorRef]) -> str:
  """Sha256 over name, dtype, shape and first 64 KiB of every tensor.

  Enough to tell one base from another without reading gigabytes.
  """
  digest = hashlib.sha256()
  for name, ref in sorted(refs.items()):
    digest.update(f'{name} {ref.dtype} {ref.shape}\n'.encode())
    with open(ref.file, 'rb') as file:
      file.seek(ref.offset)
      digest.update(file.read(min(ref.nbytes, _HEAD_BYTES)))
  return digest.hexdigest()


def _read_index(path: Path) -> Mapping[str, str]:
  weight_map = read_object(path).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ModelError(f'{path}: weight_map is no mapping of tensors to files')
  odd = [
    repr(file)
    for file in weight_map.values()
    if not isinstance(file, str)
    or file != os.path.basename(file)
    or file in ('', '.', '..')
  ]
  if odd:
    raise ModelError(
      f'{path}: shards must be bare file names in this directory, not'
      f' {few([*dict.fromkeys(odd)])}'
    )
  return weight_map


def _open_sharded(
  directory: Path, weight_map: Mapping[str, str]
) -> dict[str, TensorRef]:
  files = list(dict.fromkeys(weight_map.values()))
  missing = [f for f in files if not (directory / f).is_file()]
  if missing:
    raise ModelError(
      f'{directory}: {len(missing)} of {len(files)} shards missing:'
      f' {few(missing)}; download them again'
    )
  by_file = {f: open_file(directory / f) for f in files}
  lost = [n for n, f in weight_map.items() if n not in by_file[f]]
  if lost:
    raise ModelError(
      f'{directory}: the index names tensors that their shard does not hold:'
      f' {few(lost)}'
    )
  return {name: by_file[file][name] for name, file in weight_map.items()}


def _why_damaged(path: Path, error: SafetensorError) -> str:
  with open(path, 'rb') as file:
    if file.read(len(_LFS_HEAD)) == _LFS_HEAD:
      return (
        'is a Git LFS pointer, not the file itself: fetch it with'
        ' `git lfs pull`'
      )
  return (
    f'damaged or not complete ({one_line(error)}; {path.stat().st_size} bytes'
    ' on disk): download it again'
  )


def few(names: Sequence[str], limit: int = 8) -> str:
  """The first of many names, for messages."""
  shown = ', '.join(map(str, names[:limit]))
  more = len(names) - limit
  return shown if more <= 0 else f'{shown} and {more} more'
