"""Reading conversations: what is taken, and each thing that is refused.

Reference: the rows written out beside what they are to give.
"""

import datetime
import decimal
import json

import pytest

from lorax_train.data.conversation import read
from lorax_train.data.problems import RowError
from lorax_train.data.tokenized import rendered_texts

from .toys import rows_of

U, A = {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}
HUMAN, GPT = {'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Yo'}

# (template, row, messages)
READ = [
  ('chat', {'messages': [U, A]}, [U, A]),
  ('chat', {'conversations': [HUMAN, GPT]}, [U, A]),
  ('chat', {'conversations': [U, A], 'messages': None}, [U, A]),
  ('chat', {'messages': [HUMAN, A]}, [U, A]),
  ('chat', {'messages': [U, A], 'conversations': [GPT]}, [U, A]),
  ('sharegpt', {'messages': [U, U], 'conversations': [HUMAN, GPT]}, [U, A]),
  ('mistral_v1', {'conversations': [HUMAN, GPT]}, [U, A]),
  ('chat', {'messages': [{**U, 'from': None, 'value': None}, A]}, [U, A]),
  ('chat', {'messages': [{**HUMAN, 'role': None, 'content': None}, A]}, [U, A]),
  ('chat', {'messages': [U, {**A, 'weight': 1}]}, [U, {**A, 'weight': 1}]),
  ('chat', {'messages': [{'role': 'system', 'content': ''}, U, A], 'id': 3},
   [{'role': 'system', 'content': ''}, U, A]),
  # The other layout's keys are not the message's.
  ('chat', {'messages': [{**HUMAN, 'role': 'robot', 'content': 'No'}, A]},
   [U, A]),
  # Nothing after the last answer can be learned or seen by what is.
  ('chat', {'messages': [U, A, U, U]}, [U, A]),
]  # fmt: skip


@pytest.mark.parametrize(('template', 'fields', 'want'), READ)
def test_reading(template, fields, want):
  before = json.dumps(fields)
  assert read(fields, template).messages == want
  assert json.dumps(fields) == before


# (template, row, reason, detail)
REFUSED = [
  ('chat', {'text': 'x'}, "no column 'messages' or 'conversations'",
   "columns: 'text'"),
  ('sharegpt', {'messages': [U, A]}, "no column 'conversations'",
   "columns: 'messages'"),
  ('chat', {'messages': None},
   "column 'messages' is null, not a list of messages", ''),
  ('chat', {'messages': 'Hi'},
   "column 'messages' is str, not a list of messages", ''),
  ('chat', {'messages': {'role': 'user'}},
   "column 'messages' is dict, not a list of messages", ''),
  ('chat', {'messages': []}, "column 'messages' has no messages", ''),
  ('chat', {'messages': [U, 'Yo']}, 'a message is not an object',
   'message 2: str'),
  ('chat', {'messages': [U, None]}, 'a message is not an object',
   'message 2: null'),
  ('chat', {'messages': [U, {'content': 'x'}]},
   "a message has no 'role' or 'from'", 'message 2'),
  ('sharegpt', {'conversations': [U, A]}, "a message has no 'from'",
   'message 1'),
  ('chat', {'messages': [{'role': 'robot', 'content': 'x'}]}, 'unknown role',
   "message 1: 'robot'; known: system, user, human, assistant, gpt, tool"),
  ('chat', {'messages': [{'role': ['user'], 'content': 'x'}]}, 'unknown role',
   "message 1: ['user']; known: system, user, human, assistant, gpt, tool"),
  ('chat', {'messages': [U, {'role': 'assistant'}]},
   "a message has no 'content'", 'message 2'),
  ('chat', {'conversations': [{'from': 'gpt'}]}, "a message has no 'value'",
   'message 1'),
  ('chat', {'messages': [U, {'role': 'assistant', 'content': None}]},
   "a message's content is not a string", 'message 2: null'),
  ('chat', {'messages': [{'role': 'user', 'content': [{'text': 'x'}]}, A]},
   "a message's content is not a string", 'message 1: list'),
  ('chat', {'messages': [{'role': 'user', 'content': 3}, A]},
   "a message's content is not a string", 'message 1: int'),
  ('chat', {'messages': [{'role': 'user', 'content': '\ud800'}, A]},
   'a text holds a lone surrogate', 'message 1'),
  ('chat', {'messages': [U, {**A, 'x': [{'\udfff': 1}]}]},
   'a text holds a lone surrogate', 'message 2'),
  ('chat', {'messages': [U, A], 'tools': ['\ud800']},
   'a text holds a lone surrogate', "column 'tools'"),
  ('chat', {'messages': [U, A], 'tools': 'f'}, "column 'tools' is not a list",
   'str'),
  ('chat', {'messages': [U, {'role': 'assistant', 'content': ' \n'}]},
   'an empty assistant message', 'message 2'),
  ('chat', {'messages': [U, {**A, 'weight': 0}]}, 'a weight other than 1',
   'message 2: 0'),
  ('chat', {'messages': [U]}, 'no assistant message', ''),
]  # fmt: skip


@pytest.mark.parametrize(('template', 'fields', 'reason', 'detail'), REFUSED)
def test_what_is_refused(template, fields, reason, detail):
  with pytest.raises(RowError) as caught:
    read(fields, template)
  assert (caught.value.reason, caught.value.detail) == (reason, detail)


def test_values_that_only_arrow_has_are_their_texts():
  day = datetime.date(2024, 7, 26)
  fields = {
    'messages': [{**U, 'at': day, 'by': [('k', b'x')]}, A],
    'tools': [{'since': day, 'cost': decimal.Decimal('1.50'), 'on': True}],
  }
  conversation = read(fields)
  assert conversation.messages[0] == {
    **U,
    'at': '2024-07-26',
    'by': [['k', "b'x'"]],
  }
  assert conversation.tools == [
    {'since': '2024-07-26', 'cost': '1.50', 'on': True}
  ]


def test_the_texts_that_two_tokenizer_files_are_tried_on():
  rows = rows_of({'messages': [U, A, U]}, {'messages': 3}, {'messages': [A]})
  assert rendered_texts(rows, 'mistral_v1', 2) == ['Hi', 'Yo']
  assert rendered_texts(rows, 'chat', 3) == ['Hi', 'Yo', 'Yo']
