"""Silent errors in rows of tokens: each would train, and train the wrong thing.

Rows made by other tools (template `tokens`) are where most of them come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.joined import RowSet
from lorax_train.data.statistics import Chunk, chunks

# Share of a row's labels that must be the next id, and not their own, for the
# row to be taken for shifted.
_NEARLY_ALL = 0.9


class Suspects(NamedTuple):
  """Numbers of the rows in which something is odd, one array a kind.

  Attributes:
    no_end: the last learned token does not end an answer.
    masked_end: of these, the last token would, but is not learned.
    two_bos: the row begins with BOS twice.
    inner_bos: BOS stands within the row.
    shifted: the labels are the ids one place on, though the loss shifts them.
    other_labels: learned labels that are not the ids of their places.
    learned_padding: ends in padding, and that is learned.
    padding: ends in padding that is not learned.
  """

  no_end: np.ndarray
  masked_end: np.ndarray
  two_bos: np.ndarray
  inner_bos: np.ndarray
  shifted: np.ndarray
  other_labels: np.ndarray
  learned_padding: np.ndarray
  padding: np.ndarray


def suspects(
  tokenized: RowSet,
  rows: np.ndarray,
  ends: Sequence[int],
  bos_id: int | None = None,
  padding_ids: Sequence[int] = (),
) -> Suspects:
  """Looks through the rows.

  Args:
    tokenized: the set.
    rows: which of its rows.
    ends: ids of which one must be the last that is learned.
    bos_id: None where there is none, or where BOS is also EOS.
    padding_ids: ids that are padding where a row ends in two of one of them.
  """
  found = [
    _in_chunk(c, ends, bos_id, padding_ids) for c in chunks(tokenized, rows)
  ]
  empty = [np.zeros(0, np.int64)] * len(Suspects._fields)
  columns = zip(*found, strict=True) if found else [[e] for e in empty]
  return Suspects(*(np.concatenate(list(column)) for column in columns))


def _in_chunk(
  c: Chunk,
  ends: Sequence[int],
  bos_id: int | None,
  padding_ids: Sequence[int],
) -> Suspects:
  lengths = c.ends - c.begins + 1
  last_id, last_label = c.ids[c.ends], c.last_label()
  no_end = ~np.isin(last_label, ends)
  masked_end = no_end & np.isin(last_id, ends) & (c.labels[c.ends] == NO_LOSS)

  is_bos = c.ids == bos_id if bos_id is not None else np.zeros(len(c.ids), bool)
  second = np.minimum(c.begins + 1, c.ends)
  two_bos = is_bos[c.begins] & is_bos[second] & (lengths > 1)
  inner_bos = c.per_row(is_bos) - is_bos[c.begins] - two_bos > 0

  is_learned = c.labels != NO_LOSS
  n_learned = c.per_row(is_learned)
  own = c.per_row(is_learned & (c.labels == c.ids))
  following = np.append(c.ids[1:], -1)
  has_next = np.ones(len(c.ids), bool)
  has_next[c.ends] = False
  candidates = is_learned & has_next
  n_next = c.per_row(candidates & (c.labels == following))
  shifted = (
    (n_next >= _NEARLY_ALL * c.per_row(candidates))
    & (n_next > 0)
    & (own < (1 - _NEARLY_ALL) * n_learned)
  )
  before = np.maximum(c.ends - 1, c.begins)
  padded = (
    np.isin(last_id, padding_ids) & (c.ids[before] == last_id) & (lengths > 1)
  )
  learned_end = is_learned[c.ends] & is_learned[before]
  flags = Suspects(
    no_end=no_end,
    masked_end=masked_end,
    two_bos=two_bos,
    inner_bos=inner_bos,
    shifted=shifted,
    other_labels=(own < n_learned) & ~shifted,
    learned_padding=padded & learned_end,
    padding=padded & ~learned_end,
  )
  return Suspects(*(c.rows[flag] for flag in flags))
