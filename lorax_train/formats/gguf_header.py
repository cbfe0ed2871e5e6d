"""The head of a GGUF file: its metadata, and where its tensors lie.

Every length is checked against the file before anything is made of it: the
reader of the package `gguf` trusts an array's count, and an array that claims
2**60 numbers at the end of a file keeps it busy for ever. Layout as in
llama.cpp's docs for versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_train.errors import ModelError

_MAGIC = b'GGUF'
_LFS_HEAD = b'version https://git-lfs.github.com'
_VERSIONS = (2, 3)
_MOST = 2**16  # keys, and tensors: real files have some dozens, and hundreds
_MOST_DIMS = 4
_LONGEST_NAME = 128

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
  0: np.dtype('<u1'),
  1: np.dtype('<i1'),
  2: np.dtype('<u2'),
  3: np.dtype('<i2'),
  4: np.dtype('<u4'),
  5: np.dtype('<i4'),
  6: np.dtype('<f4'),
  7: np.dtype('?'),
  10: np.dtype('<u8'),
  11: np.dtype('<i8'),
  12: np.dtype('<f8'),
}


class Stored(NamedTuple):
  """A tensor's place in the file.

  Attributes:
    kind: ggml's number of its type.
    shape: as numpy has it, rows before columns.
    offset: from the file's begin.
    nbytes: of its blocks.
  """

  kind: int
  shape: tuple[int, ...]
  offset: int
  nbytes: int

  @property
  def values(self) -> int:
    """How many there are when unpacked."""
    return math.prod(self.shape)


class Gguf(NamedTuple):
  """A file's head; the getters refuse what is absent or of another kind.

  Attributes:
    path: the file.
    fields: {key: str, bool, int, float, list of str or numpy array}.
    tensors: {name: place}.
  """

  path: Path
  fields: dict[str, Any]
  tensors: dict[str, Stored]

  def text(self, key: str, default: str | None = None) -> str:
    """A string."""
    value = self.fields.get(key, default)
    if isinstance(value, str):
      return value
    raise self._wrong(key, value, 'a string')

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    value = self.fields.get(key, default)
    if isinstance(value, bool):
      return value
    raise self._wrong(key, value, 'true or false')

  def size(self, key: str, default: int | None = None) -> int:
    """A positive integer."""
    value = self.fields.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
      return value
    raise self._wrong(key, value, 'a positive integer')

  def number(self, key: str, default: float | None = None) -> float:
    """A positive, finite number."""
    value = self.fields.get(key, default)
    if isinstance(value, float) and 0 < value < math.inf:
      return value
    raise self._wrong(key, value, 'a positive number')

  def token_id(self, key: str, below: int) -> int | None:
    """An id below `below`, None where the key is absent."""
    value = self.fields.get(key)
    if value is None:
      return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and 0 <= value < below:
      return value
    raise self._wrong(key, value, f'an id below {below}')

  def texts(self, key: str) -> list[str]:
    """A list of strings."""
    value = self.fields.get(key)
    if isinstance(value, list):
      return value
    raise self._wrong(key, value, 'a list of strings')

  def numbers(self, key: str, count: int) -> np.ndarray:
    """An array of that many numbers."""
    value = self.fields.get(key)
    if isinstance(value, np.ndarray) and value.size == count:
      return value
    raise self._wrong(key, value, f'an array of {count} numbers')

  def _wrong(self, key: str, value: Any, wanted: str) -> ModelError:
    if value is None:
      return ModelError(f'{self.path}: {key} is missing')
    got = ' '.join(repr(value).split())
    got = got if len(got) < 60 else f'{type(value).__name__} ({got[:40]}...)'
    return ModelError(f'{self.path}: {key} is {got}, not {wanted}')


def read(path: Path, block_sizes: Mapping[Any, tuple[int, int]]) -> Gguf:
  """Reads the head; of the tensors' data, nothing.

  Args:
    path: the file.
    block_sizes: {ggml's type: (values in a block, its bytes)}.

  Raises:
    ModelError: not a GGUF file, or one that is damaged or cut off.
  """
  with open(path, 'rb') as file:
    start = file.read(len(_LFS_HEAD))
    if start == _LFS_HEAD:
      raise ModelError(
        f'{path}: is a Git LFS pointer, not the file itself: fetch it with'
        ' `git lfs pull`'
      )
    if start[:4] != _MAGIC:
      raise ModelError(
        f'{path}: not a GGUF file: begins with {start[:4]!r}, not {_MAGIC!r}'
      )
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      sizes = {int(kind): size for kind, size in block_sizes.items()}
      return _Reader(path, data).gguf(sizes)


class _Reader:
  """A position in the file that moves on, and never past the end."""

  def __init__(self, path: Path, data: mmap.mmap):
    self.path = path
    self.data = data
    self.at = len(_MAGIC)

  def gguf(self, sizes: Mapping[int, tuple[int, int]]) -> Gguf:
    version = self.scalar('<I')
    if version not in _VERSIONS:
      raise self.damaged(
        f'version {version} is not supported (supported: 2 and 3,'
        ' little-endian)'
      )
    tensor_count, key_count = self.scalar('<Q'), self.scalar('<Q')
    if max(tensor_count, key_count) > _MOST:
      raise self.damaged(f'claims {tensor_count} tensors, {key_count} keys')
    fields: dict[str, Any] = {}
    for _ in range(key_count):
      key = self.name()
      if key in fields:
        raise self.damaged(f'the key {key!r} is there twice')
      fields[key] = self.value(self.scalar('<I'), key)
    raw = [self.tensor_info() for _ in range(tensor_count)]
    alignment = fields.get('general.alignment', 32)
    if type(alignment) is not int or alignment < 1 or alignment % 8:
      raise self.damaged(f'general.alignment is {alignment!r}')
    begin = self.at + -self.at % alignment
    return Gguf(self.path, fields, self.tensors(raw, begin, sizes))

  def tensors(
    self,
    raw: list[tuple[str, tuple[int, ...], int, int]],
    begin: int,
    sizes: Mapping[int, tuple[int, int]],
  ) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for name, shape, kind, offset in raw:
      if name in tensors:
        raise self.damaged(f'the tensor {name!r} is there twice')
      if kind not in sizes:
        raise self.damaged(f'{name}: tensor type {kind} is not known')
      values, nbytes = sizes[kind]
      if not shape or not all(shape) or shape[-1] % values:
        raise self.damaged(f'{name}: shape {shape} is not possible')
      blocks = math.prod(shape) // values
      stored = Stored(kind, shape, begin + offset, blocks * nbytes)
      if stored.offset + stored.nbytes > len(self.data):
        raise self.damaged(
          f'cut off: {name} ends at byte'
          f' {stored.offset + stored.nbytes}, the file at {len(self.data)}'
        )
      tensors[name] = stored
    end = 0
    for name, stored in sorted(tensors.items(), key=lambda x: x[1].offset):
      if stored.offset < end:
        raise self.damaged(f'{name} overlaps another tensor')
      end = stored.offset + stored.nbytes
    return tensors

  def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
    name = self.name()
    dims = self.scalar('<I')
    if dims > _MOST_DIMS:
      raise self.damaged(f'{name}: {dims} dimensions')
    shape = tuple(self.scalar('<Q') for _ in range(dims))[::-1]
    return name, shape, self.scalar('<I'), self.scalar('<Q')

  def value(self, kind: int, key: str) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return _plain(
        np.frombuffer(self.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0]
      )
    if kind != _ARRAY:
      raise self.damaged(f'{key}: value type {kind} is not known')
    item, count = self.scalar('<I'), self.scalar('<Q')
    if item in _SCALARS:
      data = self.take(count * _SCALARS[item].itemsize)
      return np.frombuffer(data, _SCALARS[item])
    if item != _STRING:
      raise self.damaged(f'{key}: array of type {item} is not supported')
    if count * 8 > len(self.data) - self.at:
      raise self.damaged(f'cut off inside {key}')
    return [self.string() for _ in range(count)]

  def name(self) -> str:
    """A string that may stand in a message as it is."""
    name = self.string()
    if not name.isprintable() or len(name) > _LONGEST_NAME:
      raise self.damaged(f'{name[:40]!r} is no name of a key or tensor')
    return name

  def string(self) -> str:
    content = self.take(self.scalar('<Q'))
    try:
      return content.decode('utf-8')
    except UnicodeDecodeError:
      raise self.damaged(f'{content[:40]!r} is not UTF-8') from None

  def scalar(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def take(self, count: int) -> bytes:
    if count > len(self.data) - self.at:
      raise self.damaged(
        f'cut off: wants {count} bytes at byte {self.at} of {len(self.data)}'
      )
    self.at += count
    return self.data[self.at - count : self.at]

  def damaged(self, why: str) -> ModelError:
    return ModelError(f'{self.path}: damaged or not supported: {why}')


def _plain(value: Any) -> Any:
  """A Python number; a float32 as the shortest decimal that gives it."""
  if isinstance(value, np.float32):
    return float(str(value))
  return value.item()
