"""Bad rows, gathered first and told in one line afterwards."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

PLACES = 5
_KINDS = 8
_COUNTED = 1000  # reasons counted apart; they may hold words of the data


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


def check_text(what: str, value: Any) -> None:
  """Refuses what a tokenizer can't read.

  Raises:
    RowError: not a string, or one that is no text.
  """
  if not isinstance(value, str):
    kind = 'null' if value is None else type(value).__name__
    raise RowError(f'{what} is {kind}, not a string')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    # JSON can spell half of a surrogate pair; no tokenizer can read it.
    raise RowError(f'{what} holds a lone surrogate') from error


class Problems:
  """Bad rows by number: all are counted, the first five are kept.

  >>> bad = Problems([Problem('a:1', 'empty')])
  >>> for line in range(2, 1_000_000):
  ...   bad.add(Problem(f'a:{line}', 'not JSON'))
  >>> len(bad), bad.counts['not JSON'], [p.where for p in bad.first]
  (999999, 999998, ['a:1', 'a:2', 'a:3', 'a:4', 'a:5'])
  >>> bad.places['not JSON'], bad.places['empty']
  (['a:2', 'a:3', 'a:4', 'a:5', 'a:6'], ['a:1'])

  Attributes:
    counts: how many there are of each reason.
    first: the first of all.
    places: the first of each reason.
  """

  def __init__(self, problems: Iterable[Problem] = ()):
    self.counts: Counter[str] = Counter()
    self.first: list[Problem] = []
    self.places: dict[str, list[str]] = {}
    self._n = 0
    for problem in problems:
      self.add(problem)

  def add(self, problem: Problem) -> None:
    """Counts one; those of a file come in the order of its rows."""
    self._n += 1
    self._count(problem.reason, 1, [problem.where])
    if len(self.first) < PLACES:
      self.first.append(problem)

  def _count(self, reason: str, n: int, where: list[str]) -> None:
    if len(self.counts) >= _COUNTED and reason not in self.counts:
      reason = 'another reason'
    self.counts[reason] += n
    places = self.places.setdefault(reason, [])
    places += where[: PLACES - len(places)]

  def __len__(self) -> int:
    return self._n

  def __add__(self, other: 'Problems') -> 'Problems':
    """Both, these first."""
    both = Problems()
    for part in (self, other):
      both._n += len(part)
      both.first += part.first[: PLACES - len(both.first)]
      for reason, n in part.counts.items():
        both._count(reason, n, part.places[reason])
    return both


def describe(problems: Problems | Iterable[Problem]) -> str:
  """Counts by reason, then the first places; what repeats is said once.

  >>> describe([Problem('a:1', 'not JSON', 'x'), Problem('a:7', 'not JSON')])
  '2 rows (2 x not JSON), first: a:1 (x), a:7'
  >>> describe([Problem('a:1', 'not JSON'), Problem('a:7', 'empty')])
  '2 rows (1 x not JSON, 1 x empty), first: a:1 not JSON, a:7 empty'
  """
  if not isinstance(problems, Problems):
    problems = Problems(problems)
  places = []
  detail = ''
  for p in problems.first:
    several = len(problems.counts) > 1
    place = f'{p.where} {p.reason}' if several else p.where
    if p.detail and p.detail != detail:
      place += f' ({p.detail})'
    detail = p.detail
    places.append(place)
  rows = 'row' if len(problems) == 1 else 'rows'
  return one_line(
    f'{len(problems)} {rows} ({counted(problems.counts)}), first:'
    f' {", ".join(places)}'
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
