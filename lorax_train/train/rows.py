"""The rows of a run, and its batches on the mesh: a function of the step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lorax_train import config as config_lib
from lorax_train import parallel
from lorax_train.config import Source, TrainConfig
from lorax_train.data import batches, buckets, mixture, packing, sequences
from lorax_train.data.batches import Walk
from lorax_train.data.buckets import Buckets
from lorax_train.data.encoded import Sizes
from lorax_train.data.joined import Joined, RowSet
from lorax_train.data.tokenize import Tokenizer
from lorax_train.data.tokenized import TokenizedSet
from lorax_train.train import choices, held_out


class SourceRows(NamedTuple):
  """A source, tokenised.

  Attributes:
    source: where it is from, and its template and weight.
    rows: all of it.
    n_items: rows of it, or packs, that are trained on.
  """

  source: Source
  rows: TokenizedSet
  n_items: int


class Rows(NamedTuple):
  """Tokenised rows, which of them are trained on and in what order.

  Attributes:
    train_set: rows that `train_rows` are numbers of.
    train_rows: what is trained on.
    eval_set: rows that `eval_rows` are numbers of.
    eval_rows: what is held out.
    length: tokens of a row in a batch.
    tokenizer: None where rows of token ids have none.
    sources: what `train_set` is made of.
    walk: the order of the items: train_rows, or packs of them.
    tokens: of each item, int64 [items].
    packs: the rows to train on, packed.
    buckets: the order in batches, where these have more than one length.
    sizes: the most there is in a row of choices; of rows without, zeros.
    compared: whether training compares the choices, or learns the right ones.
  """

  train_set: RowSet
  train_rows: np.ndarray
  eval_set: RowSet
  eval_rows: np.ndarray
  length: int
  tokenizer: Tokenizer | None
  sources: tuple[SourceRows, ...]
  walk: Walk
  tokens: np.ndarray
  packs: packing.Packs | None = None
  buckets: Buckets | None = None
  sizes: Sizes = Sizes()
  compared: bool = False

  @property
  def fingerprint(self) -> str:
    """Of all that the run reads."""
    both = (self.train_set.fingerprint, self.eval_set.fingerprint)
    return both[0] if both[0] == both[1] else '+'.join(both)

  @property
  def lengths(self) -> tuple[int, ...]:
    """Tokens of a row, or of a pack, in the training batches there are."""
    if self.buckets:
      return self.buckets.bounds
    return (self.packs.length if self.packs else self.length,)

  @property
  def pad_id(self) -> int:
    """What fills rows up; it is never attended to or learned."""
    return self.tokenizer.pad_id if self.tokenizer else 0

  def items_at(self, cfg: TrainConfig, step: int) -> tuple[np.ndarray, int]:
    """Items of the batch at `step`, and the length of the batch.

    Returns:
      Numbers into train_rows, or of packs, int64 [micro-batches, rows], of the
      global batch; EMPTY for a row of nothing but padding.
    """
    shape = cfg.train.grad_accum, cfg.train.batch_size
    size = shape[0] * shape[1]
    if self.buckets:
      items, length = self.buckets.at(step)
    else:
      items, length = self.walk(step * size, size), self.lengths[0]
    return items.reshape(shape), length

  def part(
    self, cfg: TrainConfig, step: int, own: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Some of the rows of the batch at `step`: what a host reads of it.

    Args:
      cfg: the run.
      step: number of the step.
      own: which rows of each micro-batch.

    Returns:
      ids and labels [micro-batches, rows, tokens], of packs also segments and
      positions; of choices that are compared what `sequences.take` gives, with
      micro-batches in front. No mask: causal attention never looks at padding on
      the right.
    """
    items, length = self.items_at(cfg, step)
    return self._read(items[:, own], length)

  def _read(self, part_AB: np.ndarray, length: int) -> dict[str, np.ndarray]:
    own = part_AB.ravel()
    rows = np.where(own < 0, batches.EMPTY, self.train_rows[own])
    if self.packs:
      flat = batches.take_packs(self.train_set, self.packs, own, self.pad_id)
    elif self.compared:
      flat = self._choices(self.train_set, rows, length)
    else:
      flat = batches.take_rows(self.learned_set, rows, length, self.pad_id)
    flat.pop('mask', None)
    return {n: x.reshape(*part_AB.shape, *x.shape[1:]) for n, x in flat.items()}

  def _choices(
    self, rows: RowSet, numbers: np.ndarray, length: int
  ) -> dict[str, np.ndarray]:
    return sequences.take(rows, numbers, self.sizes, length, self.pad_id)

  @property
  def learned_set(self) -> RowSet:
    """train_set, of choices only the right ones."""
    has_others = self.sizes.choices
    return sequences.Right(self.train_set) if has_others else self.train_set

  def held_out(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """The held-out rows in batches of one shape.

    Of choices with all of them, and by length as those to train on are.
    """
    if self.sizes.choices:
      for part, length in self._held_out_by_length():
        for rows in batches.in_batches(part, batch_size):
          yield self._choices(self.eval_set, rows, length)
      return
    for batch in batches.eval_batches(
      self.eval_set, self.eval_rows, batch_size, self.length, self.pad_id
    ):
      yield {name: batch[name] for name in ('ids', 'labels')}

  def batch(
    self, cfg: TrainConfig, mesh: jax.sharding.Mesh, step: int
  ) -> tuple[dict[str, jax.Array], int]:
    """The batch of a step and its number of tokens, padding not counted.

    Returns:
      What `part` gives, of all hosts, on the mesh.
    """
    items, length = self.items_at(cfg, step)
    n_rows = cfg.train.batch_size
    own = parallel.rows_of(mesh, n_rows)
    where = parallel.batch_sharding(mesh, axis=1)
    placed = {
      name: parallel.put_rows(own, rows, n_rows, where)
      for name, rows in self._read(items[:, own], length).items()
    }
    return placed, int(self.tokens[items[items >= 0]].sum())

  def _held_out_by_length(self) -> Iterator[tuple[np.ndarray, int]]:
    bounds = sorted(
      {*(self.buckets.bounds if self.buckets else ()), self.length}
    )
    lengths = sequences.longest(self.eval_set, self.eval_rows)
    bucket_of = np.searchsorted(bounds, lengths)
    for bucket, length in enumerate(bounds):
      yield self.eval_rows[bucket_of == bucket], length

  def shapes(
    self, cfg: TrainConfig, mesh: jax.sharding.Mesh
  ) -> dict[int, dict[str, jax.ShapeDtypeStruct]]:
    """{length: a batch of it, without the numbers}."""
    names = ['ids', 'labels', *(['segments', 'positions'] * bool(self.packs))]
    sharding = parallel.batch_sharding(mesh, axis=1)
    batch = cfg.train.grad_accum, cfg.train.batch_size

    def of_row(length: int) -> dict[str, tuple[int, ...]]:
      if self.compared:
        return sequences.shapes(self.sizes, length)
      return dict.fromkeys(names, (length,))

    return {
      length: {
        name: jax.ShapeDtypeStruct((*batch, *own), np.int32, sharding=sharding)
        for name, own in of_row(length).items()
      }
      for length in self.lengths
    }


def arrange(
  cfg: TrainConfig,
  tokenised: Sequence[TokenizedSet],
  eval_set: TokenizedSet | None,
  tokenizer: Tokenizer | None,
) -> Rows:
  """Holds rows out, packs the others, or puts them into buckets.

  Args:
    cfg: the run.
    tokenised: rows of each source of the configuration.
    eval_set: held-out rows; None to take them out of the sources.
    tokenizer: of the run.

  Raises:
    DataError: a source has nothing to train on, or choices unlike the others.
    ConfigError: rows of choices can't be had as the run wants them.
  """
  sources = config_lib.sources(cfg.data)
  weights = [source.weight for source in sources]
  sizes, compared = choices.sizes_of(
    [*tokenised, *([eval_set] if eval_set else [])],
    cfg.train.loss,
    cfg.data.packing,
  )
  joined = Joined(tokenised)
  # What a run of a single source has read is the fingerprint of that.
  train_set: RowSet = joined if len(tokenised) > 1 else tokenised[0]
  n_eval = cfg.eval.rows if eval_set is None else 0
  split = held_out.split(cfg, sources, tokenised, n_eval)
  of_sources, of_held_out = (
    [start + own for start, own in zip(joined.starts, each, strict=True)]
    for each in zip(*split, strict=True)
  )
  train_rows = np.concatenate(of_sources)
  held_set, eval_rows = train_set, held_out.in_turn(of_held_out)
  if eval_set is not None:
    held_set, eval_rows = eval_set, np.arange(len(eval_set.lengths))
  room, of_eval = (
    batches.row_length(s, cfg.data.max_length) for s in (train_set, held_set)
  )
  tokens, packs = joined.lengths[train_rows], None
  lengths = tokens
  if compared:
    lengths = sequences.longest(joined, train_rows)
  elif sizes.choices:
    tokens = lengths = sequences.Right(joined).lengths[train_rows]
  n_items = [len(rows) for rows in of_sources]
  if cfg.data.packing:
    of_packs = [
      packing.pack_rows(joined.lengths[rows], cfg.data.max_length, rows)
      for rows in of_sources
    ]
    every = [rows for each in of_packs for rows in each.rows]
    packs = packing.Packs(every, cfg.data.max_length, int(tokens.sum()))
    tokens = np.array([joined.lengths[rows].sum() for rows in every])
    n_items = [len(each.rows) for each in of_packs]
  walk = _walk(n_items, weights, cfg.train.seed)
  return Rows(
    train_set,
    train_rows,
    held_set,
    eval_rows,
    max(room, of_eval),
    tokenizer,
    tuple(map(SourceRows, sources, tokenised, n_items)),
    walk,
    tokens,
    packs,
    _buckets(cfg, walk, lengths, room),
    sizes,
    compared,
  )


def _walk(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Walk:
  if len(sizes) > 1:
    return mixture.Mixture(sizes, weights, seed).between
  return batches.walk_of(sizes[0], seed)


def _buckets(
  cfg: TrainConfig, walk: Walk, lengths: np.ndarray, room: int
) -> Buckets | None:
  wanted = config_lib.buckets(cfg.data)
  if not wanted:
    return None
  bounds = buckets.bounds_for(lengths, wanted, room)
  global_batch = cfg.train.grad_accum * cfg.train.batch_size
  return Buckets(walk, lengths, bounds, global_batch, cfg.train.seed)


def paths(cfg: TrainConfig) -> str:
  """Where the rows come from, in words."""
  given = (s.path for s in config_lib.sources(cfg.data))
  return ', '.join(dict.fromkeys(given))


def templates(cfg: TrainConfig) -> str:
  """What they are read by, in words."""
  names = (s.template for s in config_lib.sources(cfg.data))
  return ', '.join(dict.fromkeys(names))


def epochs(cfg: TrainConfig, rows: Rows) -> list[float]:
  """How often the run goes through each source."""
  positions = cfg.train.steps * cfg.train.grad_accum * cfg.train.batch_size
  if rows.buckets and len(rows.sources) == 1:
    return [cfg.train.steps / rows.buckets.n_batches]
  return [
    positions * share / s.n_items
    for share, s in zip(_shares(rows), rows.sources, strict=True)
  ]


def _shares(rows: Rows) -> list[float]:
  """What part of all each source is; the sum of weights may be no float."""
  parts = mixture.shares([s.source.weight for s in rows.sources])
  return [part / sum(parts) for part in parts]


def banner_lines(cfg: TrainConfig, rows: Rows) -> dict[str, str]:
  """What became of the rows and how they are read, for the banner."""
  lines = {'data': summary(rows)}
  size = cfg.train.grad_accum * cfg.train.batch_size
  positions = cfg.train.steps * size
  kind = 'packs' if rows.packs else 'rows'
  of_sources = epochs(cfg, rows)
  if len(rows.sources) > 1:
    # All under one name, each on a line of its own.
    lines['sources'] = f'\n{"":<11}'.join(
      f'{100 * share:.4g} % {s.source.path},'
      f' {s.source.template}: {s.rows.report.summary()}; {s.n_items:,} {kind}'
      f' an epoch, {n:,.2f} epochs'
      for s, share, n in zip(
        rows.sources, _shares(rows), of_sources, strict=True
      )
    )
  *others, longest = (f'{length}' for length in rows.lengths)
  lengths = f'{", ".join(others)} or {longest}' if others else longest
  room = size * rows.lengths[-1]
  lines['batch'] = (
    f'{cfg.train.grad_accum} x {cfg.train.batch_size} {kind} of {lengths}'
    f' tokens: {"at most " * bool(others)}{room:,} a step, padding included;'
    f' {cfg.train.steps:,} steps are '
  )
  if len(rows.sources) > 1:  # each has epochs of its own
    lines['batch'] += f'{positions:,} {kind}'
    return lines
  lines['batch'] += (
    f'{of_sources[0]:,.2f} epochs of {len(rows.tokens):,} {kind}'
  )
  return lines


def summary(rows: Rows) -> str:
  """What became of the rows, in a line."""
  text = rows.sources[0].rows.report.summary()
  if len(rows.sources) > 1:
    text = f'{len(rows.train_rows):,} rows of {len(rows.sources)} sources'
  if rows.eval_set is not rows.train_set:
    text += f'; {len(rows.eval_rows):,} held-out rows of their own'
  elif len(rows.sources) > 1:
    text += f'; {len(rows.eval_rows):,} others held out'
  else:
    text += f'; {len(rows.eval_rows):,} of them held out'
  if rows.packs:
    return f'{text}; {rows.packs.summary()}'
  return f'{text}; {rows.buckets.summary()}' if rows.buckets else text
