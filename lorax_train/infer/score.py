"""Logits and loss of given token ids: what `score` computes.

The numbers that every other implementation can be compared with.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_train.errors import DataError, one_line
from lorax_train.formats import find
from lorax_train.infer.load import load_params

IGNORED = -100

# What numpy and zipfile raise on a file that is not what it says.
_UNREADABLE = (
  *(ValueError, OSError, EOFError, MemoryError, RuntimeError),
  *(zipfile.BadZipFile, zlib.error),
)


def score(
  model: str,
  tokens: str | os.PathLike,
  out: str | os.PathLike,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  batch_size: int = 8,
  quant: str | None = None,
) -> dict[str, Any]:
  """Scores the ids in one npz file and writes another.

  Args:
    model: directory in Hugging Face format, or a hub id.
    tokens: npz with `ids` int [B, T], and where wanted `mask` [B, T] (0 where
      a token is not attended to) and `labels` int [B, T] (unshifted, -100 for
      no loss).
    out: npz that gets `logits` float32 [B, T, V] and, with labels, `loss`
      float32: the mean over labels that are not -100, each predicted from the
      position before it.
    adapter: PEFT adapter directory.
    dtype: compute and storage dtype.
    batch_size: rows computed at once.
    quant: see `load`.

  Returns:
    {'rows', 'tokens', 'loss'}; loss is None without labels.

  Raises:
    DataError: arrays missing, of the wrong kind, or ids past the embedding.
    ModelError: what is wrong with the model or the adapter.
  """
  arrays = read_tokens(tokens)
  apply, params = load_params(
    find.find_model(model), None, adapter, dtype, quant=quant
  )
  check_ids(arrays, params['embed_tokens'].shape[0], str(tokens))
  run = jax.jit(lambda params, ids, mask: apply(params, ids, mask_BS=mask))
  logits = np.concatenate(
    [
      np.asarray(run(params, ids, mask))[:n]
      for ids, mask, n in batches(arrays, batch_size)
    ]
  )
  result: dict[str, Any] = {'logits': logits}
  if 'labels' in arrays:
    result['loss'] = np.float32(mean_loss(logits, arrays['labels']))
  # An open file, as savez would append .npz to a name without it.
  with open(out, 'wb') as file:
    np.savez(file, **result)
  return {
    'rows': logits.shape[0],
    'tokens': arrays['ids'].size,
    'loss': float(result['loss']) if 'loss' in result else None,
  }


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
  """Mean next-token cross-entropy over labels that are not -100.

  NaN where there is no such label, as transformers has it.

  Args:
    logits: [B, T, V].
    labels: [B, T], unshifted.
  """
  targets = labels[:, 1:]
  scored = targets != IGNORED
  losses = optax.softmax_cross_entropy_with_integer_labels(
    jnp.asarray(logits[:, :-1], jnp.float32),
    jnp.asarray(np.maximum(targets, 0), jnp.int32),
  )
  count = scored.sum()
  total = np.asarray(losses, np.float64)[scored].sum()
  return float(total / count) if count else float('nan')


def read_tokens(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """`ids`, and where they are there `mask` and `labels`, of an npz file.

  Raises:
    DataError: no such file, or arrays missing or of the wrong kind.
  """
  try:
    with open(path, 'rb') as file:
      found = np.load(file, allow_pickle=False)
      if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError('it is a single array')
      arrays = {
        name: np.asarray(found[name])  # bytes, where a member is no array
        for name in ('ids', 'mask', 'labels')
        if name in found
      }
  except FileNotFoundError:
    raise DataError(f'--tokens {path}: no such file') from None
  except _UNREADABLE as error:
    raise DataError(
      f'--tokens {path}: not an npz file of plain arrays: {one_line(error)}'
    ) from None
  ids = arrays.get('ids')
  problems = []
  if ids is None:
    problems.append('ids is missing')
  for name, x in arrays.items():
    kind_ok = np.issubdtype(x.dtype, np.integer) or (
      name == 'mask' and x.dtype == np.bool_
    )
    if x.ndim != 2 or not x.size or not kind_ok:
      problems.append(
        f'{name} is {x.dtype} {list(x.shape)}, not integers [B, T]'
      )
    elif ids is not None and x.shape != ids.shape:
      problems.append(f'{name} is {list(x.shape)}, ids {list(ids.shape)}')
  if problems:
    raise DataError(f'--tokens {path}: {"; ".join(problems)}')
  return arrays


def check_ids(arrays: Mapping[str, np.ndarray], vocab: int, where: str) -> None:
  """Refuses ids and labels that are none of a vocabulary.

  Raises:
    DataError: the first of them.
  """
  ids, labels = arrays['ids'], arrays.get('labels')
  for name, x, allowed in (('ids', ids, ()), ('labels', labels, (IGNORED,))):
    if x is None:
      continue
    bad = ((x < 0) | (x >= vocab)) & ~np.isin(x, allowed)
    if bad.any():
      row, column = np.argwhere(bad)[0]
      raise DataError(
        f'--tokens {where}: {name}[{row}, {column}] is {x[row, column]}; the'
        f' model has {vocab} rows in its embedding'
      )


def batches(
  arrays: Mapping[str, np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
  """(ids, mask, rows that count): all of one shape, so one compilation."""
  ids, mask = arrays['ids'].astype(np.int32), arrays.get('mask')
  size = min(batch_size, len(ids))
  for begin in range(0, len(ids), size):
    # The last batch repeats earlier rows rather than being shorter.
    at = np.arange(begin, begin + size) % len(ids)
    rows = min(size, len(ids) - begin)
    yield ids[at], None if mask is None else mask[at].astype(bool), rows
