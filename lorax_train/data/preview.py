r"""A row as text in which one sees what is learned.

Text is data, and a terminal obeys what it is sent: whatever is no plain
character is shown as Python would escape it, and so is a backslash, so that
nothing in a row can pass for something else.
"""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorax_train.data.encoded import NO_LOSS

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

# Around what is learned, and around a token that is shown by its piece.
_LEARNED = '⟦', '⟧'
_PIECE = '⟨', '⟩'
_ESCAPED = {*_LEARNED, *_PIECE, '\\'}
_GREEN, _DIM, _PLAIN = '\x1b[32m', '\x1b[2m', '\x1b[0m'
_LONGEST_CHARACTER = 4  # bytes, so tokens, in UTF-8


class Run(NamedTuple):
  """Neighbouring tokens that are alike.

  Attributes:
    text: theirs; of a piece, as the vocabulary spells it.
    learned: whether the loss is on them.
    piece: a token without text of its own (BOS, EOS, part of a character).
  """

  text: str
  learned: bool
  piece: bool


def runs(
  ids: Sequence[int] | np.ndarray,
  labels: Sequence[int] | np.ndarray,
  tokenizer: 'Tokenizer | None',
) -> list[Run]:
  """A row cut where what is learned begins or ends, and around pieces.

  Without a tokenizer the text is the ids. The first token is never learned,
  whatever its label: nothing predicts it.
  """
  ids = [int(i) for i in ids]
  learned = [n > 0 and int(label) != NO_LOSS for n, label in enumerate(labels)]
  if tokenizer is None:
    texts = (f' {i}' if n else str(i) for n, i in enumerate(ids))
    return _joined(
      [(t, on, False) for t, on in zip(texts, learned, strict=True)]
    )
  bare = _without_text(ids, tokenizer)
  text = _Text(ids, tokenizer)
  parts = []
  begin = 0
  while begin < len(ids):
    if bare[begin]:
      parts.append((tokenizer.piece(ids[begin]), learned[begin], True))
      begin += 1
      continue
    end = begin + 1
    while end < len(ids) and not bare[end] and learned[end] == learned[begin]:
      end += 1
    # Within a character is no place to cut: its tokens are shown as pieces.
    near = range(end, max(begin, end - _LONGEST_CHARACTER), -1)
    cut = next((n for n in near if text.before(n) is not None), begin)
    after = range(end, min(len(ids), end + _LONGEST_CHARACTER))
    until = end
    if cut < end:
      until = next((n for n in after if text.before(n) is not None), len(ids))
    parts.append((text.between(begin, cut), learned[begin], False))
    parts += [
      (tokenizer.piece(ids[n]), learned[n], True) for n in range(cut, until)
    ]
    begin = until
  return _joined(parts)


class _Text:
  """The text of a row, cut between its tokens."""

  def __init__(self, ids: list[int], tokenizer: 'Tokenizer'):
    self._ids = ids
    self._tokenizer = tokenizer
    self._whole = tokenizer.decode(ids)
    self._known: dict[int, int | None] = {len(ids): len(self._whole)}

  def before(self, n: int) -> int | None:
    """Characters before token n; None where it begins within a character."""
    if n not in self._known:
      text = self._tokenizer.decode(self._ids[:n])
      fits = self._whole.startswith(text)
      self._known[n] = len(text) if fits else None
    return self._known[n]

  def between(self, begin: int, end: int) -> str:
    """The text of some tokens, neither end of which is within a character."""
    return self._whole[self.before(begin) : self.before(end)]


def _without_text(ids: list[int], tokenizer: 'Tokenizer') -> list[bool]:
  """Which ids add nothing to a text: special tokens, ids of no piece."""
  kinds = sorted(set(ids))
  # A text's first token may lose its space; so none is looked at as the first.
  anchor = next((i for i in kinds if tokenizer.decode([i]).strip()), None)
  if anchor is None:
    return [True] * len(ids)
  alone = tokenizer.decode([anchor])
  bare = {i for i in kinds if tokenizer.decode([anchor, i]) == alone}
  return [i in bare for i in ids]


def _joined(parts: list[tuple[str, bool, bool]]) -> list[Run]:
  joined: list[Run] = []
  for part in map(Run._make, parts):
    if not part.text:
      continue
    if joined and not part.piece and joined[-1][1:] == part[1:]:
      joined[-1] = part._replace(text=joined[-1].text + part.text)
    else:
      joined.append(part)
  return joined


def shown(row: Sequence[Run], colour: bool, indent: str = '  ') -> str:
  r"""A row for reading, each of its lines behind `indent`.

  In colour what is learned is green and pieces are dim; without, ⟦ ⟧ stand
  around what is learned and ⟨ ⟩ around pieces. Where the text itself has such
  a bracket or a backslash, it is escaped.

  >>> print(shown([Run('<s>', False, True), Run('a', True, False)], False))
    ⟨<s>⟩⟦a⟧
  """
  if colour:
    text = ''.join(_coloured(run) for run in row)
  else:
    text = ''
    inside = False
    for run in row:
      if run.learned != inside:
        text += _LEARNED[not run.learned]
        inside = run.learned
      words = visible(run.text)
      text += f'{_PIECE[0]}{words}{_PIECE[1]}' if run.piece else words
    text += _LEARNED[1] if inside else ''
  return '\n'.join(indent + line for line in text.split('\n'))


def _coloured(run: Run) -> str:
  code = (_DIM if run.piece else '') + (_GREEN if run.learned else '')
  if not code:
    return visible(run.text)
  # Line by line: a pager forgets the colour at a line's end.
  return '\n'.join(
    f'{code}{line}{_PLAIN}' if line else ''
    for line in visible(run.text).split('\n')
  )


def visible(text: str, keep: str = '\n') -> str:
  r"""Text that a terminal shows as it stands, everything else escaped.

  >>> visible('a\x1b[31m\\n é')
  'a\\x1b[31m\\\\n é'
  """
  return ''.join(c if c in keep or _is_plain(c) else _escape(c) for c in text)


def _is_plain(character: str) -> bool:
  if character in _ESCAPED:
    return False
  # Controls, formats (the direction of writing among them), surrogates,
  # private and unassigned characters; separators of lines and paragraphs.
  kind = unicodedata.category(character)
  return kind[0] != 'C' and kind not in ('Zl', 'Zp')


def _escape(character: str) -> str:
  return '\\\\' if character == '\\' else ascii(character)[1:-1]
