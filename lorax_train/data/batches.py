"""Which rows make up which batch, and batches as arrays.

The order is a pure function of (seed, step, global batch): a resumed run needs
the step number and nothing else, every host works out the same numbers of rows,
and reads its own of them alone. What is numbered may be rows or packs.
Permutations are argsorts of a bit generator's raw output, not
`Generator.permutation`, whose stream numpy may change between versions: an
upgrade must not reorder the data of a run that is resumed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.joined import RowSet
from lorax_train.data.packing import Packs
from lorax_train.data.sequences import EMPTY
from lorax_train.errors import DataError

# Streams: what is drawn for one tells nothing of another.
HELD_OUT, EPOCH, SOURCE, BLOCK, BATCHES = range(5)

Walk = Callable[[int, int], np.ndarray]  # (begin, count) -> numbers of rows


def split_held_out(
  n_rows: int, n_eval: int, seed: int, source: int = 0, n_train: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Sets `n_eval` random rows aside.

  Args:
    n_rows: how many there are.
    n_eval: how many to set aside.
    seed: of the run.
    source: which of several sources the rows are of.
    n_train: how many to train on; 0 for all that are left.

  Returns:
    Indices of the rows to train on and of those to evaluate on, each sorted.

  Raises:
    DataError: so many rows there are not.
  """
  if n_train and n_train + n_eval > n_rows:
    raise DataError(
      f'data.rows={n_train} and eval.rows={n_eval}: there are {n_rows:,} rows;'
      ' lower one of them'
    )
  if not 0 <= n_eval < n_rows:
    raise DataError(
      f'eval.rows={n_eval}: {n_rows} rows can give 0 to {n_rows - 1} for'
      ' evaluation; lower it, or name a file as --config.data.eval_path'
    )
  order = shuffled(n_rows, seed, HELD_OUT, 0, source)
  end = n_eval + n_train if n_train else n_rows
  return np.sort(order[n_eval:end]), np.sort(order[:n_eval])


def row_order(
  n_rows: int, seed: int, epoch: int, source: int | None = None
) -> np.ndarray:
  """The order of the rows in one epoch: a permutation.

  Args:
    n_rows: how many there are.
    seed: of the run.
    epoch: counted from 0.
    source: of several sources which, each has orders of its own.
  """
  if source is None:
    return shuffled(n_rows, seed, EPOCH, epoch)
  return shuffled(n_rows, seed, SOURCE, epoch, source)


def walk_of(n_rows: int, seed: int, source: int | None = None) -> Walk:
  """A walk through the rows, epoch after epoch, each in its `row_order`.

  Epochs follow each other without a gap: a batch may hold the end of one and
  the start of the next, so no row is left out. A set smaller than a batch
  repeats within it.
  """

  # A walk's own, or many sources would push out one another's orders: the epoch
  # it is in, and at a border the next.
  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return row_order(n_rows, seed, epoch, source)

  def walk(begin: int, count: int) -> np.ndarray:
    rows = [np.zeros(0, np.int64)]
    while count:
      epoch, offset = divmod(begin, n_rows)
      rows.append(order(epoch)[offset : offset + count])
      begin += len(rows[-1])
      count -= len(rows[-1])
    return np.concatenate(rows)

  return walk


def row_length(tokenized: RowSet, max_length: int, multiple: int = 64) -> int:
  """One length for every batch of a run, so that the step compiles once."""
  report = tokenized.report
  longest = report.longest if report.choices else tokenized.lengths.max()
  return min(max_length, -(-int(longest) // multiple) * multiple)


def pad_batch(
  ids: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  length: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """Rows side by side, filled up at the right.

  Returns:
    `ids` int32 [B, T], `labels` int32 [B, T] with -100 in the padding, `mask`
    bool [B, T], true on tokens.

  Raises:
    ValueError: a row is longer than `length`.
  """
  shape = len(ids), length
  batch = {
    'ids': np.full(shape, pad_id, np.int32),
    'labels': np.full(shape, NO_LOSS, np.int32),
    'mask': np.zeros(shape, np.bool_),
  }
  for b, (row, targets) in enumerate(zip(ids, labels, strict=True)):
    if len(row) > length:
      raise ValueError(f'row {b} has {len(row)} tokens, the batch {length}')
    batch['ids'][b, : len(row)] = row
    batch['labels'][b, : len(row)] = targets
    batch['mask'][b, : len(row)] = True
  return batch


def pad_packs(
  ids: Sequence[Sequence[np.ndarray]],
  labels: Sequence[Sequence[np.ndarray]],
  length: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """Packs of rows, side by side: each row is a segment.

  The first label of a segment is -100: the loss scores a position on the label
  after it, and none may be scored on the first token of another row.

  Returns:
    What `pad_batch` gives; `segments` int32 [B, T], each pack's rows counted
    from 1, 0 in the padding; `positions` int32 [B, T], from 0 in each segment.

  Raises:
    ValueError: a pack is longer than `length`.
  """
  batch = pad_batch(
    [np.concatenate(rows) for rows in ids],
    [np.concatenate(rows) for rows in labels],
    length,
    pad_id,
  )
  segments, positions = (np.zeros_like(batch['ids']) for _ in range(2))
  for b, rows in enumerate(ids):
    begin = 0
    for number, row in enumerate(rows, start=1):
      end = begin + len(row)
      batch['labels'][b, begin:end][:1] = NO_LOSS
      segments[b, begin:end] = number
      positions[b, begin:end] = np.arange(len(row))
      begin = end
  return {**batch, 'segments': segments, 'positions': positions}


def take_rows(
  tokenized: RowSet, rows: np.ndarray, length: int, pad_id: int
) -> dict[str, np.ndarray]:
  """Rows by their numbers as a batch, see `pad_batch`; EMPTY for padding."""
  nothing = np.zeros(0, np.int32)
  return pad_batch(
    [nothing if i == EMPTY else tokenized.ids[i] for i in rows],
    [nothing if i == EMPTY else tokenized.labels[i] for i in rows],
    length,
    pad_id,
  )


def take_packs(
  tokenized: RowSet, packs: Packs, chosen: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
  """Packs by their numbers as a batch, see `pad_packs`."""
  rows_of = [packs.rows[i] for i in chosen]
  return pad_packs(
    [[tokenized.ids[i] for i in rows] for rows in rows_of],
    [[tokenized.labels[i] for i in rows] for rows in rows_of],
    packs.length,
    pad_id,
  )


def in_batches(indices: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
  """Every row of `indices` once, in order, the last batch filled with EMPTY."""
  for begin in range(0, len(indices), batch_size):
    rows = np.full(batch_size, EMPTY)
    chosen = indices[begin : begin + batch_size]
    rows[: len(chosen)] = chosen
    yield rows


def eval_batches(
  tokenized: RowSet,
  indices: np.ndarray,
  batch_size: int,
  length: int,
  pad_id: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Every row of `indices` once, in order, in batches of one shape.

  The last batch is filled up with rows of nothing but padding.
  """
  for rows in in_batches(indices, batch_size):
    yield take_rows(tokenized, rows, length, pad_id)


def shuffled(n: int, seed: int, stream: int, *numbers: int) -> np.ndarray:
  """A permutation of 0 to n - 1, the same on any machine: int64 [n].

  Args:
    n: how many.
    seed: of the run.
    stream: what it is for.
    numbers: which of that.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, stream, *numbers]))
  # stable: should two draws be equal, their order is still the same everywhere
  return np.argsort(bits.random_raw(n), kind='stable')
