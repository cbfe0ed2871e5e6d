r"""Templates: from the columns of a row to a prompt and its completion.

The loss is on the completion (and on the EOS that tokenize.py puts behind it).
Prompt and completion are glued together as they stand: a space or newline
between them belongs to one of the two.

A template is one of TEMPLATES, a format string or a function of the user's:

    'alpaca'
    'chat'                              conversations: see chat.py
    'Q: {question}\nA:{|} {answer}'     learned from {|} on
    '{text} It was{|} {label:0=bad,1=good}'         texts to choose from
    'mypackage.mymodule:render'         {...} -> {'prompt': ..., 'completion': ...}
"""

import copy
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_train.data import choices, mistral_chat
from lorax_train.data.choices import Choices
from lorax_train.data.conversation import SHAREGPT
from lorax_train.data.format_string import (
  EXAMPLE,
  Example,
  Render,
  column,
  formatted,
  n_choices,
  raw,
  unusable,
)
from lorax_train.data.problems import RowError, check_text, one_line, shorten
from lorax_train.errors import DataError

# Rows that hold `input_ids` (and `labels`) have nothing to render:
# tokenize_rows takes them as they are.
TOKENS = 'tokens'

# What reads rows of messages: chat.py makes ids of them.
CONVERSATIONS = ('chat', SHAREGPT, *mistral_chat.FORMATS)

_FUNCTION = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')


def alpaca(fields: Mapping[str, Any]) -> Example:
  """Stanford Alpaca's two forms, with and without an input.

  No newline after `### Response:`: the completion is glued on, as there.
  """
  instruction = column(fields, 'instruction')
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
  return Example(prompt, column(fields, 'output'))


def uno_reverse(fields: Mapping[str, Any]) -> Example:
  """Alpaca turned round: given the answer, write the instruction."""
  prompt = (
    '### Instruction:\nUse the provided input to create an instruction that'
    ' could have been used to generate the response with an LLM.\n\n'
    f'### Input:\n{column(fields, "output")}\n\n### Response:\n'
  )
  instruction = column(fields, 'instruction')
  context = _optional(fields, 'input')
  return Example(
    prompt, f'{instruction}\n\n{context}' if context else instruction
  )


def text(fields: Mapping[str, Any]) -> Example:
  """Plain text, all of it learned."""
  return Example('', column(fields, 'text'))


def prompt_completion(fields: Mapping[str, Any]) -> Example:
  """Columns that already are a prompt and its completion."""
  return Example(column(fields, 'prompt'), column(fields, 'completion'))


def choice(fields: Mapping[str, Any]) -> Choices:
  """A prompt, texts of which one follows it, and which: `answer`."""
  prompt = column(fields, 'prompt')
  return choices.checked(
    prompt, *(raw(fields, name) for name in ('choices', 'answer'))
  )


TEMPLATES: dict[str, Render] = {
  'alpaca': alpaca,
  'uno_reverse': uno_reverse,
  'text': text,
  'prompt_completion': prompt_completion,
  'choice': choice,
}

# Every name that `data.template` knows.
KNOWN = (*TEMPLATES, *CONVERSATIONS, TOKENS)


def template_named(name: str) -> Render:
  """The template that `data.template` asks for.

  What holds a brace is a format string, what holds a colon is a function;
  anything else is looked up.

  Raises:
    DataError: no such template (the message lists those there are), a format
      string that is none, or a function that can't be had.
  """
  if name in TEMPLATES:
    return TEMPLATES[name]
  if '{' in name or '}' in name:
    return formatted(name)
  if is_function(name):
    return imported(name)
  near = difflib.get_close_matches(name, KNOWN, n=1)
  guess = f'did you mean {near[0]!r}? ' if near else ''
  raise DataError(
    f'data.template={shorten(repr(name))}: no such template; {guess}known:'
    f' {", ".join(KNOWN)}, a format string such as {EXAMPLE}, or'
    ' module:function'
  )


def is_function(name: str) -> bool:
  """Whether `data.template` names a function of the user's."""
  return ':' in name and not ('{' in name or '}' in name)


def count_of(name: str) -> int | None:
  """How many choices a row has by its template; None where rows tell.

  Of a function of the user's nobody knows, and it is taken to give none.

  >>> count_of('{text} It was{|} {label:0=bad,1=good}'), count_of('alpaca')
  (2, 0)
  """
  if name == 'choice':
    return None
  if name in KNOWN or is_function(name):
    return 0
  return n_choices(name)


def imported(name: str) -> Render:
  """A function `module:function` of the user's as a template.

  It is given a row, a dict of its own to do with as it likes, and returns
  {'prompt': str, 'completion': str} or the two as a pair, or a dict of what
  the template `choice` reads. The module is looked for in the working directory
  first. Whatever it raises is told with its name as a row that does not fit.

  Raises:
    DataError: there is no such function, or importing its module fails.
  """
  if not _FUNCTION.fullmatch(name):
    raise unusable(name, 'not module:function; give it like my.module:render')
  module_name, _, function_name = name.partition(':')
  module = _module(name, module_name)
  function = getattr(module, function_name, None)
  if not callable(function):
    known = [n for n, value in vars(module).items() if callable(value)]
    near = difflib.get_close_matches(function_name, known, n=1)
    guess = f', did you mean {near[0]}?' if near else ''
    raise unusable(
      name, f'{module_name} has no function {function_name}{guess}'
    )

  def render(fields: Mapping[str, Any]) -> Example | Choices:
    try:
      answer = function(copy.deepcopy(dict(fields)))
    except (Exception, SystemExit) as error:
      raise RowError(
        f'{name} raised {type(error).__name__}', _told(error)
      ) from error
    return _example(name, answer)

  return render


def _module(name: str, module_name: str) -> Any:
  here = os.getcwd()
  sys.path.insert(0, here)
  importlib.invalidate_caches()  # it may be younger than the last look
  try:
    return importlib.import_module(module_name)
  except (Exception, SystemExit) as error:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f'{module_name}.'.startswith(f'{missing}.'):
      cause = f'no module {missing}, neither in {here} nor installed'
    else:
      cause = f'importing {module_name}: {type(error).__name__} {_told(error)}'
    raise unusable(name, cause.rstrip()) from error
  finally:
    if here in sys.path:
      sys.path.remove(here)


def _told(error: BaseException) -> str:
  """The message, and the line of the user's that it comes from."""
  ours = (__file__, importlib.__file__)
  frames = [
    f
    for f in traceback.extract_tb(error.__traceback__)
    if f.filename not in ours and not f.filename.startswith('<frozen')
  ]
  message = shorten(one_line(str(error)), 120)
  if not frames:
    return message
  place = f'at {Path(frames[-1].filename).name}:{frames[-1].lineno}'
  return f'{message} {place}'.lstrip()


def _example(name: str, answer: Any) -> Example | Choices:
  wanted = 'prompt and completion'
  if isinstance(answer, Mapping):
    if set(answer) == set(Choices._fields):
      check_text(f'the prompt that {name} gave', answer['prompt'])
      return choices.checked(**answer)
    if set(answer) != {'prompt', 'completion'}:
      keys = ', '.join(map(repr, answer)) or 'none'
      raise RowError(
        f'{name} gave a dict, but not of {wanted}', shorten(f'keys: {keys}')
      )
    answer = answer['prompt'], answer['completion']
  if not isinstance(answer, (tuple, list)):
    kind = 'None' if answer is None else type(answer).__name__
    raise RowError(f'{name} gave {kind}, not {wanted}')
  if len(answer) != 2:
    raise RowError(f'{name} gave {len(answer)} values, not {wanted}')
  for what, value in zip(('prompt', 'completion'), answer, strict=True):
    check_text(f'the {what} that {name} gave', value)
  return Example(*answer)


def _optional(fields: Mapping[str, Any], name: str) -> str:
  # Arrow, and so the hub, turns a value that was not there into null.
  return '' if fields.get(name) is None else column(fields, name)
