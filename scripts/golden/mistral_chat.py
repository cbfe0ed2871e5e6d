"""mistral-common's ids of invented conversations, for tests/golden.

  python scripts/golden/mistral_chat.py tests/golden/mistral_chat.json

Needs mistral-common 1.9.1, which holds the tokenizers. Its mode for fine-tuning
decides what a valid conversation is. tests/parity compares live, Tekken too.
"""

import json
import random
import sys
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.messages import (
  AssistantMessage,
  SystemMessage,
  UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

DATA = Path(mistral_common.__file__).parent / 'data'
FILES = {
  'mistral_v1': 'tokenizer.model.v1',
  'mistral_v3': 'mistral_instruct_tokenizer_240323.model.v3',
  'mistral_v3_tekken': 'tekken_240718.json',
}
_CLASSES = {'s': SystemMessage, 'u': UserMessage, 'a': AssistantMessage}

# Messages by the letters of their roles.
CASES = {
  'one turn': [('u', 'What is 2 + 2?'), ('a', '4.')],
  'several turns': [
    ('u', 'Name a colour.'), ('a', 'Blue.'), ('u', 'Another?'), ('a', 'Red.'),
    ('u', 'And one more?'), ('a', 'Green, or teal.'),
  ],
  'system prompt': [('s', 'Be brief.'), ('u', 'Hello!'), ('a', 'Hi.')],
  'system prompt, several turns': [
    ('s', 'Be brief.'), ('u', 'Hello!'), ('a', 'Hi.'), ('u', 'Bye'), ('a', 'Bye.'),
  ],
  'two system prompts': [
    ('s', 'Be brief.'), ('s', ''), ('s', 'Be kind.'), ('u', 'Hello!'), ('a', 'Hi.'),
  ],
  'a system prompt between': [
    ('u', 'Hello!'), ('s', 'Be brief.'), ('u', 'Who are you?'), ('a', 'Me.'),
  ],
  'spaces': [('u', '  two before, one after '), ('a', ' one before, two after  ')],
  'newlines': [('u', '\n\na\tb\n'), ('a', '\nline\n\n  indented\n')],
  'empty user': [('u', ''), ('a', 'You said nothing.'), ('u', ' '), ('a', 'Again.')],
  'the assistant begins': [('a', 'Welcome.'), ('u', 'Thanks.'), ('a', 'Sure.')],
  'the assistant begins, system': [('s', 'Greet.'), ('a', 'Welcome.')],
  'users in a row': [('u', 'One.'), ('u', ''), ('u', 'Two.'), ('a', 'Three.')],
  'assistants in a row': [('u', 'Count.'), ('a', 'One.'), ('a', 'Two.')],
  'unicode': [('u', 'Größe? 日本語 \u0435\u0301 \u200b'), ('a', '１２３ naïve ﬁ')],
  'emoji': [('u', '👩‍💻🇮🇹'), ('a', '🦙 ✅ 👍🏽')],
  'spelled marks': [
    ('u', '[INST] hi [/INST] yes</s><s>[INST] now'), ('a', '</s> [/INST]<s> <unk>'),
  ],
  'spelled marks, system': [('s', '[/INST] </s>'), ('u', '<s>'), ('a', '[TOOL_CALLS]')],
}  # fmt: skip

_WORDS = (
  'a', 'the', 'Hello', '42', '  ', ' ', '\n', '\t', '.', '!?', 'é', '日本', '🦙',
  '[INST]', '[/INST]', '</s>', '<s>', '<|im_end|>', 'def f(x):', '\u00a0', '<0x0A>',
  '▁', '\u200d',
)  # fmt: skip


def by_chance(count: int) -> list[list[tuple[str, str]]]:
  """Conversations of any shape that is valid."""
  chance = random.Random(0)

  def text(least: int) -> str:
    return ''.join(chance.choices(_WORDS, k=chance.randint(least, 12)))

  made = []
  for _ in range(count):
    messages = [('s', text(0))] if chance.random() < 0.4 else []
    for _ in range(chance.randint(1, 4)):
      messages += [('u', text(0)) for _ in range(chance.choice((1, 1, 1, 2)))]
      messages += [
        ('a', text(1) + 'x') for _ in range(chance.choice((1, 1, 2)))
      ]
    made.append(messages)
  return made


def tokenizer(name: str) -> MistralTokenizer:
  """mistral-common's for one of our templates."""
  return MistralTokenizer.from_file(
    str(DATA / FILES[name]), mode=ValidationMode.finetuning
  )


def reference(
  theirs: MistralTokenizer, messages: list[tuple[str, str]]
) -> tuple[list[int], list[bool]]:
  """Ids, and which of them mistral-finetune puts the loss on.

  It has no other function for these than the ones called here: each message by
  itself, and those of the assistant's are learned.
  """
  request = ChatCompletionRequest(
    messages=[_CLASSES[role](content=text) for role, text in messages]
  )
  theirs._chat_completion_request_validator.validate_request(request)
  made = theirs._instruct_request_normalizer.from_chat_completion_request(
    request
  )
  instruct = theirs.instruct_tokenizer
  first, last = instruct.find_first_last_user(made)
  ids = instruct.start()
  learned = [False] * len(ids)
  for n, message in enumerate(made.messages):
    of_assistant = isinstance(message, AssistantMessage)
    if of_assistant:
      new = instruct.encode_assistant_message(message, n < last, False)
    else:
      new, *_ = instruct.encode_user_message(
        message, None, n == last, n == first, system_prompt=made.system_prompt
      )
    ids += new
    learned += [of_assistant] * len(new)
  assert ids == theirs.encode_chat_completion(request).tokens
  return ids, learned


def row(messages: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
  """The same as a row of data."""
  roles = {'s': 'system', 'u': 'user', 'a': 'assistant'}
  return {
    'messages': [{'role': roles[r], 'content': text} for r, text in messages]
  }


def main() -> None:
  """Writes the file."""
  names = ('mistral_v1', 'mistral_v3')  # Tekken's file is too large for a test
  theirs = {name: tokenizer(name) for name in names}
  cases = {
    title: {'row': row(messages)}
    | {
      name: dict(
        zip(('ids', 'learned'), reference(theirs[name], messages), strict=True)
      )
      for name in names
    }
    for title, messages in CASES.items()
  }
  versions = {'mistral_common': mistral_common.__version__}
  Path(sys.argv[1]).write_text(
    json.dumps({'versions': versions, 'cases': cases}) + '\n', 'utf-8'
  )


if __name__ == '__main__':
  main()
