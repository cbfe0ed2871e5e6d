"""Rows to ids and labels."""

import dataclasses
import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from lorax_train.data.problems import Problem, RowError, counted, describe
from lorax_train.data.source import Row
from lorax_train.data.template import TOKENS, Example, template_named
from lorax_train.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

NO_LOSS = -100  # the label transformers and torch leave out of the loss

_TRUNCATIONS = ('drop', 'error', 'left')
_ON_BAD_ROW = ('error', 'skip')
_BATCH = 1024  # rows encoded at once: keeps all cores busy, and memory small
_T = TypeVar('_T')
_MAX_ID = np.iinfo(np.int32).max


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
  def fingerprint(self) -> str:
    """Sha256 over ids and labels: a resumed run must see the same."""
    digest = hashlib.sha256()
    for ids, labels in zip(self.ids, self.labels, strict=True):
      digest.update(len(ids).to_bytes(8, 'little'))
      digest.update(ids.astype('<i4').tobytes())
      digest.update(labels.astype('<i4').tobytes())
    return digest.hexdigest()


class _Drop(RowError):
  """A sound row that the run has no use for: dropped and counted."""


class _Encoded(NamedTuple):
  """ids = `bos` ids, then `prompt` ids that may be cut, then the rest."""

  ids: list[int]
  labels: list[int]
  bos: int
  prompt: int
  truncated: bool = False
  merged: bool = False


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
  encoded: list[_Encoded] = []
  where: list[str] = []
  bad: list[Problem] = []
  dropped: list[Problem] = []
  for row, result in _encode(rows, template, tokenizer):
    try:
      if isinstance(result, RowError):
        raise result
      encoded.append(_fit(result, max_length, truncation))
      where.append(row.where)
    except _Drop as drop:
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
  results = (_caught(render, row.fields) for row in rows[:limit])
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


def _encode(
  rows: Sequence[Row], template: str, tokenizer: 'Tokenizer | None'
) -> Iterator[tuple[Row, _Encoded | RowError]]:
  """Each row with its full-length encoding, or with what is wrong with it."""
  if template == TOKENS:
    for row in rows:
      yield row, _caught(_from_tokens, row.fields)
    return
  render = template_named(template)
  if tokenizer is None:
    raise ModelError(
      f'data.template={template} needs a tokenizer, and the model has none; put'
      ' its tokenizer.json there, or use data.template=tokens'
    )
  for begin in range(0, len(rows), _BATCH):
    part = rows[begin : begin + _BATCH]
    examples = [_caught(_rendered, render, row.fields) for row in part]
    good = [e for e in examples if isinstance(e, Example)]
    prompts = iter(tokenizer.encode([e.prompt for e in good]))
    joints = iter(tokenizer.encode([e.prompt + e.completion for e in good]))
    for row, example in zip(part, examples, strict=True):
      if isinstance(example, Example):
        ids = next(prompts), next(joints)
        yield row, _caught(_labelled, *ids, tokenizer.bos_id, tokenizer.eos_id)
      else:
        yield row, example


def _caught(function: Callable[..., _T], *args: Any) -> _T | RowError:
  try:
    return function(*args)
  except RowError as error:
    return error


def _rendered(
  render: Callable[[Mapping[str, Any]], Example], fields: Mapping[str, Any]
) -> Example:
  example = render(fields)
  if not example.completion.strip():
    raise RowError('empty completion')
  return example


def _labelled(
  prompt: list[int], joint: list[int], bos_id: int | None, eos_id: int
) -> _Encoded:
  n = 0
  while n < len(prompt) and n < len(joint) and prompt[n] == joint[n]:
    n += 1
  if n == len(joint):
    # White space or the like, which the tokenizer's normaliser took away.
    raise _Drop('nothing to learn', 'the completion has no tokens')
  bos = [] if bos_id is None else [bos_id]
  return _Encoded(
    ids=[*bos, *joint, eos_id],
    labels=[NO_LOSS] * (len(bos) + n) + [*joint[n:], eos_id],
    bos=len(bos),
    prompt=n,
    merged=n < len(prompt),
  )


def _from_tokens(fields: Mapping[str, Any]) -> _Encoded:
  if 'input_ids' not in fields:
    raise RowError("no column 'input_ids'")
  ids = fields['input_ids']
  labels = fields.get('labels')
  labels = ids if labels is None else labels
  for name, values in (('input_ids', ids), ('labels', labels)):
    if not isinstance(values, list) or not all(type(v) is int for v in values):
      raise RowError(f'column {name!r} is not a list of integers')
    if any(v > _MAX_ID for v in values):
      raise RowError(f'column {name!r} holds an integer over 32 bits')
  if not ids:
    raise RowError("column 'input_ids' is empty")
  if len(ids) != len(labels):
    raise RowError(
      "'input_ids' and 'labels' differ in length", f'{len(ids)}, {len(labels)}'
    )
  if min(ids) < 0:
    raise RowError("column 'input_ids' holds a negative id", f'{min(ids)}')
  if any(v < 0 and v != NO_LOSS for v in labels):
    raise RowError(f"column 'labels' holds a negative other than {NO_LOSS}")
  return _Encoded(ids, labels, bos=0, prompt=len(ids))


def _too_long(max_length: int) -> str:
  return f'longer than {max_length} tokens'


def _fit(row: _Encoded, max_length: int, truncation: str) -> _Encoded:
  over = len(row.ids) - max_length
  if over > 0:
    if truncation != 'left':
      raise _Drop(_too_long(max_length), f'{len(row.ids)} tokens')
    if over > row.prompt:
      raise _Drop(f'completion longer than {max_length} tokens')
    row = row._replace(
      ids=row.ids[: row.bos] + row.ids[row.bos + over :],
      labels=row.labels[: row.bos] + row.labels[row.bos + over :],
      truncated=True,
    )
  if not _targets(row.labels):
    raise _Drop('nothing to learn')
  return row


def _targets(labels: Sequence[int]) -> int:
  # Nothing comes before the first token, so nothing predicts it.
  return sum(label != NO_LOSS for label in labels[1:])


def _report(
  rows: Sequence[Row], encoded: Sequence[_Encoded], gone: Sequence[Problem]
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
