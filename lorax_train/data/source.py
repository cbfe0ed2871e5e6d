"""Rows from files, directories of them, or from the Hugging Face hub.

Every row remembers where it came from, so that whatever is found wrong with it
later can be told as `file:line`. Rows are read as they are asked for: a set
need not fit in memory.
"""

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax_train.data import (
  arrow,
  folder,
  hub,
  json_rows,
  plain,
  stream,
  tables,
)
from lorax_train.data.rows import File, Row
from lorax_train.errors import DataError

_TEXT = ('.json', '.jsonl', '.csv', '.tsv', '.txt')
_BINARY = ('.parquet', '.arrow', '.feather')
_SUFFIXES = (*_TEXT, *(f'{suffix}.gz' for suffix in _TEXT), *_BINARY)


def read_rows(path: str, split: str = 'train') -> list[Row]:
  """All rows of what a path names.

  Args:
    path: see `files_of`.
    split: likewise.

  Returns:
    The rows, in the order of the files. Never empty.

  Raises:
    DataError: with every bad line of a file counted and the first five named.
  """
  rows = list(iter_rows(files_of(path, split)))
  if not rows:
    raise no_rows(path)
  return rows


def no_rows(path: str) -> DataError:
  """What to raise of a path that has none."""
  return DataError(f'{path}: no rows; pass a file that has some')


def files_of(path: str, split: str = 'train') -> list[File]:
  """The files on this disk that a path stands for, in the order of their rows.

  Args:
    path: one of
      - a file: `.json` holding an array of objects, `.jsonl`, `.csv` or `.tsv`
        with a header, `.txt`, each also with `.gz`; `.parquet`; `.arrow`,
        `.feather`.
      - a directory of such files of one kind, read in the order of their
        names, or one that `save_to_disk` of `datasets` made.
      - a hub id such as `llm-wizard/alpaca-gpt4-data`, which is fetched into
        the cache of `datasets`.
      What exists on disk, ends like a file or starts with `.`, `/` or `~` is
      local.
    split: the split of a hub data set or of a saved DatasetDict. Files have
      none.

  Raises:
    DataError: there is nothing of the kind, or it is not to be had.
  """
  local = Path(os.path.expanduser(path))
  looks_local = path.startswith(('.', '/', '~')) or path.endswith(_SUFFIXES)
  if not looks_local and not os.path.lexists(local):
    return hub.files_of(path, split)
  try:
    is_folder = stat.S_ISDIR(os.stat(local).st_mode)
  except (OSError, ValueError) as error:
    raise stream.unreadable(error, local, path) from error
  files = [File(local, path)]
  if is_folder:
    try:
      files = folder.files_of(local, path, split, (*_TEXT, *_BINARY))
    except OSError as error:
      raise stream.unreadable(error, local, path) from error
  elif not path.endswith(_SUFFIXES):
    raise DataError(
      f'{path}: not a kind of file that is read here; convert it to'
      f' {", ".join(_TEXT)} (these may be .gz), {" or ".join(_BINARY)}'
    )
  for file in files:
    stream.check(file)
  return files


def iter_rows(
  files: Sequence[File], separator: str = plain.SEPARATOR
) -> Iterator[Row]:
  """The rows of files, in order; no more of one is held than a part of it.

  The parts: a line of JSONL, an element of a JSON array, a record of a table,
  a document of text, 1024 rows of Parquet or Arrow, and a chunk of the file. A
  file's rows come before what is wrong with others of it is told, at its end.

  Args:
    files: from `files_of`.
    separator: what parts the documents of plain text, see `plain`.

  Raises:
    DataError: a file that can't be read, or with every bad line of a file
      counted and the first five named.
  """
  return itertools.chain.from_iterable(
    _rows_of(file, separator) for file in files
  )


def _rows_of(file: File, separator: str) -> Iterator[Row]:
  name = file.local.name
  if name.endswith(_BINARY):
    is_parquet = name.endswith('.parquet')
    read = arrow.read_parquet if is_parquet else arrow.read_arrow
    yield from read(file)
    return
  kind = Path(name.removesuffix('.gz')).suffix
  with stream.opened(file) as content:
    if kind == '.txt':
      yield from plain.read_text(content, file, separator)
    elif kind in ('.csv', '.tsv'):
      yield from tables.read_table(content, file)
    else:
      yield from json_rows.read_json(content, file)


def fingerprint(files: Sequence[File]) -> str:
  """Sha256 of what `iter_rows` gives: of contents, and of names in places.

  Raises:
    DataError: a file can't be read.
  """
  digest = hashlib.sha256()
  for file in files:
    with stream.unchanged(file):
      try:
        with file.local.open('rb') as content:
          sha = hashlib.file_digest(content, 'sha256').hexdigest()
      except OSError as error:
        raise stream.unreadable(error, file.local, file.path) from error
    # The suffix is what it is read by, whatever its name in messages.
    suffixes = ''.join(file.local.suffixes[-2:])
    line = [file.path, file.before, file.of_set, suffixes, sha]
    digest.update(json.dumps(line).encode() + b'\n')
  return digest.hexdigest()
