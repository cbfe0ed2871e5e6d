"""Texts to choose from: a prompt, what may follow it, and what does."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorax_train.data.problems import RowError, check_text, shorten

EXAMPLE = '{label:0=bad,1=good}'


class Choices(NamedTuple):
  """What the model reads, and texts of which it should find one likeliest.

  Attributes:
    prompt: what all of them follow.
    choices: each glued to the prompt as it stands.
    answer: which of them is right, from 0.
  """

  prompt: str
  choices: tuple[str, ...]
  answer: int


def checked(prompt: str, choices: Any, answer: Any) -> Choices:
  """Choices, of which there are two or more, and no two alike.

  Args:
    prompt: a text.
    choices: list of texts.
    answer: number of the right one, from 0, or its text.

  Raises:
    RowError: what is wrong with them.
  """
  if not isinstance(choices, (list, tuple)):
    kind = 'null' if choices is None else type(choices).__name__
    raise RowError(f"'choices' is {kind}, not a list of texts")
  for text in choices:
    check_text('a choice', text)
    if not text.strip():
      raise RowError('empty choice')
  if len(choices) < 2:
    raise RowError('fewer than two choices', f'{len(choices)}')
  twice = [text for text in choices if choices.count(text) > 1]
  if twice:
    raise RowError('two choices are alike', shorten(repr(twice[0])))
  if isinstance(answer, str):
    if answer not in choices:
      raise RowError("'answer' is no choice", shorten(repr(answer)))
    answer = choices.index(answer)
  if type(answer) is not int:
    kind = 'null' if answer is None else type(answer).__name__
    raise RowError(f"'answer' is {kind}, neither a number nor a choice")
  if not 0 <= answer < len(choices):
    raise RowError("'answer' is out of range", f'{answer} of {len(choices)}')
  return Choices(prompt, tuple(choices), answer)


def words_of(spec: str) -> dict[str, str]:
  """{value: word} of what a format string lists; none where it lists nothing.

  >>> words_of('0=bad,1=good'), words_of('yes, no'), words_of('strip')
  ({'0': 'bad', '1': 'good'}, {'yes': 'yes', 'no': 'no'}, {})

  Raises:
    ValueError: an empty word, or a value that is there twice.
  """
  entries = [entry.strip() for entry in spec.split(',')]
  if len(entries) < 2:
    return {}
  words: dict[str, str] = {}
  for entry in entries:
    value, equals, word = (part.strip() for part in entry.partition('='))
    if not value or bool(equals) != bool(word):
      raise ValueError(f'{entry!r} in {spec!r} is not VALUE=WORD')
    if value in words:
      raise ValueError(f'{value!r} stands twice in {spec!r}')
    words[value] = word or value
  return words


def index_of(name: str, value: Any, words: Mapping[str, str]) -> int:
  """Which of the listed values a column has; of a boolean, true or false.

  >>> index_of('label', 1, {'0': 'bad', '1': 'good'})
  1

  Raises:
    RowError: none of them.
  """
  if isinstance(value, bool):
    value = str(value).lower()
  text = str(value) if isinstance(value, int) else value
  if not isinstance(text, str) or text not in words:
    told = f'{shorten(repr(value))}, listed: {", ".join(words)}'
    raise RowError(f'column {name!r} has a value that is not listed', told)
  return list(words).index(text)
