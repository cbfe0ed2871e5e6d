"""Directories of data: several files, or what `datasets` saved."""

import json
from pathlib import Path

from lorax_train.data.problems import shorten
from lorax_train.data.rows import File
from lorax_train.errors import DataError

_STATE = 'state.json'  # of one saved data set
_SPLITS = 'dataset_dict.json'  # of several, a directory each


def files_of(
  folder: Path, path: str, split: str, suffixes: tuple[str, ...]
) -> list[File]:
  """The files that a directory of data stands for, in their order.

      dir/state.json, data-00000-of-00002.arrow ...  Dataset.save_to_disk
      dir/dataset_dict.json, train/, test/ ...       DatasetDict.save_to_disk
      dir/a.csv, b.csv.gz ...                        files of one kind, by name

  Args:
    folder: the directory.
    path: what it is called in messages.
    split: which of the splits of a DatasetDict.
    suffixes: of the files that are data, without .gz. Others are passed over.

  Raises:
    DataError: no data, data of two kinds, or a directory in it.
  """
  if (folder / _SPLITS).exists():
    known = _strings(_json(folder, path, _SPLITS), 'splits')
    if known is None or split not in known:
      raise DataError(
        f'{path}: has no split {split!r}, but {", ".join(known or ()) or "none"};'
        ' pass the directory of one'
      )
    folder, path = folder / split, str(Path(path) / split)
    if not folder.is_dir():
      raise DataError(f'{path}: no such directory; fetch the data set again')
  if (folder / _STATE).exists():
    return _saved(folder, path)
  return _by_name(folder, path, suffixes)


def _saved(folder: Path, path: str) -> list[File]:
  state = _json(folder, path, _STATE)
  entries = state.get('_data_files') if isinstance(state, dict) else None
  names = [
    entry.get('filename') if isinstance(entry, dict) else None
    for entry in (entries if isinstance(entries, list) else [None])
  ]
  for name in names:
    if not isinstance(name, str) or not name or name != Path(name).name:
      raise DataError(
        f'{path}/{_STATE}: does not list data files; save the data set again'
        ' with save_to_disk'
      )
    if not (folder / name).is_file():
      raise DataError(
        f'{path}: {name}, which {_STATE} lists, is not there; fetch it again'
      )
  return [_file(folder, path, str(name)) for name in names]


def _by_name(folder: Path, path: str, suffixes: tuple[str, ...]) -> list[File]:
  kinds: dict[str, str] = {}  # one name of each
  plain: set[str] = set()
  files = []
  for entry in sorted(folder.iterdir()):
    name = entry.name
    if name.startswith(('.', '_')):
      continue
    if entry.is_dir():
      raise DataError(
        f'{path}: holds a directory, {shorten(name)}; pass one whose files are'
        ' all in it'
      )
    stem = name.removesuffix('.gz')
    kind = next((s for s in suffixes if stem.endswith(s)), None)
    if kind is None:
      continue
    if stem in plain:
      raise DataError(f'{path}: holds {stem} and {name}; take one of them away')
    plain.add(stem)
    kinds.setdefault(kind, name)
    files.append(_file(folder, path, name))
  if len(kinds) > 1 and '.txt' in kinds:  # a README beside the data
    del kinds['.txt']
    files = [
      f for f in files if not f.path.removesuffix('.gz').endswith('.txt')
    ]
  if len(kinds) > 1:
    raise DataError(
      f'{path}: a directory of files of several kinds'
      f' ({", ".join(kinds.values())}); pass one kind'
    )
  if not files:
    raise DataError(
      f'{path}: a directory without data; pass one of {", ".join(suffixes)}'
      ' files, or what save_to_disk made'
    )
  return files


def _file(folder: Path, path: str, name: str) -> File:
  return File(folder / name, str(Path(path) / name))


def _strings(value: object, key: str) -> list[str] | None:
  found = value.get(key) if isinstance(value, dict) else None
  if isinstance(found, list) and all(isinstance(s, str) for s in found):
    return found
  return None


def _json(folder: Path, path: str, name: str) -> object:
  try:
    return json.loads((folder / name).read_bytes())
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'{path}/{name}: not JSON; save the data set again with save_to_disk'
    ) from error
