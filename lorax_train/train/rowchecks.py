"""Whether rows are sound: what `validate` has to say of them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorax_train.data import (
  conversation,
  mistral_chat,
  sequences,
  soundness,
  statistics,
  tokenized,
)
from lorax_train.data.joined import RowSet
from lorax_train.data.tokenize import Tokenizer
from lorax_train.data.tokenized import TokenizedSet
from lorax_train.errors import DataError, ModelError
from lorax_train.infer import complete
from lorax_train.models.params import DecoderConfig
from lorax_train.train import dataview
from lorax_train.train.rows import Rows

OK, WARN, FAIL, SKIPPED = 'ok', 'warn', 'FAIL', 'skipped'

# A larger share of rows that are dropped or cut, or that are there twice, is
# more than what any data set has of them.
_MANY = 0.05
# Rows whose text is searched for special tokens that are spelled out.
_SEARCHED = 200
_SPELLED = re.compile(
  r'</?s>|\[/?INST\]|<<?/?SYS>>?|<\|\w{2,24}\|>|<(?:start|end)_of_turn>'
)

# What `checks` gives, each at least once.
NAMES = (
  'ids',
  'EOS',
  'BOS',
  'labels',
  'padding',
  'spelling',
  'duplicates',
  'leaks',
)


# A check, what of `Suspects` fails and what is a warning, and words for each;
# then for neither.
_GRADED = (
  (
    'BOS',
    'two_bos',
    'twice at the start: {}; take one of them out of input_ids',
    'inner_bos',
    'within a row: {}; right only in a chat format that begins every turn with'
    ' it',
    'at most once, and only at the start',
  ),
  (
    'labels',
    'shifted',
    'shifted by one: {}; the loss shifts them itself: let labels[i] be'
    ' input_ids[i] or -100',
    'other_labels',
    'learned, but not the ids of their places: {}',
    'the ids of their places, or -100',
  ),
  (
    'padding',
    'learned_padding',
    'learned: {}; leave it out, batches are filled up here',
    'padding',
    'among the ids: {}; leave it out, batches are filled up here',
    'none among the ids',
  ),
)


class Check(NamedTuple):
  """What was looked at, how it is, and the exit code that a failure has."""

  name: str
  status: str
  message: str
  code: int = 0


def skipped(name: str, because: str) -> Check:
  """A check that can't be made."""
  return Check(name, SKIPPED, f'needs a sound {because}')


def checks(
  rows: Rows,
  model_dir: Path,
  model_cfg: DecoderConfig,
  cut_at: int | None = None,
) -> Iterator[Check]:
  """All but `dropped`, of the rows to train on and of those held out.

  Args:
    rows: the rows.
    model_dir: of the model.
    model_cfg: likewise.
    cut_at: length at which the end of a row was cut, so that it has no EOS.
  """
  sets = [(rows.learned_set, rows.train_rows)]
  if len(rows.eval_rows):
    own = rows.eval_set
    own = sequences.Right(own) if rows.sizes.choices else own
    sets.append((own, rows.eval_rows))
  yield from _ids(rows, model_cfg)
  yield from _looked_through(
    sets, model_dir, rows.tokenizer, cut_at, rows.sizes.choices > 0
  )
  if not rows.sizes.choices:
    yield from _unheeded(sets, model_dir, rows.tokenizer)
  yield from _spelled(rows)
  yield from _repeated(rows)


def dropped(rows: Rows) -> Iterator[Check]:
  """How many rows are left of those that were read."""
  sets = [rows.train_set]
  if rows.eval_set is not rows.train_set:
    sets.append(rows.eval_set)
  for one in sets:
    r = one.report
    lost = r.rows_read - r.rows_kept
    parts = [
      f'{n:,} {reason}, first {", ".join(r.dropped_at.get(reason, []))}'
      for reason, n in r.dropped.items()
    ]
    told = f'{r.rows_kept:,} of {r.rows_read:,} rows kept'
    if parts:
      told += f'; dropped: {"; ".join(parts)}'
    if r.truncated:
      told += f'; {r.truncated:,} cut at the front'
    if r.cut_off:
      told += f'; {r.cut_off:,} cut at the end, where no EOS is learned'
    cut = r.truncated + r.cut_off
    many = max(lost / r.rows_read, cut / r.rows_kept) > _MANY
    if many:
      told += f'; more than {_MANY:.0%}: see data.max_length and the rows'
    yield Check('rows', WARN if many else OK, told)


def _ids(rows: Rows, model_cfg: DecoderConfig) -> Iterator[Check]:
  sound = True
  sets = [source.rows for source in rows.sources]
  own = rows.eval_set is not rows.train_set
  if own and isinstance(rows.eval_set, TokenizedSet):
    sets.append(rows.eval_set)
  for one in sets:
    try:
      tokenized.check_ids(one, model_cfg.vocab)
    except DataError as error:
      sound = False
      yield Check('ids', FAIL, str(error), error.exit_code)
  if sound:
    told = f"all within the embedding's {model_cfg.vocab:,} rows"
    yield Check('ids', OK, told)


def _looked_through(
  sets: Sequence[tuple[RowSet, np.ndarray]],
  model_dir: Path,
  tokenizer: Tokenizer | None,
  cut_at: int | None,
  compared: bool,
) -> Iterator[Check]:
  """What `soundness` has to say of the rows to train on and those held out."""
  ends = dataview.end_ids(model_dir, tokenizer)
  bos = dataview.bos_id(model_dir, tokenizer, ends)
  fillers = [*ends, *([tokenizer.pad_id] if tokenizer else [])]
  found = [soundness.suspects(s, rows, ends, bos, fillers) for s, rows in sets]
  n_open = sum(len(f.no_end) for f in found)
  found = [
    f._replace(no_end=_whole(s, f.no_end, cut_at))
    for f, (s, _) in zip(found, sets, strict=True)
  ]
  n_cut = n_open - sum(len(f.no_end) for f in found)
  total = sum(len(rows) for _, rows in sets)

  def told(kind: str) -> tuple[int, str]:
    """How many rows are of a kind; that with the first places."""
    numbers = [getattr(f, kind) for f in found]
    n = sum(map(len, numbers))
    where = [
      place
      for (one, _), some in zip(sets, numbers, strict=True)
      for place in dataview.places(one, some)
    ]
    first = ', '.join(where[:5]) + (', ...' if n > 5 else '')
    return n, f'{n:,} of {total:,} rows ({n / total:.2%}), first {first}'

  n, where = told('no_end')
  if compared:
    yield Check('EOS', OK, 'none: choices are compared as they stand')
  elif n and not ends:
    yield Check('EOS', SKIPPED, 'the model names no EOS that could be learned')
  elif n:
    masked, _ = told('masked_end')
    why = f'; {masked:,} of them have it, but masked' if masked else ''
    yield _data_failure(
      'EOS',
      f'the last token learned is no EOS ({_listed(ends)}): {where}{why}; the'
      ' model would not learn to stop: let input_ids and labels end with it',
    )
  else:
    whole = ' whose end was not cut' if n_cut else ''
    yield Check(
      'EOS', OK, f'learned at the end of all {total - n_cut:,} rows{whole}'
    )

  for name, wrong, if_wrong, odd, if_odd, else_told in _GRADED:
    n, where = told(wrong)
    n_odd, odd_where = told(odd)
    if n:
      yield _data_failure(name, if_wrong.format(where))
    if n_odd:
      yield Check(name, WARN, if_odd.format(odd_where))
    if not n and not n_odd:
      yield Check(name, OK, else_told)


def _unheeded(
  sets: Sequence[tuple[RowSet, np.ndarray]],
  model_dir: Path,
  tokenizer: Tokenizer | None,
) -> Iterator[Check]:
  """Ends that are learned, and that generation would go on after."""
  if tokenizer is None:
    return
  ends = dataview.end_ids(model_dir, tokenizer)
  try:
    stops = complete.stop_ids(model_dir, tokenizer)
  except ModelError:  # a file that is told of where it is needed
    return
  more = sorted({*ends} - {*stops})
  if not more:
    return
  n, first = 0, []
  for one, rows in sets:
    unheeded = np.setdiff1d(
      statistics.without_end(one, rows, stops),
      statistics.without_end(one, rows, ends),
    )
    n += len(unheeded)
    first += dataview.places(one, unheeded)
  if n:
    named = ' or '.join(f'{tokenizer.piece(i)} ({i})' for i in more)
    yield Check(
      'EOS',
      WARN,
      f'{n:,} rows, first {", ".join(first[:5])}, end with {named}, at which'
      ' generation does not stop: name it as eos_token_id in'
      ' generation_config.json',
    )


def _whole(
  tokenized_set: RowSet, rows: np.ndarray, cut_at: int | None
) -> np.ndarray:
  """Those of the rows whose end was not cut: `dropped` tells of the others."""
  return rows[tokenized_set.lengths[rows] != cut_at]


def _data_failure(name: str, message: str) -> Check:
  return Check(name, FAIL, message, DataError.exit_code)


def _listed(ids: Sequence[int]) -> str:
  return ', '.join(map(str, ids))


def _spelled(rows: Rows) -> Iterator[Check]:
  """Special tokens that a text spells are read as the letters they are."""
  if rows.tokenizer is None:
    yield Check('spelling', SKIPPED, 'needs a tokenizer')
    return
  own = _own_spellings(rows, rows.tokenizer)
  found: dict[str, str] = {}
  searched = rows.train_rows[:_SEARCHED]
  for i in searched:
    ids = rows.train_set.ids[i].tolist()
    for name in _SPELLED.findall(rows.tokenizer.decode(ids)):
      if name not in own:
        found.setdefault(name, rows.train_set.where[i])
  if found:
    listed = ', '.join(f'{name} ({at})' for name, at in found.items())
    yield Check(
      'spelling',
      WARN,
      f'texts spell special tokens, which are read as their letters: {listed}',
    )
  else:
    told = (
      f'no special token is spelled out in the first {len(searched):,} rows'
    )
    yield Check('spelling', OK, told)


def _own_spellings(rows: Rows, tokenizer: Tokenizer) -> set[str]:
  """What is no slip: a chat format's own words, and what is read as a token."""
  named = {source.source.template for source in rows.sources}
  texts = ['[INST] [/INST]'] if mistral_chat.V1 in named else []
  if named & {'chat', conversation.SHAREGPT}:
    texts.append(tokenizer.chat_template or '')
  own = {name for text in texts for name in _SPELLED.findall(text)}
  return (own | tokenizer.added.keys()) - tokenizer.special.keys()


def _repeated(rows: Rows) -> Iterator[Check]:
  again = statistics.duplicates(rows.train_set, rows.train_rows)
  seen = statistics.leaks(
    rows.train_set, rows.train_rows, rows.eval_set, rows.eval_rows
  )
  for name, found, of, share_of, what in (
    ('duplicates', again, rows.train_set, rows.train_rows, 'repeat an earlier one'),
    ('leaks', seen, rows.eval_set, rows.eval_rows, 'held out are trained on'),
  ):  # fmt: skip
    n = len(found.rows)
    if not n:
      yield Check(name, OK, f'0 rows {what}')
      continue
    pairs = ', '.join(
      f'{of.where[i]} as {rows.train_set.where[j]}'
      for i, j in zip(found.rows[:3], found.earlier[:3], strict=True)
    )
    told = f'{n:,} of {len(share_of):,} rows {what}, first {pairs}'
    yield Check(name, WARN, told)
