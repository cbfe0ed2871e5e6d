"""Conversations as data sets hold them.

    {"messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi"},
                       {"from": "gpt", "value": "Hello."}]}

the first as OpenAI's fine-tuning files have it, the second as ShareGPT's.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lorax_train.data.problems import RowError, shorten

# The column of ShareGPT's; the template of that name reads no other.
SHAREGPT = 'sharegpt'

_COLUMNS = ('messages', 'conversations')
_ROLES = {
  'system': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'tool': 'tool',
}


# The keys of both layouts: those of the other one say nothing.
_OWN = ('role', 'content', 'from', 'value')


class Conversation(NamedTuple):
  """Messages up to the last of the assistant's.

  Attributes:
    messages: each {'role', 'content'} and whatever else the row says of it.
    tools: the row's column `tools`, None where there is nothing in it.
  """

  messages: list[dict[str, Any]]
  tools: list[Any] | None


def read(fields: Mapping[str, Any], template: str = 'chat') -> Conversation:
  """The conversation of a row.

  Messages after the assistant's last are left out: nothing in them is learned,
  and nothing that is learned can see them. Nulls beside role and content count
  as absent: Arrow writes them into every message that lacks what another has.

  >>> read({'conversations': [{'from': 'gpt', 'value': 'Hi'}]}).messages
  [{'role': 'assistant', 'content': 'Hi'}]

  Args:
    fields: of the row.
    template: `sharegpt` takes the column `conversations` and its layout alone;
      any other takes either column (`messages` where both are), and either
      layout in it.

  Raises:
    RowError: with the number of the message.
  """
  strict = template == SHAREGPT
  found = _listed(fields, _COLUMNS[1:] if strict else _COLUMNS)
  messages = [_message(n, m, strict) for n, m in enumerate(found, start=1)]
  answers = [n for n, m in enumerate(messages) if m['role'] == 'assistant']
  if not answers:
    raise RowError('no assistant message')
  tools = _plain(fields.get('tools'))
  if tools is not None and not isinstance(tools, list):
    raise RowError("column 'tools' is not a list", type(tools).__name__)
  _check_texts("column 'tools'", tools)
  return Conversation(messages[: answers[-1] + 1], tools or None)


def texts_of(value: Any) -> Iterator[str]:
  """Every string in a JSON value, keys of objects too."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, inner in value.items():
      yield str(key)
      yield from texts_of(inner)
  elif isinstance(value, list):
    for inner in value:
      yield from texts_of(inner)


def _listed(fields: Mapping[str, Any], columns: tuple[str, ...]) -> list[Any]:
  for column in columns:
    value = fields.get(column)
    if value is None:
      continue
    if not isinstance(value, list):
      kind = type(value).__name__
      raise RowError(f'column {column!r} is {kind}, not a list of messages')
    if not value:
      raise RowError(f'column {column!r} has no messages')
    return value
  present = [c for c in columns if c in fields]
  if present:
    raise RowError(f'column {present[0]!r} is null, not a list of messages')
  known = ', '.join(map(repr, fields))
  raise RowError(
    f'no column {" or ".join(map(repr, columns))}',
    shorten(f'columns: {known}', 120),
  )


def _message(n: int, value: Any, strict: bool) -> dict[str, Any]:
  where = f'message {n}'
  if not isinstance(value, Mapping):
    kind = 'null' if value is None else type(value).__name__
    raise RowError('a message is not an object', f'{where}: {kind}')
  given = {
    key: inner
    for key, inner in value.items()
    if inner is not None or key in ('content', 'value')
  }
  keys = ('from', 'value') if strict or 'from' in given else ('role', 'content')
  if keys[0] not in given:
    expected = "'from'" if strict else "'role' or 'from'"
    raise RowError(f'a message has no {expected}', where)
  role = given.pop(keys[0])
  if not isinstance(role, str) or role not in _ROLES:
    raise RowError(
      'unknown role',
      f'{where}: {shorten(repr(role), 40)}; known: {", ".join(_ROLES)}',
    )
  if keys[1] not in given:
    raise RowError(f'a message has no {keys[1]!r}', where)
  content = given.pop(keys[1])
  if content is None and given.get('tool_calls'):
    content = ''  # as OpenAI's API writes a message that only calls
  if not isinstance(content, str):
    kind = 'null' if content is None else type(content).__name__
    raise RowError(f"a message's {keys[1]} is not a string", f'{where}: {kind}')
  others = {k: _plain(v) for k, v in given.items() if k not in _OWN}
  message = {'role': _ROLES[role], 'content': content, **others}
  if others.get('weight', 1) != 1:
    raise RowError(
      'a weight other than 1', f'{where}: {shorten(repr(others["weight"]), 40)}'
    )
  _check_texts(where, message)
  if message['role'] == 'assistant' and not (
    content.strip() or others.get('tool_calls')
  ):
    raise RowError('an empty assistant message', where)
  return message


def _plain(value: Any) -> Any:
  """A value as JSON has it; what Arrow has besides, such as dates, as text."""
  if isinstance(value, Mapping):
    return {str(key): _plain(inner) for key, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(inner) for inner in value]
  known = value is None or isinstance(value, (str, int, float))
  return value if known else str(value)


def _check_texts(where: str, value: Any) -> None:
  try:
    for text in texts_of(value):
      text.encode()
  except UnicodeEncodeError as error:
    raise RowError('a text holds a lone surrogate', where) from error
