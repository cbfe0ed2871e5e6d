"""Parts of rows that are encoded together: their sizes, told by hand."""

import pytest

from lorax_train.data import encoded
from lorax_train.data.encoded import caught, in_parts
from lorax_train.data.problems import RowError

from .toys import rows_of

LONG = {'text': 'x' * 60}


@pytest.mark.parametrize(
  'rows, sizes',
  [
    ([], []),
    ([{'text': 'x'}] * 7, [3, 3, 1]),
    ([LONG] * 5, [2, 2, 1]),
    ([{'text': 'x' * 100}] * 3, [1, 1, 1]),
    ([{'messages': [{'content': 'x' * 60}]}] * 3, [2, 1]),
    ([{'text': 'x', 'ids': [1] * 1000, 'none': None}] * 4, [3, 1]),
  ],
)
def test_parts_have_few_rows_and_little_text(monkeypatch, rows, sizes):
  monkeypatch.setattr(encoded, '_CHARACTERS', 100)
  parts = list(in_parts(iter(rows_of(*rows)), 3))
  assert [len(part) for part in parts] == sizes
  assert [row for part in parts for row in part] == rows_of(*rows)


def test_a_row_may_be_nested_to_the_limit_of_python():
  nested = 'x'
  for _ in range(100_000):
    nested = [nested]
  assert encoded._characters({'text': 'ab', 'deep': nested}) == 3
  while isinstance(nested, list):  # or taking it apart would recurse
    (nested,) = nested


def test_what_is_nested_too_deep_is_a_bad_row():
  def depth(value):
    return 1 + depth(value[0]) if value else 0

  nested = []
  for _ in range(2_000):
    nested = [nested]
  assert caught(depth, [[]]) == 1
  error = caught(depth, nested)
  assert isinstance(error, RowError) and error.reason == 'nested too deep'
