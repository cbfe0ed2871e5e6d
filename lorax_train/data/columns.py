"""Rows of numbers and texts in flat files: read where they lie, not loaded.

A directory of them holds, little-endian and without any header:

    ids.i4      int32: the rows' ids, one after another
    labels.i4   int32: their labels
    ends.i8     int64: where each row ends among these
    where.txt   UTF-8: the rows' places in the data, one after another
    places.i8   int64: where each of those ends, in bytes
"""

import contextlib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple, overload

import numpy as np

_FILES = {
  'ids.i4': '<i4',
  'labels.i4': '<i4',
  'ends.i8': '<i8',
  'where.txt': '<u1',
  'places.i8': '<i8',
}
_NAMES = 'surrogateescape'  # names of files need not be UTF-8


class Ragged(Sequence[np.ndarray]):
  """Arrays of different lengths in one flat array.

  >>> rows = Ragged(np.array([5, 6, 7]), np.array([1, 3]))
  >>> len(rows), rows[1], rows[-2]
  (2, array([6, 7]), array([5]))
  """

  def __init__(self, flat: np.ndarray, ends: np.ndarray):
    """Row i is flat[ends[i - 1] : ends[i]]."""
    self.flat, self.ends = flat, ends

  def __len__(self) -> int:
    return len(self.ends)

  @overload
  def __getitem__(self, index: int) -> np.ndarray: ...
  @overload
  def __getitem__(self, index: slice) -> list[np.ndarray]: ...
  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]
    begin = self.ends[index - 1] if index else 0
    return self.flat[begin : self.ends[index]]


class Texts(Sequence[str]):
  """Texts in one flat array of bytes."""

  def __init__(self, encoded: Ragged):
    """Each row of `encoded` is the UTF-8 of a text."""
    self._encoded = encoded

  def __len__(self) -> int:
    return len(self._encoded)

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> list[str]: ...
  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return self._encoded[index].tobytes().decode('utf-8', _NAMES)


class Columns(NamedTuple):
  """What the files hold."""

  ids: Ragged
  labels: Ragged
  where: Texts


class Writer:
  """Puts rows down one by one, into files or into memory."""

  def __init__(self, folder: Path | None):
    """Files go into `folder`; None is memory.

    Raises:
      OSError: they can't be made.
    """
    self._folder = folder
    self._n_tokens = self._n_bytes = 0
    self._digest = hashlib.sha256()
    self._streams: list[IO[bytes]] = []
    for name in _FILES:
      self._streams.append(
        (folder / name).open('wb') if folder else io.BytesIO()
      )

  def append(self, ids: np.ndarray, labels: np.ndarray, where: str) -> None:
    """One row: its ids and labels, int32 [T], and its place."""
    place = where.encode('utf-8', _NAMES)
    self._n_tokens += len(ids)
    self._n_bytes += len(place)
    numbers = ids.astype('<i4').tobytes(), labels.astype('<i4').tobytes()
    self._digest.update(len(ids).to_bytes(8, 'little'))
    self._digest.update(b''.join(numbers))
    parts = (
      *numbers,
      self._n_tokens.to_bytes(8, 'little'),
      place,
      self._n_bytes.to_bytes(8, 'little'),
    )
    for stream, part in zip(self._streams, parts, strict=True):
      stream.write(part)

  @property
  def fingerprint(self) -> str:
    """Sha256 over the ids and labels of all rows, places left out."""
    return self._digest.hexdigest()

  def finish(self) -> Columns:
    """The rows that were written: at least one."""
    if self._folder:
      self.close()
      return mapped(self._folder)
    return _columns([
      np.frombuffer(stream.getvalue(), dtype)  # type: ignore[attr-defined]
      for stream, dtype in zip(self._streams, _FILES.values(), strict=True)
    ])  # fmt: skip

  def close(self) -> None:
    """Closes the files, all of them though one can't be."""
    with contextlib.ExitStack() as stack:
      for stream in self._streams:
        stack.callback(stream.close)


def mapped(folder: Path) -> Columns:
  """The rows of a directory; they stay on the disk.

  Raises:
    OSError: a file is absent.
    ValueError: a file is empty, or cut off.
  """
  return _columns([
    np.asarray(np.memmap(folder / name, dtype, 'r'))
    for name, dtype in _FILES.items()
  ])  # fmt: skip


def sums(folder: Path) -> dict[str, str]:
  """Sha256 of each of the files.

  Raises:
    OSError: a file is absent.
  """
  found = {}
  for name in _FILES:
    with (folder / name).open('rb') as file:
      found[name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return found


def _columns(flat: Sequence[np.ndarray]) -> Columns:
  ids, labels, ends, where, places = flat
  return Columns(
    Ragged(ids, ends), Ragged(labels, ends), Texts(Ragged(where, places))
  )
