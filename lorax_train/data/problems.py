"""Bad rows, gathered first and told in one line afterwards."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_PLACES = 5
_KINDS = 8


class Problem(NamedTuple):
  """One bad row: `reason` is what rows are counted by, `detail` is its own."""

  where: str
  reason: str
  detail: str = ''


class RowError(ValueError):
  """A row that can't be used; whoever knows its place makes it a Problem."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(reason)
    self.reason = reason
    self.detail = detail


def describe(problems: Sequence[Problem]) -> str:
  """Counts by reason, then the first places; what repeats is said once.

  >>> describe([Problem('a:1', 'not JSON', 'x'), Problem('a:7', 'not JSON')])
  '2 rows (2 x not JSON), first: a:1 (x), a:7'
  >>> describe([Problem('a:1', 'not JSON'), Problem('a:7', 'empty')])
  '2 rows (1 x not JSON, 1 x empty), first: a:1 not JSON, a:7 empty'
  """
  counts = Counter(p.reason for p in problems)
  places = []
  detail = ''
  for p in problems[:_PLACES]:
    place = f'{p.where} {p.reason}' if len(counts) > 1 else p.where
    if p.detail and p.detail != detail:
      place += f' ({p.detail})'
    detail = p.detail
    places.append(place)
  rows = 'row' if len(problems) == 1 else 'rows'
  return one_line(
    f'{len(problems)} {rows} ({counted(counts)}), first: {", ".join(places)}'
  )


def counted(counts: Counter[str]) -> str:
  """`2 x this, 1 x that`, the commonest first.

  >>> counted(Counter({'empty completion': 1, 'too long': 3}))
  '3 x too long, 1 x empty completion'
  """
  parts = [f'{n} x {reason}' for reason, n in counts.most_common(_KINDS)]
  if len(counts) > _KINDS:
    parts.append(f'and {len(counts) - _KINDS} more reasons')
  return ', '.join(parts)


def one_line(text: str) -> str:
  r"""Any run of white space becomes a single space.

  >>> one_line('a\n  b')
  'a b'
  """
  return ' '.join(text.split())


def shorten(text: str, length: int = 60) -> str:
  """At most `length` characters, the cut shown.

  >>> shorten('abcdef', 4)
  'a...'
  """
  return text if len(text) <= length else text[: length - 3] + '...'
