"""What training will see of the data, as facts and in words.

Neither weights nor devices are touched: config.json and the tokenizer will do.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax_train.config import TrainConfig
from lorax_train.data import packing, preview, sequences, statistics
from lorax_train.data.joined import RowSet
from lorax_train.data.statistics import Repeats
from lorax_train.data.tokenize import Tokenizer
from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import find, hf_config
from lorax_train.formats.jsonfile import read_object
from lorax_train.train import options, reading
from lorax_train.train.rows import Rows, epochs, paths, templates

Facts = dict[str, Any]

# Pieces that end a turn in the chat formats of Mistral and Llama's relatives.
_TURN_ENDS = (
  '<|im_end|>',
  '<|eot_id|>',
  '<|eom_id|>',
  '<|end|>',
  '<end_of_turn>',
  '<|end_of_turn|>',
)
_PLACES = 5


def describe(cfg: TrainConfig, n_rows: int = 3, *, a_run: bool = True) -> Facts:
  """The rows that a configuration trains on, counted, and the first of them.

  Args:
    cfg: of the run.
    n_rows: so many training rows are shown in full.
    a_run: whether steps and batches are meant; if not, only rows are.

  Returns:
    model, data, eval_data (None: out of data), template, max_length;
    rows {read, kept, train, held_out}: of data; held_out is of eval_data where
      there is one;
    dropped [{reason, rows, first}], truncated, cut_off, merged_boundary: of data;
    tokens, learned_tokens, and all that follows: of the rows to train on, and of
    choices of the right one alone;
    choices {most, longest, majority}: how many a row has, tokens of one, and the
    share of the rows with the commonest right one; None of rows without;
    lengths {shortest, mean, longest, quantiles {per cent: tokens}, bins [{from,
      to, rows}]};
    padding {packing, plain {rows, length, share}, packed {packs, length,
      share}, buckets {lengths, share} or None}: shares from 0 to 1;
    ends {ids, learned, share, missing}: rows that learn to end, and the first
      places of those that do not; None of choices;
    duplicates {rows, first [[place, earlier place]]};
    leaks {rows, first [[held-out place, training place]]};
    run {steps, batch, epochs}, a batch in rows or packs; None without a run,
      and so are epochs of several sources;
    sources [{path, template, weight, read, kept, epochs}];
    examples [{where, tokens, learned_tokens, end_learned, ids, labels, pieces,
      runs [{text, learned, piece}], others: runs of each wrong choice}].

  Raises:
    UserError: what stops a run at the same point.
  """
  if n_rows < 0:
    raise ConfigError(f'--rows {n_rows}: give 0 for none, or a number')
  model_dir = find.find_model(cfg.model.path, weights=False)
  rows = reading.read_rows(cfg, model_dir, hf_config.read_config(model_dir))
  train_set, train_rows, report = (
    rows.learned_set,
    rows.train_rows,
    rows.train_set.report,
  )
  lengths = np.asarray(train_set.lengths)[train_rows]
  ends = end_ids(model_dir, rows.tokenizer)
  open_rows = statistics.without_end(train_set, train_rows, ends)
  again = statistics.duplicates(rows.train_set, train_rows)
  seen = statistics.leaks(
    rows.train_set, train_rows, rows.eval_set, rows.eval_rows
  )
  learned = statistics.learned(train_set, train_rows)
  return {
    'model': cfg.model.path,
    'data': paths(cfg),
    'eval_data': cfg.data.eval_path or None,
    'template': templates(cfg),
    'max_length': cfg.data.max_length,
    'rows': {
      'read': report.rows_read,
      'kept': report.rows_kept,
      'train': len(train_rows),
      'held_out': len(rows.eval_rows),
    },
    'dropped': [
      {'reason': reason, 'rows': n, 'first': report.dropped_at.get(reason, [])}
      for reason, n in report.dropped.items()
    ],
    'truncated': report.truncated,
    'cut_off': report.cut_off,
    'merged_boundary': report.merged_boundary,
    'tokens': int(lengths.sum()),
    'learned_tokens': int(learned.sum()),
    'lengths': {
      'shortest': int(lengths.min()),
      'mean': float(lengths.mean()),
      'longest': int(lengths.max()),
      'quantiles': {
        str(q): n for q, n in statistics.quantiles(lengths).items()
      },
      'bins': [
        {'from': begin, 'to': end, 'rows': n}
        for begin, end, n in statistics.histogram(lengths)
      ],
    },
    'choices': _choices(rows),
    'padding': _padding(cfg, rows, lengths),
    'ends': None
    if rows.sizes.choices
    else {
      'ids': ends,
      'learned': len(train_rows) - len(open_rows),
      'share': 1 - len(open_rows) / len(train_rows),
      'missing': places(train_set, open_rows),
    },
    'duplicates': _repeats(again, train_set, train_set),
    'leaks': _repeats(seen, rows.eval_set, train_set),
    'run': _run(cfg, rows) if a_run else None,
    'sources': _sources(cfg, rows, a_run),
    'examples': [_example(rows, int(i), ends) for i in train_rows[:n_rows]],
  }


def describe_file(
  model: str, data: str, template: str, n_rows: int = 3, **rest: Any
) -> Facts:
  """`describe` of a file's rows, all of them, without a configuration.

  Args:
    model: directory in Hugging Face format, or a hub id.
    data: see `data.path` of the configuration.
    template: likewise.
    n_rows: see `describe`.
    **rest: max_length, truncation, on_bad_row; see `options.config_of`.
  """
  cfg = options.config_of(model, data, template, **rest)
  with options.reworded('show'):
    return describe(cfg, n_rows, a_run=False)


def end_ids(model_dir: Path, tokenizer: Tokenizer | None) -> list[int]:
  """Ids that may end an answer: the model's EOS, or the end of a turn."""
  ids: set[int] = set()
  if tokenizer is not None:
    turns = (tokenizer.library.id_of(piece) for piece in _TURN_ENDS)
    ids |= {tokenizer.eos_id, *(i for i in turns if i is not None)}
  for name in ('config.json', 'generation_config.json'):
    value = _object(model_dir / name).get('eos_token_id')
    values = value if isinstance(value, list) else [value]
    ids |= {i for i in values if type(i) is int}
  return sorted(ids)


def bos_id(
  model_dir: Path, tokenizer: Tokenizer | None, ends: Sequence[int]
) -> int | None:
  """What begins a row and nothing else; None where there is no such id."""
  if tokenizer is not None:
    id = tokenizer.bos_id
  else:
    id = _object(model_dir / 'config.json').get('bos_token_id')
  return id if type(id) is int and id not in ends else None


def _object(path: Path) -> dict[str, Any]:
  try:
    return read_object(path)
  except ModelError:  # of no use here, and told where it is needed
    return {}


def places(tokenized: RowSet, rows: Sequence[int] | np.ndarray) -> list[str]:
  """The first places of some rows of a set."""
  return [tokenized.where[i] for i in rows[:_PLACES]]


def _repeats(found: Repeats, of_rows: RowSet, of_earlier: RowSet) -> Facts:
  pairs = zip(found.rows[:_PLACES], found.earlier[:_PLACES], strict=True)
  return {
    'rows': len(found.rows),
    'first': [[of_rows.where[i], of_earlier.where[j]] for i, j in pairs],
  }


def _padding(cfg: TrainConfig, rows: Rows, lengths: np.ndarray) -> Facts:
  packs = rows.packs or packing.pack_rows(
    lengths, cfg.data.max_length, rows.train_rows
  )
  n_packs, tokens = len(packs.rows), int(lengths.sum())
  return {
    'packing': rows.packs is not None,
    'plain': {
      'rows': len(lengths),
      'length': rows.length,
      'share': statistics.padding(tokens, len(lengths), rows.length),
    },
    'packed': {
      'packs': n_packs,
      'length': packs.length,
      'share': statistics.padding(tokens, n_packs, packs.length),
    },
    'buckets': rows.buckets
    and {'lengths': list(rows.buckets.bounds), 'share': rows.buckets.padding},
  }


def _choices(rows: Rows) -> Facts | None:
  if not rows.sizes.choices:
    return None
  return {
    'most': rows.sizes.choices,
    'longest': rows.sizes.choice,
    'majority': statistics.majority(rows.learned_set, rows.train_rows),
  }


def _run(cfg: TrainConfig, rows: Rows) -> Facts:
  batch = cfg.train.batch_size * cfg.train.grad_accum
  of_sources = epochs(cfg, rows)
  return {
    'steps': cfg.train.steps,
    'batch': batch,
    'epochs': of_sources[0] if len(of_sources) == 1 else None,
  }


def _sources(cfg: TrainConfig, rows: Rows, a_run: bool) -> list[Facts]:
  return [
    {
      **dataclasses.asdict(s.source),
      'read': s.rows.report.rows_read,
      'kept': s.rows.report.rows_kept,
      'epochs': n if a_run else None,
    }
    for s, n in zip(rows.sources, epochs(cfg, rows), strict=True)
  ]


def _example(rows: Rows, i: int, ends: Sequence[int]) -> Facts:
  shown = rows.learned_set
  ids, labels = shown.ids[i], shown.labels[i]
  one = np.array([i])
  tokenizer = rows.tokenizer
  others = []
  if rows.sizes.choices:
    every = sequences.split(rows.train_set.ids[i], rows.train_set.labels[i])
    others = [preview.runs(*other, tokenizer)[-1:] for other in every[1:]]
  return {
    'where': rows.train_set.where[i],
    'tokens': len(ids),
    'learned_tokens': int(statistics.learned(shown, one)[0]),
    'end_learned': not len(statistics.without_end(shown, one, ends)),
    'ids': ids.tolist(),
    'labels': labels.tolist(),
    'pieces': [tokenizer.piece(t) for t in ids.tolist()] if tokenizer else None,
    'runs': [run._asdict() for run in preview.runs(ids, labels, tokenizer)],
    'others': [[run._asdict() for run in other] for other in others],
  }
