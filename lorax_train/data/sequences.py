"""Rows of choices as ids: a row is several sequences, of which one is right.

In the flat files they stand one after another, the right one first:

    ids     [bos] prompt right   [bos] prompt other ...
    labels   -100 -100   right    -100 -100   other

so that a sequence ends where the labels fall back to -100. There is no EOS: what
is compared is how likely the texts are, not where they end.

Axis letters: B rows, C choices, T tokens, K tokens of the longest choice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax_train.data.encoded import NO_LOSS, Drop, Encoded, Sizes, TooLong
from lorax_train.data.problems import RowError
from lorax_train.errors import ConfigError

if TYPE_CHECKING:
  from lorax_train.data.joined import Column, RowSet
  from lorax_train.data.tokenized import Report

EMPTY = -1  # in place of a row: nothing but padding
TARGETS = 'targets'  # what a batch of choices has, and no other


class EncodedChoices(NamedTuple):
  """A prompt, `bos` ids of which may not be cut, and what may follow it.

  Attributes:
    prompt: ids, BOS included.
    choices: ids of each, the right one first.
    bos: 1 or 0.
    merged: a token is part prompt, part choice, and stands in the latter.
  """

  prompt: list[int]
  choices: list[list[int]]
  bos: int
  merged: bool


def encoded(
  prompt: list[int], joints: list[list[int]], answer: int, bos_id: int | None
) -> EncodedChoices:
  """Cuts texts where the prompt ends: before the first id that differs in any.

  Args:
    prompt: ids of the prompt alone.
    joints: ids of the prompt with each choice, encoded in one piece.
    answer: which of them is right.
    bos_id: what stands in front, if anything.

  Raises:
    RowError: the model can't tell the choices apart, or nothing precedes them.
  """
  n = min(common(prompt, joint) for joint in joints)
  choices = [joint[n:] for joint in joints]
  bos = [] if bos_id is None else [bos_id]
  if not all(choices):
    raise Drop('nothing to learn', 'a choice has no tokens')
  if len(set(map(tuple, choices))) < len(choices):
    raise RowError('two choices have the same tokens')
  if not bos and not n:
    raise RowError('empty prompt', 'and the model has no BOS to begin with')
  right = choices.pop(answer)
  return EncodedChoices(
    [*bos, *prompt[:n]], [right, *choices], len(bos), n < len(prompt)
  )


def common(a: list[int], b: list[int]) -> int:
  """How many first ids of both are the same."""
  # Most prompts are whole: compared at once, and only else one by one.
  n = len(a) if b[: len(a)] == a else 0
  while n < min(len(a), len(b)) and a[n] == b[n]:
    n += 1
  return n


def fitted(row: EncodedChoices, max_length: int, truncation: str) -> Encoded:
  """A row as it lies in the files; a prompt too long may lose its front.

  Raises:
    TooLong: some choice with its prompt is longer than `max_length`.
    ConfigError: its end should be cut.
  """
  longest = max(map(len, row.choices))
  over = len(row.prompt) + longest - max_length
  prompt = row.prompt
  if over > 0:
    if truncation == 'right':
      raise ConfigError(
        'data.truncation=right: choices are compared whole; give left, to cut'
        ' prompts, or drop'
      )
    if truncation != 'left':
      raise TooLong(
        f'longer than {max_length} tokens', f'{max_length + over} tokens'
      )
    # One token at the least, to predict the first of a choice.
    if over >= len(prompt):
      raise Drop(f'choice longer than {max_length} tokens')
    prompt = prompt[: row.bos] + prompt[row.bos + over :]
  masked = [NO_LOSS] * len(prompt)
  return Encoded(
    ids=[i for choice in row.choices for i in (*prompt, *choice)],
    labels=[i for choice in row.choices for i in (*masked, *choice)],
    bos=row.bos,
    prompt=len(prompt) - row.bos,
    truncated=over > 0,
    merged=row.merged,
    sizes=Sizes(len(row.choices), len(prompt) + longest, longest),
  )


def ends(labels: np.ndarray) -> np.ndarray:
  """Where each sequence of a row ends.

  >>> ends(np.array([-100, 5, -100, 6, 7]))
  array([2, 5])
  """
  learned = np.append(labels != NO_LOSS, False)
  return np.flatnonzero(learned[:-1] & ~learned[1:]) + 1


def split(ids: np.ndarray, labels: np.ndarray) -> list[tuple[Any, Any]]:
  """(ids, labels) of each sequence of a row."""
  cuts = ends(labels)[:-1]
  pairs = np.split(ids, cuts), np.split(labels, cuts)
  return list(zip(*pairs, strict=True))


def longest(rows: 'RowSet', numbers: np.ndarray) -> np.ndarray:
  """Tokens of the longest sequence of some rows, int64 [rows]."""
  cuts = (ends(rows.labels[i]) for i in numbers)
  return np.array([np.diff(cut, prepend=0).max() for cut in cuts], np.int64)


class Right:
  """Rows of choices as rows of the right one alone; nothing is copied."""

  def __init__(self, rows: 'RowSet'):
    """Of a set of rows of choices."""
    self._rows = rows
    self.where = rows.where
    self.ids: Column[np.ndarray] = _Each(lambda i: self._cut(i, rows.ids[i]))
    self.labels: Column[np.ndarray] = _Each(
      lambda i: self._cut(i, rows.labels[i])
    )

  def _cut(self, i: int, of_row: np.ndarray) -> np.ndarray:
    return of_row[: ends(self._rows.labels[i])[0]]

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens of each row, int64 [rows]."""
    n = len(self._rows.lengths)
    return np.array([ends(self._rows.labels[i])[0] for i in range(n)])

  @property
  def report(self) -> 'Report':
    """Of all choices."""
    return self._rows.report

  @property
  def fingerprint(self) -> str:
    """Likewise."""
    return self._rows.fingerprint


class _Each:
  """A column that is worked out row by row."""

  def __init__(self, of_row: Callable[[int], np.ndarray]):
    self._of_row = of_row

  def __getitem__(self, i: int, /) -> np.ndarray:
    return self._of_row(i)


def shapes(sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
  """What a row of a batch of choices is, by name, each int32.

  Where no choice is longer than a token the prompt alone tells how likely each
  is: it is the only sequence.
  """
  n_sequences = 1 if sizes.choice == 1 else sizes.choices
  return {
    'ids': (n_sequences, length),
    TARGETS: (sizes.choices, sizes.choice),
    'begins': (sizes.choices,),
  }


def take(
  tokenized: 'RowSet',
  rows: Sequence[int] | np.ndarray,
  sizes: Sizes,
  length: int,
  pad_id: int,
) -> dict[str, np.ndarray]:
  """Rows of choices by their numbers as a batch, filled up at the right.

  Returns:
    `ids` int32 [B, C, T], the right choice first, or [B, 1, T], the prompt that
    all choices of one token follow; `targets` int32 [B, C, K], the ids of each
    choice, -100 behind them and where a row has fewer choices; `begins` int32
    [B, C], where each choice begins among ids. Of EMPTY, padding.

  Raises:
    ValueError: a sequence is longer than `length`.
  """
  fill = {'ids': pad_id, TARGETS: NO_LOSS, 'begins': 1}
  batch = {
    name: np.full((len(rows), *shape), fill[name], np.int32)
    for name, shape in shapes(sizes, length).items()
  }
  for b, i in enumerate(rows):
    if i == EMPTY:
      continue
    pairs = split(tokenized.ids[i], tokenized.labels[i])
    for c, (ids, labels) in enumerate(pairs):
      if len(ids) > length:
        raise ValueError(f'row {b} has {len(ids)} tokens, the batch {length}')
      begin = int((labels != NO_LOSS).argmax())
      if sizes.choice == 1:
        batch['ids'][b, 0, :begin] = ids[:begin]
      else:
        batch['ids'][b, c, : len(ids)] = ids
      batch[TARGETS][b, c, : len(ids) - begin] = ids[begin:]
      batch['begins'][b, c] = begin
  return batch
