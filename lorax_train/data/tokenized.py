"""Rows as ids and labels, fitted to a length: what a run reads."""

import contextlib
import dataclasses
import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_train.data import sequences
from lorax_train.data.chat import contents
from lorax_train.data.columns import Ragged, Texts, Writer
from lorax_train.data.encode import encode_rows, wholes
from lorax_train.data.encoded import (
  NO_LOSS,
  Drop,
  Encoded,
  Sizes,
  TooLong,
  caught,
)
from lorax_train.data.problems import (
  PLACES,
  Problem,
  Problems,
  RowError,
  counted,
  describe,
)
from lorax_train.data.rows import Row
from lorax_train.data.sequences import EncodedChoices
from lorax_train.data.template import CONVERSATIONS, TOKENS, template_named
from lorax_train.errors import ConfigError, DataError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

TRUNCATIONS = ('drop', 'error', 'left', 'right')
_ON_BAD_ROW = ('error', 'skip')
_OFTEN = 256  # rows between two words on progress
_PART = 2**20  # ids looked at at once


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the rows.

  Attributes:
    rows_read: rows given.
    rows_kept: rows that will be trained on.
    dropped: the others, by reason.
    truncated: kept rows whose front was cut.
    cut_off: kept rows whose end was cut: they have no EOS to learn.
    merged_boundary: kept rows with a token that is part prompt, part
      completion, and is learned.
    tokens: all tokens of the kept rows.
    target_tokens: those that the loss is on.
    longest: tokens of the longest kept row; of choices, of the longest one with
      its prompt.
    dropped_at: first places of the rows that were dropped, by reason.
    choices: how many the row has that has most; 0 of rows without.
    longest_choice: tokens of the longest, its prompt not counted.
  """

  rows_read: int
  rows_kept: int
  dropped: dict[str, int]
  truncated: int
  cut_off: int
  merged_boundary: int
  tokens: int
  target_tokens: int
  longest: int
  dropped_at: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  choices: int = 0
  longest_choice: int = 0

  @property
  def sizes(self) -> Sizes:
    """Of rows of choices."""
    return Sizes(self.choices, self.longest, self.longest_choice)

  def __add__(self, other: 'Report') -> 'Report':
    """Of the rows of both, these first."""
    added = {
      field.name: getattr(self, field.name) + getattr(other, field.name)
      for field in dataclasses.fields(self)
      if field.type == 'int' or field.type is int
    }
    reasons = {**self.dropped, **other.dropped}
    return Report(
      **added
      | {
        'longest': max(self.longest, other.longest),
        'choices': max(self.choices, other.choices),
        'longest_choice': max(self.longest_choice, other.longest_choice),
        'dropped': dict(Counter(self.dropped) + Counter(other.dropped)),
        'dropped_at': {
          reason: [
            *self.dropped_at.get(reason, []),
            *other.dropped_at.get(reason, []),
          ][:PLACES]
          for reason in reasons
        },
      }
    )

  def summary(self) -> str:
    """One line for the log."""
    parts = [
      f'{self.rows_kept:,} of {self.rows_read:,} rows kept',
      f'{self.tokens:,} tokens ({self.target_tokens:,} to learn)',
      f'longest row {self.longest:,}',
    ]
    if self.choices:
      parts[1] = f'{self.tokens:,} tokens ({self.target_tokens:,} of choices)'
      parts.append(f'{self.choices} choices a row at most')
    if self.dropped:
      parts.append(f'dropped {counted(Counter(self.dropped))}')
    if self.truncated:
      parts.append(f'{self.truncated:,} cut at the front')
    if self.cut_off:
      parts.append(f'{self.cut_off:,} cut at the end, where no EOS is learned')
    if self.merged_boundary:
      parts.append(
        f'{self.merged_boundary:,} with a token across prompt and completion'
      )
    return '; '.join(parts)


class TokenizedSet(NamedTuple):
  """Rows as ids and labels, in the order they came.

  Labels are not shifted (the loss does that, as in transformers); -100 has no
  loss.

  Attributes:
    ids: int32 [T] of each row.
    labels: int32 [T] of each row.
    where: the place of each row in the data.
    report: what became of the rows that were read.
    fingerprint: sha256 over ids and labels: a resumed run must see the same.
  """

  ids: Ragged
  labels: Ragged
  where: Texts
  report: Report
  fingerprint: str

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each row, int64 [rows]."""
    return np.diff(self.ids.ends, prepend=0)


def tokenize_rows(
  rows: Iterable[Row],
  template: str,
  tokenizer: 'Tokenizer | None',
  max_length: int,
  truncation: str = 'drop',
  on_bad_row: str = 'error',
  *,
  folder: Path | None = None,
  progress: Callable[[int, int], None] = lambda rows, tokens: None,
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
    rows: what `iter_rows` or `read_rows` gave; they are not kept.
    template: see `template_named`, or `tokens` for rows that hold `input_ids`
      and perhaps `labels` (without them everything is learned).
    tokenizer: may be None for `tokens`.
    max_length: of a row, BOS and EOS included.
    truncation: what becomes of a longer row. `drop`; `error`; `left`: the
      front of the prompt is cut, never BOS, completion or EOS. Rows of `tokens`
      lose their front. `right`: the end is cut, EOS with it, so that the row
      does not teach to stop there; such rows are counted apart.
    on_bad_row: what becomes of a row the template can't use: `error`, `skip`.
    folder: where the ids go, an empty directory; None keeps them in memory.
    progress: told now and then how many rows and tokens there are by now.

  Returns:
    The rows that are left, at least one.

  Raises:
    DataError: bad rows counted by reason with the first five places, or no
      row left.
    ModelError: a template that needs a tokenizer has none.
    ConfigError: an unknown `truncation` or `on_bad_row`.
    OSError: `folder` can't be written into.
  """
  _check_option('truncation', truncation, TRUNCATIONS)
  _check_option('on_bad_row', on_bad_row, _ON_BAD_ROW)
  totals = _Totals()
  with contextlib.closing(Writer(folder)) as writer:
    for row, result in encode_rows(rows, template, tokenizer):
      try:
        if isinstance(result, RowError):
          raise result
        if isinstance(result, EncodedChoices):
          kept = sequences.fitted(result, max_length, truncation)
        else:
          kept = _fit(result, max_length, truncation)
      except RowError as error:
        totals.leave_out(row, error)
      else:
        ids, labels = (np.array(x, np.int32) for x in (kept.ids, kept.labels))
        writer.append(ids, labels, row.where)
        totals.keep(kept)
      totals.n['read'] += 1
      if totals.n['read'] % _OFTEN == 0:
        progress(totals.n['read'], totals.n['tokens'])
    totals.check(truncation, on_bad_row)
    columns = writer.finish()
  return TokenizedSet(*columns, totals.report(), writer.fingerprint)


class _Totals:
  """What becomes of the rows, while they go by."""

  def __init__(self):
    self.n: Counter[str] = Counter()
    self._bad, self._dropped, self._too_long = (Problems() for _ in range(3))
    self._longest = 0
    self._sizes = Sizes()

  def keep(self, row: Encoded) -> None:
    n = self.n
    n['rows'] += 1
    n['tokens'] += len(row.ids)
    n['targets'] += _targets(row.labels)
    n['truncated'] += row.truncated
    n['cut_off'] += row.cut_off
    n['merged'] += row.merged
    n['with_choices'] += row.sizes.choices > 0
    self._sizes = self._sizes.most(row.sizes)
    self._longest = max(self._longest, row.sizes.length or len(row.ids))

  def leave_out(self, row: Row, error: RowError) -> None:
    problem = Problem(row.where, error.reason, error.detail)
    (self._dropped if isinstance(error, Drop) else self._bad).add(problem)
    if isinstance(error, TooLong):
      self._too_long.add(problem)

  def check(self, truncation: str, on_bad_row: str) -> None:
    """Raises DataError where the rows may not be used as they are."""
    if self._bad and on_bad_row == 'error':
      raise DataError(
        f'bad rows: {describe(self._bad)}; mend them, or leave them out with'
        ' --config.data.on_bad_row=skip'
      )
    if self._too_long and truncation == 'error':
      raise DataError(
        f'over-long rows: {describe(self._too_long)}; raise --config.data.max_length,'
        ' or set --config.data.truncation=drop'
      )
    if self.n['with_choices'] not in (0, self.n['rows']):
      raise DataError(
        f'{self.n["with_choices"]} of {self.n["rows"]} rows have choices: a'
        ' template gives them to all rows or to none'
      )
    if not self.n['rows']:
      gone = describe(self._bad + self._dropped) if self.n['read'] else '0 rows'
      raise DataError(f'no row is left to train on: dropped {gone}')

  def report(self) -> Report:
    n, gone = self.n, self._bad + self._dropped
    return Report(
      rows_read=n['read'],
      rows_kept=n['rows'],
      dropped=dict(gone.counts),
      truncated=n['truncated'],
      cut_off=n['cut_off'],
      merged_boundary=n['merged'],
      tokens=n['tokens'],
      target_tokens=n['targets'],
      longest=self._longest,
      dropped_at=gone.places,
      choices=self._sizes.choices,
      longest_choice=self._sizes.choice,
    )


def rendered_texts(rows: Sequence[Row], template: str, limit: int) -> list[str]:
  """Prompt and completion of the first `limit` rows, bad ones left out.

  Of conversations, what each message says.
  """
  if template == TOKENS:
    return []
  if template in CONVERSATIONS:
    found = (caught(contents, row.fields, template) for row in rows[:limit])
    return [text for f in found if not isinstance(f, RowError) for text in f]
  render = template_named(template)
  results = (caught(render, row.fields) for row in rows[:limit])
  return [t for r in results if not isinstance(r, RowError) for t in wholes(r)]


def check_ids(tokenized: TokenizedSet, rows_in_embedding: int) -> None:
  """Refuses ids and labels that the model's embedding has no row for.

  On an accelerator such an id reads another row or NaN, silently.

  Raises:
    DataError: with the first places and ids.
  """

  def outside(x: np.ndarray) -> np.ndarray:
    return ((x < 0) | (x >= rows_in_embedding)) & (x != NO_LOSS)

  columns = tokenized.ids, tokenized.labels
  if not any(
    outside(part).any()
    for column in columns
    for part in np.array_split(column.flat, -(-len(column.flat) // _PART))
  ):
    return
  problems = Problems()
  for where, *rows in zip(tokenized.where, *columns, strict=True):
    both = np.concatenate(rows)
    wrong = both[outside(both)]
    if wrong.size:
      problems.add(Problem(where, 'id outside', f'id {wrong[0]}'))
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


def _fit(row: Encoded, max_length: int, truncation: str) -> Encoded:
  over = len(row.ids) - max_length
  if over > 0 and truncation == 'right':
    row = row._replace(
      ids=row.ids[:max_length], labels=row.labels[:max_length], cut_off=True
    )
  elif over > 0:
    if truncation != 'left':
      raise TooLong(
        f'longer than {max_length} tokens', f'{len(row.ids)} tokens'
      )
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
  n = len(labels) - labels.count(NO_LOSS)
  return n - (labels[0] != NO_LOSS)
