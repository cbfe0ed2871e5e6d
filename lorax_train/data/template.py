r"""Templates: from the columns of a row to a prompt and its completion.

The loss is on the completion (and on the EOS that tokenize.py puts behind it).
Prompt and completion are glued together as they stand: a space or newline
between them belongs to one of the two.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lorax_train.data.problems import RowError, shorten
from lorax_train.errors import DataError

# Rows that hold `input_ids` (and `labels`) have nothing to render:
# tokenize_rows takes them as they are.
TOKENS = 'tokens'


class Example(NamedTuple):
  """What the model reads, and what it learns to write."""

  prompt: str
  completion: str


def alpaca(fields: Mapping[str, Any]) -> Example:
  """Stanford Alpaca's two forms, with and without an input.

  No newline after `### Response:`: the completion is glued on, as there.
  """
  instruction = _column(fields, 'instruction')
  context = _optional(fields, 'input')
  if context:
    prompt = (
      'Below is an instruction that describes a task, paired with an input'
      ' that provides further context. Write a response that appropriately'
      ' completes the request.\n\n'
      f'### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n'
      '### Response:'
    )
  else:
    prompt = (
      'Below is an instruction that describes a task. Write a response that'
      ' appropriately completes the request.\n\n'
      f'### Instruction:\n{instruction}\n\n### Response:'
    )
  return Example(prompt, _column(fields, 'output'))


def uno_reverse(fields: Mapping[str, Any]) -> Example:
  """Alpaca turned round: given the answer, write the instruction."""
  prompt = (
    '### Instruction:\nUse the provided input to create an instruction that'
    ' could have been used to generate the response with an LLM.\n\n'
    f'### Input:\n{_column(fields, "output")}\n\n### Response:\n'
  )
  instruction = _column(fields, 'instruction')
  context = _optional(fields, 'input')
  return Example(
    prompt, f'{instruction}\n\n{context}' if context else instruction
  )


def text(fields: Mapping[str, Any]) -> Example:
  """Plain text, all of it learned."""
  return Example('', _column(fields, 'text'))


def prompt_completion(fields: Mapping[str, Any]) -> Example:
  """Columns that already are a prompt and its completion."""
  return Example(_column(fields, 'prompt'), _column(fields, 'completion'))


TEMPLATES: dict[str, Callable[[Mapping[str, Any]], Example]] = {
  'alpaca': alpaca,
  'uno_reverse': uno_reverse,
  'text': text,
  'prompt_completion': prompt_completion,
}


def template_named(name: str) -> Callable[[Mapping[str, Any]], Example]:
  """Looks a template up.

  Raises:
    DataError: no such template; the message lists those there are.
  """
  if name in TEMPLATES:
    return TEMPLATES[name]
  known = [*TEMPLATES, TOKENS]
  near = difflib.get_close_matches(name, known, n=1)
  guess = f'did you mean {near[0]!r}? ' if near else ''
  raise DataError(
    f'data.template={shorten(repr(name))}: no such template; {guess}known:'
    f' {", ".join(known)}'
  )


def _column(fields: Mapping[str, Any], name: str) -> str:
  if name not in fields:
    columns = ', '.join(map(repr, fields))
    raise RowError(f'no column {name!r}', shorten(f'columns: {columns}', 120))
  value = fields[name]
  if not isinstance(value, str):
    kind = 'null' if value is None else type(value).__name__
    raise RowError(f'column {name!r} is {kind}, not a string')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    # JSON can spell half of a surrogate pair; no tokenizer can read it.
    raise RowError(f'column {name!r} holds a lone surrogate') from error
  return value


def _optional(fields: Mapping[str, Any], name: str) -> str:
  # Arrow, and so the hub, turns a value that was not there into null.
  return '' if fields.get(name) is None else _column(fields, name)
