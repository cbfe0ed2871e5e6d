"""Data sets of the Hugging Face hub, as the Arrow files they are cached in."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from lorax_train.data import arrow
from lorax_train.data.problems import one_line, shorten
from lorax_train.data.rows import File
from lorax_train.errors import DataError

# Long enough for a slow link, short enough for somebody who waits: the hub's
# own retries on a closed network took 23 s.
_PROBE_SECONDS = 5.0

# What `datasets` takes for the name of a split alone, and not for a part of one
# or several.
_WHOLE_SPLIT = re.compile(r'\w+(\.\w+)*')


def files_of(name: str, split: str) -> list[File]:
  """A data set of the hub, or its copy in the cache if the hub is out of reach.

  One request with a time limit asks whether the hub answers. If it does not,
  `datasets` is told for this call that it is offline: it then looks in its
  cache at once, where it would otherwise retry for 23 s first.

  Values are as they are stored: an image is `{'bytes': ..., 'path': ...}`.

  Args:
    name: `owner/name`.
    split: one of its splits, or what `datasets` takes for one.

  Raises:
    DataError: neither has it.
  """
  import datasets
  import huggingface_hub

  refusal = None
  try:
    huggingface_hub.HfApi().dataset_info(name, timeout=_PROBE_SECONDS)
  except Exception as error:  # network, HTTP, name: all end in the same way
    refusal = error
  offline = datasets.config.HF_HUB_OFFLINE
  datasets.config.HF_HUB_OFFLINE = offline or refusal is not None
  try:
    table = datasets.load_dataset(name, split=split)
    return _files(table, f'{name}[{split}]', split)
  except DataError:  # a damaged file of the cache: named already
    raise
  except Exception as error:
    raise DataError(
      f'{name}[{split}]: not to be had from the Hugging Face hub'
      f' ({_cause(refusal or error)}); pass a local file as --config.data.path'
    ) from error
  finally:
    datasets.config.HF_HUB_OFFLINE = offline


def _files(table: Any, place: str, split: str) -> list[File]:
  """The files of a data set, if their rows are its rows; else a copy of these.

  They are not where only a part of a split is asked for, or where `datasets`
  keeps a small set in memory.
  """
  if _WHOLE_SPLIT.fullmatch(split):
    files, before = [], 0
    for cached in table.cache_files:
      file = File(Path(cached['filename']), place, before, of_set=True)
      files.append(file)
      before += arrow.count_rows(file)
    if before == len(table):
      return files
  return [_copied(table, place)]


def _copied(table: Any, place: str) -> File:
  """Its rows as a file in the cache of `datasets`, named by what it holds."""
  import datasets

  folder = Path(datasets.config.HF_DATASETS_CACHE) / 'lorax_train'
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as building:
    made = Path(building) / 'rows.parquet'
    table.to_parquet(str(made))
    with made.open('rb') as content:
      sha = hashlib.file_digest(content, 'sha256').hexdigest()
    local = folder / f'{sha}.parquet'
    os.replace(made, local)
  return File(local, place, of_set=True)


def _cause(error: Exception) -> str:
  from huggingface_hub import errors

  if isinstance(error, errors.OfflineModeIsEnabled):
    return 'HF_HUB_OFFLINE is set and the cache does not hold it'
  if isinstance(error, errors.GatedRepoError):
    return 'gated: accept its terms on the hub and log in with `hf auth login`'
  if isinstance(error, errors.RepositoryNotFoundError):
    return 'no such data set, or a private one: check its name'
  if isinstance(error, errors.HfHubHTTPError):
    return f'HTTP {error.response.status_code}'
  return shorten(one_line(f'{type(error).__name__}: {error}'), 160)
