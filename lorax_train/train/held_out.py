"""Which rows of each source are held out, and which are trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorax_train.config import Source, TrainConfig
from lorax_train.data import batches, mixture
from lorax_train.data.tokenized import TokenizedSet
from lorax_train.errors import DataError


def split(
  cfg: TrainConfig,
  sources: Sequence[Source],
  tokenised: Sequence[TokenizedSet],
  n_eval: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(rows to train on, rows held out) of each source.

  A row that is held out of one source is not trained on in another template.

  Raises:
    DataError: a source has nothing to train on, or fewer rows than are asked for.
  """
  parts = mixture.shares([source.weight for source in sources])
  wanted = mixture.apportion(n_eval, parts, [0] * len(parts))
  parted = []
  for s, rows in enumerate(tokenised):
    n_rows = len(rows.lengths)
    n_train = cfg.data.rows
    n_held = wanted[s] if n_train else min(wanted[s], n_rows // 10)
    parted.append(
      batches.split_held_out(n_rows, n_held, cfg.train.seed, s, n_train)
    )
  shared = _read_twice([source.path for source in sources])
  gone = {
    place(rows.where[i])
    for place, rows, (_, held) in zip(shared, tokenised, parted, strict=True)
    if place
    for i in held
  }
  out = []
  for source, place, rows, (train, held) in zip(
    sources, shared, tokenised, parted, strict=True
  ):
    if place:
      kept = [i for i in train.tolist() if place(rows.where[i]) not in gone]
      train = np.array(kept, np.int64)
    if not len(train):
      raise DataError(
        f'{source.path}: each of its rows is held out in another template; lower'
        f' eval.rows={cfg.eval.rows}, or name a file as --config.data.eval_path'
      )
    out.append((train, held))
  return out


def _read_twice(given: Sequence[str]) -> list[Callable[[str], str] | None]:
  """For each path, what makes of a row's place one however the path is spelt.

  None where no other path holds any of its rows.
  """
  real = [Path(path).expanduser().resolve() for path in given]

  def of(n: int) -> Callable[[str], str] | None:
    # As it stands in places: a file as it was given, or in a directory's Path.
    said = given[n] if real[n].is_file() else str(Path(given[n]))
    others = real[:n] + real[n + 1 :]
    if not any(
      real[n] == other or real[n] in other.parents or other in real[n].parents
      for other in others
    ):
      return None
    return lambda where: str(real[n]) + where.removeprefix(said)

  return [of(n) for n in range(len(given))]


def in_turn(parts: Sequence[np.ndarray]) -> np.ndarray:
  """All numbers, a first of each part, then a second: samples of each."""
  turns = np.concatenate([np.arange(len(part)) for part in parts])
  return np.concatenate(parts)[np.argsort(turns, kind='stable')]
