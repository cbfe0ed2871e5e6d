"""Format strings over the columns of a row, as templates."""

import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorax_train.data import choices
from lorax_train.data.choices import Choices
from lorax_train.data.problems import RowError, check_text, shorten
from lorax_train.errors import DataError

# In a format string: where the prompt ends and what is learned begins.
LEARN = '|'

# Behind a column's name and a colon: without the white space around its text.
STRIP = 'strip'

EXAMPLE = "'Q: {question} A:{|} {answer}'"


class Example(NamedTuple):
  """What the model reads, and what it learns to write."""

  prompt: str
  completion: str


Render = Callable[[Mapping[str, Any]], Example | Choices]


def formatted(template: str) -> Render:
  """A format string over the columns of a row as a template.

  `{name}` is the text of that column, as it stands; `{{` and `}}` are braces.
  `{|}` stands once: what is before it is the prompt, what is after it is
  learned. There are no conversions, attributes or indices: what is between the
  braces is the name of a column, to the letter. `{name:strip}` is its text
  without the white space around it. One column behind `{|}` may list its values
  and the word that stands for each, `{name:0=bad,1=good}`, or values that stand
  for themselves, `{name:yes,no}`: these are the texts to choose from.

  >>> formatted('{{{q}}} ={|} {a}')({'q': '1+1', 'a': '2'})
  Example(prompt='{1+1} =', completion=' 2')
  >>> formatted('{s:strip} So{|} {a:0=bad,1=good}')({'s': 'It is ', 'a': 1})
  Choices(prompt='It is So', choices=(' bad', ' good'), answer=1)

  Raises:
    DataError: braces that don't match, an unknown spec, no {|} or several.
  """
  before, after = _halves(template)
  listed = [p for p in after if p.words]

  def render(fields: Mapping[str, Any]) -> Example | Choices:
    prompt = _filled(before, fields)
    if not listed:
      return Example(prompt, _filled(after, fields))
    name, words = listed[0].name or '', listed[0].words
    answer = choices.index_of(name, raw(fields, name), words)
    texts = [_filled(after, fields, word) for word in words.values()]
    return choices.checked(prompt, texts, answer)

  return render


class _Piece(NamedTuple):
  """Text as it stands, and the column after it, if any."""

  text: str
  name: str | None
  strip: bool = False
  words: Mapping[str, str] = {}


def n_choices(template: str) -> int:
  """How many choices a row of this format string has; 0 for none."""
  _, after = _halves(template)
  return max(len(p.words) for p in after)


def _halves(template: str) -> list[list[_Piece]]:
  halves: list[list[_Piece]] = [[]]
  try:
    for literal, name, spec, conversion in string.Formatter().parse(template):
      words = choices.words_of(spec or '')
      known = spec == STRIP or words
      if conversion or (spec and (name == LEARN or not known)):
        sign = f'!{conversion}' if conversion else f':{spec}'
        raise ValueError(
          f'{sign!r} behind column {name!r}; only its name may stand there,'
          f' :{STRIP}, or what to choose from, {choices.EXAMPLE}'
        )
      if name == '':
        raise ValueError('{} names no column; a brace itself is written twice')
      own = None if name == LEARN else name
      halves[-1].append(_Piece(literal, own, spec == STRIP, words))
      if name == LEARN:
        halves.append([])
  except ValueError as error:
    raise unusable(template, shorten(str(error), 160)) from None
  if len(halves) != 2:
    n = f'{len(halves) - 1} times' if len(halves) > 1 else 'nowhere'
    raise unusable(
      template,
      f'{{|}} stands {n}; put it once, where what is learned begins: {EXAMPLE}',
    )
  if not any(p.name for p in halves[1]):
    raise unusable(template, 'there is no column after {|}, to be learned')
  if any(p.words for p in halves[0]):
    raise unusable(template, 'choices stand before {|}; they are learned')
  if sum(bool(p.words) for p in halves[1]) > 1:
    raise unusable(template, 'two columns list choices; one may')
  return halves


def _filled(
  pieces: list[_Piece], fields: Mapping[str, Any], word: str = ''
) -> str:
  """The text of some pieces; `word` is that of the column with choices."""

  def text_of(p: _Piece) -> str:
    if p.name is None or p.words:
      return word if p.words else ''
    value = column(fields, p.name)
    return value.strip() if p.strip else value

  return ''.join(p.text + text_of(p) for p in pieces)


def unusable(name: str, cause: str) -> DataError:
  """That a template is none."""
  return DataError(f'data.template={shorten(repr(name))}: {cause}')


def column(fields: Mapping[str, Any], name: str) -> str:
  """The text of a column.

  Raises:
    RowError: there is none.
  """
  value = raw(fields, name)
  check_text(f'column {name!r}', value)
  return value


def raw(fields: Mapping[str, Any], name: str) -> Any:
  """A column, whatever it holds.

  Raises:
    RowError: there is none.
  """
  if name not in fields:
    columns = ', '.join(map(repr, fields))
    raise RowError(f'no column {name!r}', shorten(f'columns: {columns}', 120))
  return fields[name]
