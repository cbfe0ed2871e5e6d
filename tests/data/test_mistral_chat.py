"""Mistral's chat formats: ids and what is learned.

References: mistral-common's ids (tests/golden/mistral_chat.json, from
scripts/golden/mistral_chat.py) on the real tokenizers; by hand on a toy one.
"""

import json

import pytest

from lorax_train.data.encode import encode_rows
from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.problems import RowError
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import ModelError

from .chats import row
from .toys import ABC_CONFIG, abc_tokenizer, lists, rows_of, write_tokenizer

REAL = {'mistral_v1': 'mistral-v1', 'mistral_v3': 'mistral-v3'}


@pytest.mark.parametrize('name', REAL)
def test_ids_are_those_of_mistral_common(name, shared, golden):
  tokenizer = load_tokenizer(shared / 'tokenizers' / REAL[name])
  content = json.loads((golden / 'mistral_chat.json').read_text('utf-8'))
  cases = content['cases'].values()
  rows = rows_of(*(case['row'] for case in cases))
  for (_, got), case in zip(
    encode_rows(rows, name, tokenizer), cases, strict=True
  ):
    want = case[name]
    assert got.ids == want['ids']
    assert [label != NO_LOSS for label in got.labels] == want['learned']
    assert (got.bos, got.prompt) == (1, want['learned'].index(True) - 1)
  assert len(cases) > 15


@pytest.fixture
def toy_dir(tmp_path):
  """The letters a, b, c and the marks of v3, without a space before a text."""
  tokenizer = abc_tokenizer()
  tokenizer.add_special_tokens(['[INST]', '[/INST]'])
  return write_tokenizer(tmp_path / 'm', tokenizer, tokenizer_config=ABC_CONFIG)


# ids: <unk> 0, <s> 1, </s> 2, a 3, b 4, c 5, ab 6, [INST] 7, [/INST] 8.
@pytest.mark.parametrize(('fields', 'ids', 'learned'), [
  (row('u:a', 'a:ab'), [1, 7, 3, 8, 6, 2], '....++'),
  (row('u:a', 'a:b', 'u:', 'a:c'), [1, 7, 3, 8, 4, 2, 7, 8, 5, 2], '....++..++'),
  (row('a:c', 'u:b'), [1, 7, 8, 5, 2], '...++'),
])  # fmt: skip
def test_the_parts_by_hand(fields, ids, learned, toy_dir):
  made = tokenize_rows(
    rows_of(fields), 'mistral_v3_tekken', load_tokenizer(toy_dir), 99
  )
  labels = [i if sign == '+' else NO_LOSS for i, sign in zip(ids, learned, strict=True)]  # fmt: skip
  assert lists(made) == [(ids, labels)]


def test_truncation_cuts_the_front_up_to_the_first_answer(toy_dir):
  rows = rows_of(row('u:aaac', 'a:b', 'u:a', 'a:c'))
  args = rows, 'mistral_v3_tekken', load_tokenizer(toy_dir)
  whole = tokenize_rows(*args, 99).ids[0].tolist()
  assert len(whole) == 14
  cut = tokenize_rows(*args, 12, 'left').ids[0].tolist()
  assert cut == [1, *whole[3:]]
  short = tokenize_rows(*args, 8, 'left').ids[0].tolist()
  assert short == [1, *whole[7:]]


# (format, files the directory is like, words of the message)
@pytest.mark.parametrize(('name', 'words'), [
  ('mistral_v1', ['[INST] is a token there', 'fits mistral_v3_tekken']),
  ('mistral_v3', ['no space before', 'fits mistral_v3_tekken']),
])  # fmt: skip
def test_a_format_of_another_tokenizer(name, words, toy_dir):
  with pytest.raises(ModelError) as caught:
    list(encode_rows(rows_of(row('u:a', 'a:b')), name, load_tokenizer(toy_dir)))
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize('name', ['mistral_v3', 'mistral_v3_tekken'])
def test_a_tokenizer_without_the_marks(name, sentencepiece_dir):
  tokenizer = load_tokenizer(sentencepiece_dir)
  with pytest.raises(ModelError, match=r'\[INST\] is no token .*mistral_v1'):
    list(encode_rows(rows_of(row('u:a', 'a:b')), name, tokenizer))


@pytest.mark.parametrize(('fields', 'reason', 'detail'), [
  (row('u:a', 'a:b', 's:c', 'a:c'),
   'a system message after an assistant message', 'message 3'),
  ({**row('u:a', 'a:b'), 'tools': [{}]}, "this template reads no column 'tools'", ''),
  ({'messages': [{'role': 'tool', 'content': 'a'}, *row('a:b')['messages']]},
   'this template has no tools', 'message 1'),
])  # fmt: skip
def test_what_the_formats_have_no_place_for(fields, reason, detail, toy_dir):
  [(_, got)] = encode_rows(
    rows_of(fields), 'mistral_v3_tekken', load_tokenizer(toy_dir)
  )
  assert isinstance(got, RowError)
  assert (got.reason, got.detail) == (reason, detail)
