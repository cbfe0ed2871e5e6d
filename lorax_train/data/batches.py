"""Which rows make up which batch, and batches as arrays.

The order is a pure function of (seed, step, global batch): a resumed run needs
the step number and nothing else, and every host works out the same batch.
Permutations are argsorts of a bit generator's raw output, not
`Generator.permutation`, whose stream numpy may change between versions: an
upgrade must not reorder the data of a run that is resumed.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from lorax_train.data.encode import NO_LOSS
from lorax_train.data.packing import Packs
from lorax_train.data.tokenized import TokenizedSet
from lorax_train.errors import DataError

_HELD_OUT, _EPOCH = (
  0,
  1,
)  # streams: what is drawn for one tells nothing of other


def split_held_out(
  n_rows: int, n_eval: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Sets `n_eval` random rows aside.

  Returns:
    Indices of the rows to train on and of those to evaluate on, each sorted.

  Raises:
    DataError: nothing would be left to train on.
  """
  if not 0 <= n_eval < n_rows:
    raise DataError(
      f'eval.rows={n_eval}: {n_rows} rows can give 0 to {n_rows - 1} for'
      ' evaluation; lower it, or name a file as --config.data.eval_path'
    )
  order = _permutation(n_rows, seed, _HELD_OUT, 0)
  return np.sort(order[n_eval:]), np.sort(order[:n_eval])


def row_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
  """The order of the rows in one epoch: a permutation, read-only."""
  return _permutation(n_rows, seed, _EPOCH, epoch)


def rows_at(step: int, n_rows: int, global_batch: int, seed: int) -> np.ndarray:
  """Rows of the batch at `step`, counted from 0: int64 [global_batch].

  Epochs follow each other without a gap: a batch may hold the end of one and
  the start of the next, so no row is left out. A set smaller than a batch
  repeats within it.
  """
  position = step * global_batch
  rows = []
  wanted = global_batch
  while wanted:
    epoch, offset = divmod(position, n_rows)
    part = row_order(n_rows, seed, epoch)[offset : offset + wanted]
    rows.append(part)
    position += len(part)
    wanted -= len(part)
  return np.concatenate(rows)


def row_length(
  tokenized: TokenizedSet, max_length: int, multiple: int = 64
) -> int:
  """One length for every batch of a run, so that the step compiles once."""
  longest = tokenized.report.longest
  return min(max_length, -(-longest // multiple) * multiple)


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


def batch_at(
  tokenized: TokenizedSet,
  indices: np.ndarray,
  step: int,
  global_batch: int,
  seed: int,
  length: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """The training batch at `step`, drawn from the rows `indices`."""
  rows = indices[rows_at(step, len(indices), global_batch, seed)]
  return _take(tokenized, rows, length, pad_id)


def packed_batch_at(
  tokenized: TokenizedSet,
  packs: Packs,
  step: int,
  global_batch: int,
  seed: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """The training batch at `step` of packs, in the order of so many rows."""
  chosen = [
    packs.rows[i] for i in rows_at(step, len(packs.rows), global_batch, seed)
  ]
  return pad_packs(
    [[tokenized.ids[i] for i in rows] for rows in chosen],
    [[tokenized.labels[i] for i in rows] for rows in chosen],
    packs.length,
    pad_id,
  )


def eval_batches(
  tokenized: TokenizedSet,
  indices: np.ndarray,
  batch_size: int,
  length: int,
  pad_id: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Every row of `indices` once, in order, in batches of one shape.

  The last batch is filled up with rows of nothing but padding.
  """
  for begin in range(0, len(indices), batch_size):
    rows = indices[begin : begin + batch_size]
    yield _take(tokenized, rows, length, pad_id, batch_size - len(rows))


def _take(
  tokenized: TokenizedSet,
  rows: np.ndarray,
  length: int,
  pad_id: int,
  n_empty: int = 0,
) -> dict[str, np.ndarray]:
  empty = [np.zeros(0, np.int32)] * n_empty
  return pad_batch(
    [tokenized.ids[i] for i in rows] + empty,
    [tokenized.labels[i] for i in rows] + empty,
    length,
    pad_id,
  )


# A step needs the epoch it is in, and at a border the next: more are kept for
# sets smaller than a batch, and so that two sets can take turns.
@functools.lru_cache(maxsize=16)
def _permutation(n_rows: int, seed: int, stream: int, epoch: int) -> np.ndarray:
  bits = np.random.Philox(np.random.SeedSequence([seed, stream, epoch]))
  # stable: should two draws be equal, their order is still the same everywhere
  order = np.argsort(bits.random_raw(n_rows), kind='stable')
  order.setflags(write=False)
  return order
