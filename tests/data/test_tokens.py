"""Rows that already hold ids, and what is asked of any ids."""

import pytest

from lorax_train.data.tokenize import check_ids, tokenize_rows
from lorax_train.errors import DataError

from .toys import lists, rows_of

_ = -100


@pytest.mark.parametrize(
  'fields, ids, labels',
  [
    ({'input_ids': [3, 4]}, [3, 4], [3, 4]),
    ({'input_ids': [3, 4], 'labels': None}, [3, 4], [3, 4]),
    ({'input_ids': [3, 4, 5], 'labels': [_, _, 5]}, [3, 4, 5], [_, _, 5]),
    # labels need not be the ids
    ({'input_ids': [3, 4, 5], 'labels': [_, 9, _]}, [3, 4, 5], [_, 9, _]),
  ],
)
def test_tokens_are_taken_as_they_are(fields, ids, labels):
  tokenized = tokenize_rows(rows_of(fields), 'tokens', None, 9)
  assert lists(tokenized) == [(ids, labels)]


@pytest.mark.parametrize(
  'fields, reason',
  [
    ({'labels': [1]}, "no column 'input_ids'"),
    ({'input_ids': 'ab'}, "column 'input_ids' is not a list of integers"),
    ({'input_ids': [1, 2.0]}, "column 'input_ids' is not a list of integers"),
    ({'input_ids': [1, True]}, "column 'input_ids' is not a list of integers"),
    ({'input_ids': [1, 2], 'labels': [1, None]}, "column 'labels' is not a list of integers"),
    ({'input_ids': []}, "column 'input_ids' is empty"),
    ({'input_ids': [1, 2], 'labels': [1]}, "'input_ids' and 'labels' differ in length"),
    ({'input_ids': [1, -1]}, "column 'input_ids' holds a negative id"),
    ({'input_ids': [1, 2], 'labels': [1, -1]}, "column 'labels' holds a negative other than -100"),
    ({'input_ids': [1, 2**31]}, "column 'input_ids' holds an integer over 32 bits"),
    # sound, but no use: counted, never an error
    ({'input_ids': [1, 2], 'labels': [_, _]}, 'nothing to learn'),
    ({'input_ids': [1, 2], 'labels': [1, _]}, 'nothing to learn'),
    ({'input_ids': [1]}, 'nothing to learn'),
  ],
)  # fmt: skip
def test_tokens_that_are_wrong(fields, reason):
  rows = rows_of({'input_ids': [1, 2]}, fields)
  if reason != 'nothing to learn':
    with pytest.raises(DataError, match=r'a\.jsonl:2') as caught:
      tokenize_rows(rows, 'tokens', None, 9)
    assert f'1 row (1 x {reason})' in str(caught.value)
  tokenized = tokenize_rows(rows, 'tokens', None, 9, on_bad_row='skip')
  assert lists(tokenized) == [([1, 2], [1, 2])]
  assert tokenized.report.dropped == {reason: 1}


@pytest.mark.parametrize(
  'truncation, labels, kept',
  [
    ('drop', None, [[3, 4]]),
    ('left', None, [[3, 4], [5, 6, 7]]),
    ('left', [_, 4, 5, _, _], [[3, 4]]),  # what was to be learned is cut off
  ],
)
def test_long_tokens(truncation, labels, kept):
  rows = rows_of(
    {'input_ids': [3, 4]}, {'input_ids': [3, 4, 5, 6, 7], 'labels': labels}
  )
  tokenized = tokenize_rows(rows, 'tokens', None, 3, truncation=truncation)
  assert [ids for ids, _ in lists(tokenized)] == kept


def test_ids_outside_the_embedding():
  rows = rows_of(
    {'input_ids': [1, 7]},
    {'input_ids': [1, 8, 9]},
    {'input_ids': [1, 2], 'labels': [_, 8]},
  )
  tokenized = tokenize_rows(rows, 'tokens', None, 9)
  check_ids(tokenized, 10)
  with pytest.raises(DataError) as caught:
    check_ids(tokenized, 8)
  assert str(caught.value) == (
    "ids outside the embedding's 8 rows: 2 rows (2 x id outside), first:"
    ' a.jsonl:2 (id 8), a.jsonl:3; encode them with the tokenizer of this'
    ' model'
  )


def test_fingerprint_is_of_ids_and_labels():
  base = {'input_ids': [1, 2, 3], 'labels': [_, 2, 3]}
  sets = [
    rows_of(base),
    rows_of(base | {'labels': [_, _, 3]}),
    rows_of(base | {'input_ids': [1, 2, 4]}),
    rows_of(base, base),
    # the same numbers, cut up in another way
    rows_of({'input_ids': [1, 2], 'labels': [3, 4]}, {'input_ids': [5, 6]}),
    rows_of({'input_ids': [1, 2, 3], 'labels': [4, 5, 6]}),
  ]
  prints = [tokenize_rows(s, 'tokens', None, 9).fingerprint for s in sets]
  assert len(set(prints)) == len(sets)
  again = [row._replace(where='elsewhere:9') for row in sets[0]]
  assert tokenize_rows(again, 'tokens', None, 9).fingerprint == prints[0]
  # Written out once: another machine or release must get the same.
  assert prints[0] == (
    '6e7c0ab60129a16721fd8b6143d375a06f326f24eb3777048fd05744734363ab'
  )
