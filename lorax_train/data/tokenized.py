"""Rows as ids and labels, fitted to a length: what a run reads."""

import dataclasses
import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_train.data.encode import (
  NO_LOSS,
  Drop,
  Encoded,
  caught,
  encode_rows,
)
from lorax_train.data.problems import Problem, RowError, counted, describe
from lorax_train.data.rows import Row
from lorax_train.data.template import TOKENS, template_named
from lorax_train.errors import ConfigError, DataError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

_TRUNCATIONS = ('drop', 'error', 'left')
_ON_BAD_ROW = ('error', 'skip')


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the rows.

  Attributes:
    rows_read: rows given.
    rows_kept: rows that will be trained on.
    dropped: the others, by reason.
    truncated: kept rows whose front was cut.
    merged_boundary: kept rows with a token that is part prompt, part
      completion, and is learned.
    tokens: all tokens of the kept rows.
    target_tokens: those that the loss is on.
    longest: tokens of the longest kept row.
  """

  rows_read: int
  rows_kept: int
  dropped: dict[str, int]
  truncated: int
  merged_boundary: int
  tokens: int
  target_tokens: int
  longest: int

  def summary(self) -> str:
    """One line for the log."""
    parts = [
      f'{self.rows_kept:,} of {self.rows_read:,} rows kept',
      f'{self.tokens:,} tokens ({self.target_tokens:,} to learn)',
      f'longest row {self.longest:,}',
    ]
    if self.dropped:
      parts.append(f'dropped {counted(Counter(self.dropped))}')
    if self.truncated:
      parts.append(f'{self.truncated:,} cut at the front')
    if self.merged_boundary:
      parts.append(
        f'{self.merged_boundary:,} with a token across prompt and completion'
      )
    return '; '.join(parts)


class TokenizedSet(NamedTuple):
  """Rows as ids and labels, in the order they came.

  Labels are not shifted (the loss does that, as in transformers); -100 has no
  loss. `where[i]` is the place of row i in the data.
  """

  ids: list[np.ndarray]  # int32 [T], one a row
  labels: list[np.ndarray]  # int32 [T]
  where: list[str]
  report: Report

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each row, int64 [rows]."""
    return np.array([len(ids) for ids in self.ids], np.int64)

  @property
  def fingerprint(self) -> str:
    """Sha256 over ids and labels: a resumed run must see the same."""
    digest = hashlib.sha256()
    for ids, labels in zip(self.ids, self.labels, strict=True):
      digest.update(len(ids).to_bytes(8, 'little'))
      digest.update(ids.astype('<i4').tobytes())
      digest.update(labels.astype('<i4').tobytes())
    return digest.hexdigest()


def tokenize_rows(
  rows: Sequence[Row],
  template: str,
  tokenizer: 'Tokenizer | None',
  max_length: int,
  truncation: str = 'drop',
  on_bad_row: str = 'error',
) -> TokenizedSet:
  r"""Renders, encodes and labels rows.

      ids     [bos] + encode(prompt + completion) + [eos]
      labels   -100   -100 ... -100 | completion     eos

  The text is encoded in one piece, since those are the ids a model meets when
  it answers a prompt, and what other trainers give it; encoded by itself, a
  completion would begin with the dummy space that sentencepiece puts before
  every text. Where the prompt ends among the ids is found by encoding it
  alone as well: it is their longest common prefix. A token in which the end of
  the prompt and the start of the completion have merged lies after it, and is
  learned. EOS is always there and always learned, whichever id pads.

  Args:
    rows: what `read_rows` gave.
    template: see `template_named`, or `tokens` for rows that hold `input_ids`
      and perhaps `labels` (without them everything is learned).
    tokenizer: may be None for `tokens`.
    max_length: of a row, BOS and EOS included.
    truncation: what becomes of a longer row. `drop`; `error`; or `left`: the
      front of the prompt is cut, never BOS, completion or EOS. Rows of `tokens`
      lose their front.
    on_bad_row: what becomes of a row the template can't use: `error`, `skip`.

  Returns:
    The rows that are left, at least one.

  Raises:
    DataError: bad rows counted by reason with the first five places, or no
      row left.
    ModelError: a template that needs a tokenizer has none.
    ConfigError: an unknown `truncation` or `on_bad_row`.
  """
  _check_option('truncation', truncation, _TRUNCATIONS)
  _check_option('on_bad_row', on_bad_row, _ON_BAD_ROW)
  encoded: list[Encoded] = []
  where: list[str] = []
  bad: list[Problem] = []
  dropped: list[Problem] = []
  for row, result in encode_rows(rows, template, tokenizer):
    try:
      if isinstance(result, RowError):
        raise result
      encoded.append(_fit(result, max_length, truncation))
      where.append(row.where)
    except Drop as drop:
      dropped.append(Problem(row.where, drop.reason, drop.detail))
    except RowError as error:
      bad.append(Problem(row.where, error.reason, error.detail))
  if bad and on_bad_row == 'error':
    raise DataError(
      f'bad rows: {describe(bad)}; mend them, or leave them out with'
      ' --config.data.on_bad_row=skip'
    )
  too_long = [p for p in dropped if p.reason == _too_long(max_length)]
  if too_long and truncation == 'error':
    raise DataError(
      f'over-long rows: {describe(too_long)}; raise --config.data.max_length,'
      ' or set --config.data.truncation=drop'
    )
  if not encoded:
    gone = describe(bad + dropped) if rows else '0 rows'
    raise DataError(f'no row is left to train on: dropped {gone}')
  return TokenizedSet(
    ids=[np.array(row.ids, np.int32) for row in encoded],
    labels=[np.array(row.labels, np.int32) for row in encoded],
    where=where,
    report=_report(rows, encoded, bad + dropped),
  )


def rendered_texts(rows: Sequence[Row], template: str, limit: int) -> list[str]:
  """Prompt and completion of the first `limit` rows, bad ones left out."""
  if template == TOKENS:
    return []
  render = template_named(template)
  results = (caught(render, row.fields) for row in rows[:limit])
  return [
    r.prompt + r.completion for r in results if not isinstance(r, RowError)
  ]


def check_ids(tokenized: TokenizedSet, rows_in_embedding: int) -> None:
  """Refuses ids and labels that the model's embedding has no row for.

  On an accelerator such an id reads another row or NaN, silently.

  Raises:
    DataError: with the first places and ids.
  """
  problems = []
  for where, ids, labels in zip(
    tokenized.where, tokenized.ids, tokenized.labels, strict=True
  ):
    both = np.concatenate([ids, labels[labels != NO_LOSS]])
    wrong = both[(both < 0) | (both >= rows_in_embedding)]
    if wrong.size:
      problems.append(Problem(where, 'id outside', f'id {wrong[0]}'))
  if problems:
    raise DataError(
      f"ids outside the embedding's {rows_in_embedding} rows:"
      f' {describe(problems)}; encode them with the tokenizer of this model'
    )


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    near = difflib.get_close_matches(str(value), known, n=1)
    guess = f'did you mean {near[0]!r}? ' if near else ''
    raise ConfigError(
      f'data.{name}={value!r}: {guess}known: {", ".join(known)}'
    )


def _too_long(max_length: int) -> str:
  return f'longer than {max_length} tokens'


def _fit(row: Encoded, max_length: int, truncation: str) -> Encoded:
  over = len(row.ids) - max_length
  if over > 0:
    if truncation != 'left':
      raise Drop(_too_long(max_length), f'{len(row.ids)} tokens')
    if over > row.prompt:
      raise Drop(f'completion longer than {max_length} tokens')
    row = row._replace(
      ids=row.ids[: row.bos] + row.ids[row.bos + over :],
      labels=row.labels[: row.bos] + row.labels[row.bos + over :],
      truncated=True,
    )
  if not _targets(row.labels):
    raise Drop('nothing to learn')
  return row


def _targets(labels: Sequence[int]) -> int:
  # Nothing comes before the first token, so nothing predicts it.
  return sum(label != NO_LOSS for label in labels[1:])


def _report(
  rows: Sequence[Row], encoded: Sequence[Encoded], gone: Sequence[Problem]
) -> Report:
  return Report(
    rows_read=len(rows),
    rows_kept=len(encoded),
    dropped=dict(Counter(p.reason for p in gone)),
    truncated=sum(row.truncated for row in encoded),
    merged_boundary=sum(row.merged for row in encoded),
    tokens=sum(len(row.ids) for row in encoded),
    target_tokens=sum(_targets(row.labels) for row in encoded),
    longest=max(len(row.ids) for row in encoded),
  )
