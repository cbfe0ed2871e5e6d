"""Mistral's own chat formats, encoded piece by piece as mistral-common does.

    v1          <s> "[INST] hi [/INST]" "answer" </s>
    v3          <s> [INST] "hi" [/INST] "answer" </s>
    v3-Tekken   the same tokens, of a tokenizer that adds no spaces

What stands in quotes is encoded by itself, so that sentencepiece puts its dummy
space before each. In v1 the marks are text, in v3 tokens of their own. The
system prompt stands before the first user message in v1, before the last in v3.
Jinja templates write one text and can only come near; the ids here are those of
mistral-common 1.9.1 in its mode for fine-tuning, which tests compare. (1.13.1
differs in one thing: of user messages in a row it leaves out empty ones.)
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorax_train.data.conversation import Conversation
from lorax_train.data.problems import RowError
from lorax_train.errors import ModelError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

V1, V3, TEKKEN = 'mistral_v1', 'mistral_v3', 'mistral_v3_tekken'
FORMATS = (V1, V3, TEKKEN)

# A text to be encoded by itself, or an id; and whether it is learned.
Piece = tuple[str | int, bool]

_JOIN = '\n\n'


def check(name: str, tokenizer: 'Tokenizer') -> None:
  """Refuses a tokenizer that the format was not made for.

  Raises:
    ModelError: it says which format fits, where one does.
  """
  if name not in (formats := fitting(tokenizer)):
    raise ModelError(
      f'data.template={name}: not the format of {tokenizer.folder}'
      f' ({_why(name, tokenizer)}); its tokenizer fits {" or ".join(formats)}'
    )


def pieces(
  conversation: Conversation, name: str, tokenizer: 'Tokenizer'
) -> Iterator[Piece]:
  """What a conversation is made of in a format, from BOS to the last EOS.

  Messages of one role in a row are joined by an empty line, as are all system
  messages; before an assistant's that comes first stands an empty user message.

  Raises:
    RowError: there are tools, or a system message behind an assistant's.
  """
  if tokenizer.bos_id is not None:
    yield tokenizer.bos_id, False
  system, turns = _turns(conversation)
  users = [n for n, (role, _) in enumerate(turns) if role == 'user']
  with_system = users[0] if name == V1 else users[-1]
  for n, (role, content) in enumerate(turns):
    if role == 'assistant':
      # A space at the end would be one that generation has to unlearn.
      yield content if name == V1 else content.rstrip(' '), True
      yield tokenizer.eos_id, True
      continue
    if n == with_system and system:
      content = f'{system}{_JOIN}{content}'
    if name == V1:
      yield f'[INST] {content} [/INST]', False
    else:
      yield tokenizer.special['[INST]'], False
      yield content, False
      yield tokenizer.special['[/INST]'], False


def _turns(conversation: Conversation) -> tuple[str, list[tuple[str, str]]]:
  """The system prompt, and (role, content) beginning with a user's."""
  if conversation.tools:
    raise RowError("this template reads no column 'tools'")
  previous = ''
  for n, message in enumerate(conversation.messages, start=1):
    role, where = message['role'], f'message {n}'
    if role == 'tool' or 'tool_calls' in message:
      raise RowError('this template has no tools', where)
    if (previous, role) == ('assistant', 'system'):
      raise RowError('a system message after an assistant message', where)
    previous = role
  by_role = groupby(conversation.messages, lambda message: message['role'])
  joined = [(role, _JOIN.join(_contents(some))) for role, some in by_role]
  system = _JOIN.join(
    filter(
      None, _contents(m for m in conversation.messages if m['role'] == 'system')
    )
  )
  turns = [(role, content) for role, content in joined if role != 'system']
  if turns[0][0] != 'user':
    turns.insert(0, ('user', ''))
  return system, turns


def _contents(messages: Iterable[dict[str, Any]]) -> list[str]:
  return [message['content'] for message in messages]


def fitting(tokenizer: 'Tokenizer') -> tuple[str, ...]:
  """The formats that a tokenizer can be meant for."""
  if not {'[INST]', '[/INST]'} <= tokenizer.special.keys():
    return (V1,)
  return (V3,) if _adds_space(tokenizer) else (TEKKEN,)


def _adds_space(tokenizer: 'Tokenizer') -> bool:
  [ids] = tokenizer.encode(['a'])
  return bool(ids) and tokenizer.piece(ids[0]).startswith('▁')


def _why(name: str, tokenizer: 'Tokenizer') -> str:
  if '[INST]' not in tokenizer.special:
    return '[INST] is no token there'
  if name == V1:
    return '[INST] is a token there'
  return f'it puts {"a" if name == TEKKEN else "no"} space before a text'
