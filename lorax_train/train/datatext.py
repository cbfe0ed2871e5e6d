"""What `dataview` found, in words."""

import re
from collections.abc import Sequence

from lorax_train.data import preview
from lorax_train.infer.inspection import aligned
from lorax_train.train.dataview import Facts

_TOLD = 3  # places, of each kind
_BAR = 40


def text(facts: Facts, colour: bool = False) -> str:
  """`dataview.describe` in words; of what comes out of the data nothing is raw."""
  shown = [_example_text(e, colour) for e in facts['examples']]
  return '\n\n'.join([*shown, _bars(facts['lengths']), _summary(facts)])


def _example_text(example: Facts, colour: bool) -> str:
  end = 'EOS learned' if example['end_learned'] else 'EOS NOT LEARNED'
  end = f'{len(example["others"]) + 1} choices' if example['others'] else end
  head = (
    f'{_inline(example["where"])}  {example["tokens"]:,} tokens,'
    f' {example["learned_tokens"]:,} learned, {end}'
  )
  lines = [head]
  for begin, runs in [
    ('  ', example['runs']),
    *(('  or: ', other) for other in example['others']),
  ]:
    row = [preview.Run(**run) for run in runs]
    lines.append(preview.shown(row, colour, begin))
  return '\n'.join(lines)


def _bars(lengths: Facts) -> str:
  bins = lengths['bins']
  most = max(b['rows'] for b in bins)
  spans = [f'{b["from"]}-{b["to"]}' for b in bins]
  wide, high = max(map(len, spans)), len(f'{most:,}')
  lines = [
    f'{span:>{wide}}  {b["rows"]:>{high},}  '
    # what is there at all has a bar
    + '#' * -(-_BAR * b['rows'] // most)
    for span, b in zip(spans, bins, strict=True)
  ]
  return '\n'.join(['rows by tokens', *(line.rstrip() for line in lines)])


def _summary(facts: Facts) -> str:
  rows, lengths, ends = facts['rows'], facts['lengths'], facts['ends']
  percentiles = ', '.join(
    f'{q} % {tokens:,}' for q, tokens in lengths['quantiles'].items()
  )
  held_out = f'{rows["held_out"]:,} held out'
  if facts['eval_data']:
    held_out += f' of {_inline(facts["eval_data"])}'
  lines = {
    'data': f'{_inline(facts["data"])}, template {_inline(facts["template"])}',
    'rows': (
      f'{rows["read"]:,} read, {rows["kept"]:,} kept, {rows["train"]:,} to'
      f' train on, {held_out}'
    ),
    'dropped': '; '.join(
      f'{d["rows"]:,} x {_inline(d["reason"])} ({_first(d["first"], d["rows"])})'
      for d in facts['dropped']
    )
    or 'none',
    'cut': (
      f'{facts["truncated"]:,} at the front, {facts["cut_off"]:,} at the end, at'
      f' max_length {facts["max_length"]:,}'
    ),
    'tokens': (
      f'{facts["tokens"]:,}, {facts["learned_tokens"]:,} learned'
      f' ({_percent(facts["learned_tokens"] / facts["tokens"])})'
    ),
    'length': (
      f'{lengths["shortest"]:,} to {lengths["longest"]:,}, mean'
      f' {lengths["mean"]:,.1f}; {percentiles}'
    ),
    **_padding_text(facts['padding'], packs=not facts['choices']),
    **(_choices_text(facts['choices']) if facts['choices'] else {}),
    **(_ends_text(ends, rows['train']) if ends else {}),
    'boundary': (
      f'{facts["merged_boundary"]:,} rows with a token across prompt and'
      ' completion'
    ),
    'duplicates': _pairs(facts['duplicates'], 'repeat an earlier one'),
    'leaks': _pairs(facts['leaks'], 'of those held out are trained on'),
  }
  if facts['run']:
    run, packed = facts['run'], facts['padding']['packing']
    lines['run'] = (
      f'{run["steps"]:,} steps of {run["batch"]:,}'
      f' {"packs" if packed else "rows"}'
    )
    if run['epochs'] is not None:
      lines['run'] += f': {run["epochs"]:,.2f} epochs'
  if len(facts['sources']) > 1:
    lines['sources'] = '; '.join(map(_source_text, facts['sources']))
  return aligned(lines)


def _source_text(source: Facts) -> str:
  text = (
    f'{_inline(source["path"])}, {_inline(source["template"])}, weight'
    f' {source["weight"]:g}: {source["kept"]:,} of {source["read"]:,} rows kept'
  )
  if source['epochs'] is not None:
    text += f', {source["epochs"]:,.2f} epochs'
  return text


def _ends_text(ends: Facts, n_rows: int) -> dict[str, str]:
  but = _but(n_rows - ends['learned'], ends['missing'])
  share = _percent(ends['share'])
  return {
    'EOS': f'learned in {ends["learned"]:,} of {n_rows:,} rows ({share}){but}'
  }


def _choices_text(choices: Facts) -> dict[str, str]:
  return {
    'choices': (
      f'{choices["most"]:,} a row at most, {choices["longest"]:,} tokens at most;'
      f' the commonest right one is that of {_percent(choices["majority"])} of the'
      ' rows'
    )
  }


def _padding_text(padding: Facts, packs: bool) -> dict[str, str]:
  plain, packed = padding['plain'], padding['packed']
  of_rows = (
    f'{_percent(plain["share"])} with rows filled up to {plain["length"]:,}'
    ' tokens'
  )
  of_packs = (
    f'{packed["packs"]:,} packs of {plain["rows"]:,} rows,'
    f' {packed["length"]:,} tokens each, padding {_percent(packed["share"])}'
  )
  if padding['buckets']:
    lengths = ', '.join(map(str, padding['buckets']['lengths']))
    of_buckets = (
      f'{_percent(padding["buckets"]["share"])} in batches of {lengths} tokens'
    )
    return {'padding': of_buckets, 'in one': f'it would be {of_rows}'}
  if padding['packing']:
    return {'padding': of_packs, 'unpacked': f'it would be {of_rows}'}
  if not packs:
    return {'padding': of_rows}
  return {
    'padding': of_rows,
    'packing': f'data.packing would make {of_packs}',
  }


def _but(n: int, first: Sequence[str]) -> str:
  return f'; not in {n:,} ({_first(first, n)})' if n else ''


def _pairs(repeats: Facts, what: str) -> str:
  pairs = [f'{a} as {b}' for a, b in repeats['first']]
  first = f' ({_first(pairs, repeats["rows"])})' if pairs else ''
  return f'{repeats["rows"]:,} rows {what}{first}'


def _first(found: Sequence[str], n: int) -> str:
  # The data's path has a line of its own: here the names of the files will do.
  names = [_inline(re.sub(r'[^ ]*/', '', place)) for place in found[:_TOLD]]
  return ', '.join([*names, *(['...'] if n > len(names) else [])])


def _inline(text: str) -> str:
  return preview.visible(text, keep='')


def _percent(share: float) -> str:
  """Three figures; never 0 or 100 for what is not.

  >>> _percent(0.99999), _percent(0.0), _percent(0.5)
  ('99.9 %', '0.0 %', '50.0 %')
  """
  value = round(100 * share, 1)
  if 0 < share < 1:
    value = min(max(value, 0.1), 99.9)
  return f'{value:.1f} %'
