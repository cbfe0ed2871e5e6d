"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lorax_train.errors import one_line


@contextlib.contextmanager
def whole(directory: Path, lost: str) -> Iterator[Path]:
  """An empty directory beside `directory`, which takes its name at the end.

  What was there under that name goes in the same moment, and not before.

  Args:
    directory: where to.
    lost: what to say where the disk is full: 'model not written'.

  Yields:
    The directory to write into.

  Raises:
    OSError: disk full, no rights; nothing is left behind.
  """
  building = directory.with_name(directory.name + '.tmp')
  shutil.rmtree(building, ignore_errors=True)
  building.mkdir(parents=True)
  try:
    yield building
    for path in building.iterdir():
      with open(path, 'rb') as opened:
        os.fsync(opened.fileno())
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
  except SafetensorError as error:  # what a full disk is to that library
    raise OSError(
      f'{directory}: {lost}: make room and run again: {one_line(error)}'
    ) from error
  finally:
    shutil.rmtree(building, ignore_errors=True)
