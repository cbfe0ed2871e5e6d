"""Rows to ids and labels: tables told by hand, then real rows.

The abc tokenizer of toys.py has the ids <unk> 0, <s> 1, </s> 2, a 3, b 4,
c 5, ab 6.
"""

import dataclasses
import re

import numpy as np
import pytest

from lorax_train.data.source import Row, read_rows
from lorax_train.data.template import TEMPLATES
from lorax_train.data.tokenize import (
  TokenizedSet,
  load_tokenizer,
  tokenize_rows,
)
from lorax_train.errors import ConfigError, DataError, ModelError

from .toys import ABC_CONFIG, abc_tokenizer, lists, rows_of, write_tokenizer

_ = -100


def pairs(*examples):
  return rows_of(*({'prompt': p, 'completion': c} for p, c in examples))


@pytest.mark.parametrize(
  'prompt, completion, ids, labels, merged',
  [
    ('c', 'b', [1, 5, 4, 2], [_, _, 4, 2], 0),
    ('ab', 'c', [1, 6, 5, 2], [_, _, 5, 2], 0),
    ('', 'cc', [1, 5, 5, 2], [_, 5, 5, 2], 0),
    # a + b merge across the boundary: the token is learned
    ('a', 'bc', [1, 6, 5, 2], [_, 6, 5, 2], 1),
    ('cca', 'b', [1, 5, 5, 6, 2], [_, _, _, 6, 2], 1),
    # spelling EOS does not make one
    ('c', '</s>', [1, 5, 0, 0, 0, 0, 2], [_, _, 0, 0, 0, 0, 2], 0),
  ],
)
def test_ids_and_labels(abc_dir, prompt, completion, ids, labels, merged):
  tokenized = tokenize_rows(
    pairs((prompt, completion)),
    'prompt_completion',
    load_tokenizer(abc_dir),
    99,
  )
  assert lists(tokenized) == [(ids, labels)]
  assert tokenized.ids[0].dtype == tokenized.labels[0].dtype == np.int32
  assert list(tokenized.where) == ['a.jsonl:1']
  report = tokenized.report
  assert (report.merged_boundary, report.tokens) == (merged, len(ids))
  assert report.target_tokens == sum(label != _ for label in labels)


def test_no_bos_where_the_model_adds_none(tmp_path):
  folder = write_tokenizer(
    tmp_path / 'm',
    abc_tokenizer(),
    tokenizer_config=ABC_CONFIG | {'add_bos_token': False},
  )
  tokenized = tokenize_rows(
    rows_of({'text': 'ac'}), 'text', load_tokenizer(folder), 9
  )
  assert lists(tokenized) == [([3, 5, 2], [3, 5, 2])]
  # Nothing comes before the first token: it is not a target.
  assert tokenized.report.target_tokens == 2


# What is compared has no EOS.
@pytest.mark.parametrize('template', sorted(TEMPLATES.keys() - {'choice'}))
@pytest.mark.parametrize('pad', ['<unk>', '</s>'])
def test_eos_is_there_and_learned(tmp_path, template, pad):
  folder = write_tokenizer(
    tmp_path / 'm',
    abc_tokenizer(),
    tokenizer_config=ABC_CONFIG | {'pad_token': pad},
  )
  columns = ['instruction', 'input', 'output', 'text', 'prompt', 'completion']
  tokenized = tokenize_rows(
    rows_of(dict.fromkeys(columns, 'abc')),
    template,
    load_tokenizer(folder),
    999,
  )
  ((ids, labels),) = lists(tokenized)
  assert (ids[0], labels[0]) == (1, _)
  assert (ids[-1], labels[-1]) == (2, 2)
  assert ids.count(2) == labels.count(2) == 1


@pytest.mark.parametrize(
  'max_length, truncation, kept, dropped, truncated',
  [
    (7, 'drop', [[1, 5, 5, 5, 6, 3, 2], [1, 6, 2]], {}, 0),
    (6, 'drop', [[1, 6, 2]], {'longer than 6 tokens': 1}, 0),
    (7, 'error', [[1, 5, 5, 5, 6, 3, 2], [1, 6, 2]], {}, 0),
    (6, 'left', [[1, 5, 5, 6, 3, 2], [1, 6, 2]], {}, 1),
    (4, 'left', [[1, 6, 3, 2], [1, 6, 2]], {}, 1),
    (3, 'left', [[1, 6, 2]], {'completion longer than 3 tokens': 1}, 0),
  ],
)
def test_long_rows(abc_dir, max_length, truncation, kept, dropped, truncated):
  tokenized = tokenize_rows(
    pairs(('ccc', 'aba'), ('', 'ab')),
    'prompt_completion',
    load_tokenizer(abc_dir),
    max_length,
    truncation=truncation,
  )
  assert [ids for ids, _ in lists(tokenized)] == kept
  for ids, labels in lists(tokenized):
    n = ids.index(6)
    assert labels == [_] * n + ids[n:]
  report = tokenized.report
  assert (report.dropped, report.truncated) == (dropped, truncated)
  assert report.longest == max(map(len, kept))


def test_long_rows_as_an_error(abc_dir):
  with pytest.raises(DataError) as caught:
    tokenize_rows(
      pairs(('ccc', 'aba'), ('', 'ab'), ('c' * 9, 'a')),
      'prompt_completion',
      load_tokenizer(abc_dir),
      6,
      truncation='error',
    )
  assert str(caught.value) == (
    'over-long rows: 2 rows (2 x longer than 6 tokens), first: a.jsonl:1 (7'
    ' tokens), a.jsonl:3 (12 tokens); raise --config.data.max_length, or set'
    ' --config.data.truncation=drop'
  )


@pytest.mark.parametrize(
  'max_length, kept, cut_off, dropped',
  [
    (7, [[1, 5, 5, 5, 6, 3, 2], [1, 6, 2]], 0, {}),
    (6, [[1, 5, 5, 5, 6, 3], [1, 6, 2]], 1, {}),
    (5, [[1, 5, 5, 5, 6], [1, 6, 2]], 1, {}),
    # nothing of the answer is left
    (4, [[1, 6, 2]], 0, {'nothing to learn': 1}),
    (2, [[1, 6]], 1, {'nothing to learn': 1}),
  ],
)
def test_cut_at_the_end(abc_dir, max_length, kept, cut_off, dropped):
  tokenized = tokenize_rows(
    pairs(('ccc', 'aba'), ('', 'ab')),
    'prompt_completion',
    load_tokenizer(abc_dir),
    max_length,
    truncation='right',
  )
  assert [ids for ids, _ in lists(tokenized)] == kept
  for ids, labels in lists(tokenized):
    n = ids.index(6)
    assert labels == [_] * n + ids[n:]
  report = tokenized.report
  assert (report.cut_off, report.dropped) == (cut_off, dropped)
  assert report.truncated == 0
  said = f'{cut_off} cut at the end, where no EOS is learned'
  assert (said in report.summary()) == bool(cut_off)


BAD = [
  *pairs(('c', 'b'), ('c', ''), ('c', ' \n'), ('c', None), (3, 'b')),
  Row({'prompt': 'c', 'completion': '\ud800'}, 'a.jsonl:6'),
  Row({'prompt': 'c'}, 'a.jsonl:7'),
]


def test_bad_rows_are_told_at_once(abc_dir):
  with pytest.raises(DataError) as caught:
    tokenize_rows(BAD, 'prompt_completion', load_tokenizer(abc_dir), 9)
  assert str(caught.value) == (
    'bad rows: 6 rows (2 x empty completion, 1 x column'
    " 'completion' is null, not a string, 1 x column 'prompt' is int, not a"
    " string, 1 x column 'completion' holds a lone surrogate, 1 x no column"
    " 'completion'), first: a.jsonl:2 empty completion, a.jsonl:3 empty"
    " completion, a.jsonl:4 column 'completion' is null, not a string,"
    " a.jsonl:5 column 'prompt' is int, not a string, a.jsonl:6 column"
    " 'completion' holds a lone surrogate; mend them, or leave them out with"
    ' --config.data.on_bad_row=skip'
  )


def test_bad_rows_are_skipped_and_counted(abc_dir):
  tokenized = tokenize_rows(
    BAD, 'prompt_completion', load_tokenizer(abc_dir), 9, on_bad_row='skip'
  )
  assert lists(tokenized) == [([1, 5, 4, 2], [_, _, 4, 2])]
  assert tokenized.report.dropped == {
    'empty completion': 2,
    "column 'completion' is null, not a string": 1,
    "column 'prompt' is int, not a string": 1,
    "column 'completion' holds a lone surrogate": 1,
    "no column 'completion'": 1,
  }
  assert tokenized.report.summary() == (
    '1 of 7 rows kept; 4 tokens (2 to learn); longest row 4; dropped 2 x empty'
    " completion, 1 x column 'completion' is null, not a string, 1 x column"
    " 'prompt' is int, not a string, 1 x column 'completion' holds a lone"
    " surrogate, 1 x no column 'completion'"
  )


def test_no_row_left(abc_dir):
  tokenizer = load_tokenizer(abc_dir)
  rows = pairs(('c', 'b' * 9), ('', ''), ('c', 'a' * 9))
  with pytest.raises(DataError) as caught:
    tokenize_rows(rows, 'prompt_completion', tokenizer, 5, on_bad_row='skip')
  assert str(caught.value) == (
    'no row is left to train on: dropped 3 rows (2 x longer than 5 tokens, 1 x'
    ' empty completion), first: a.jsonl:2 empty completion, a.jsonl:1 longer'
    ' than 5 tokens (12 tokens), a.jsonl:3 longer than 5 tokens'
  )


def test_a_completion_that_the_tokenizer_normalises_away(abc_dir, tmp_path):
  from tokenizers import normalizers

  tokenizer = abc_tokenizer()
  tokenizer.normalizer = normalizers.Replace('b', '')
  folder = write_tokenizer(
    tmp_path / 'm', tokenizer, tokenizer_config=ABC_CONFIG
  )
  tokenized = tokenize_rows(
    pairs(('c', 'b'), ('c', 'a')),
    'prompt_completion',
    load_tokenizer(folder),
    9,
  )
  assert lists(tokenized) == [([1, 5, 3, 2], [_, _, 3, 2])]
  assert tokenized.report.dropped == {'nothing to learn': 1}


def test_wrong_options(abc_dir):
  tokenizer = load_tokenizer(abc_dir)
  rows = pairs(('c', 'b'))
  with pytest.raises(ConfigError, match="did you mean 'drop'"):
    tokenize_rows(rows, 'text', tokenizer, 9, truncation='dorp')
  with pytest.raises(ConfigError, match='known: error, skip'):
    tokenize_rows(rows, 'text', tokenizer, 9, on_bad_row='x')
  with pytest.raises(DataError, match='no such template'):
    tokenize_rows(rows, 'txet', tokenizer, 9)
  with pytest.raises(ModelError, match='needs a tokenizer'):
    tokenize_rows(rows, 'text', None, 9)


def test_more_rows_than_are_encoded_at_once(abc_dir):
  tokenizer = load_tokenizer(abc_dir)
  texts = ['c' * (1 + n % 5) if n % 7 else '' for n in range(2500)]
  tokenized = tokenize_rows(
    rows_of(*({'text': text} for text in texts)),
    'text',
    tokenizer,
    9,
    on_bad_row='skip',
  )
  good = [(n, text) for n, text in enumerate(texts, start=1) if text]
  assert list(tokenized.where) == [f'a.jsonl:{n}' for n, _ in good]
  assert [len(ids) - 2 for ids in tokenized.ids] == [len(t) for _, t in good]
  assert dataclasses.asdict(tokenized.report) == {
    'rows_read': 2500,
    'rows_kept': len(good),
    'dropped': {'empty completion': 2500 - len(good)},
    'truncated': 0,
    'cut_off': 0,
    'merged_boundary': 0,
    'tokens': sum(len(text) + 2 for _, text in good),
    'target_tokens': sum(len(text) + 1 for _, text in good),
    'longest': 7,
    'choices': 0,
    'longest_choice': 0,
    'dropped_at': {
      'empty completion': [f'a.jsonl:{n}' for n in (1, 8, 15, 22, 29)]
    },
  }


@pytest.mark.parametrize('template', ['alpaca', 'uno_reverse'])
@pytest.mark.parametrize(
  'folder', ['models/stories260K-mistral', 'tokenizers/mistral-v1']
)
def test_learned_ids_spell_the_completion(shared, template, folder):
  rows = read_rows(str(shared / 'data' / 'alpaca_gpt4_999.json'))[:200]
  tokenizer = load_tokenizer(shared / folder)
  tokenized = tokenize_rows(rows, template, tokenizer, 10**6)
  assert isinstance(tokenized, TokenizedSet)
  assert tokenized.report.rows_kept == len(rows)
  examples = [TEMPLATES[template](row.fields) for row in rows]
  prompts = tokenizer.encode([example.prompt for example in examples])
  merged = 0
  for row, example, prompt in zip(
    lists(tokenized), examples, prompts, strict=True
  ):
    ids, labels = row
    n = 1 + len(prompt)
    learned = [label for label in labels if label != _]
    assert ids[-len(learned) :] == learned
    assert learned[-1] == tokenizer.eos_id
    if ids[1:n] != prompt:
      merged += 1
      continue
    assert len(ids) == n + len(learned)
    completion = example.completion
    if 'stories' in folder:  # its normaliser squeezes spaces
      completion = re.sub(' +', ' ', completion).strip(' ')
    assert tokenizer.decode(learned[:-1]) == completion
  assert tokenized.report.merged_boundary == merged
  assert merged < 20
