"""Rows into packs.

Reference: best-fit decreasing as its definition says it, in quadratic time.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_train.data.packing import best_fit, pack_rows
from lorax_train.data.source import read_rows
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows


def naive(lengths, capacity):
  bins = []
  for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    fits = [
      (capacity - sum(lengths[i] for i in items) - lengths[item], at)
      for at, items in enumerate(bins)
    ]
    fits = [(left, at) for left, at in fits if left >= 0]
    if not fits:
      bins.append([])
      fits = [(0, len(bins) - 1)]
    bins[min(fits)[1]].append(item)
  return [sorted(items) for items in bins]


@settings(deadline=None)
@given(
  st.integers(1, 30).flatmap(
    lambda capacity: st.tuples(
      st.lists(st.integers(1, capacity), max_size=60), st.just(capacity)
    )
  )
)
def test_packs_are_best_fit_decreasing_and_a_partition(drawn):
  lengths, capacity = drawn
  packs = best_fit(lengths, capacity)
  assert packs == naive(lengths, capacity)
  assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)


def test_packs_never_change():
  """Written out once: a resumed run must meet them on any machine or numpy."""
  lengths = [3, 9, 4, 1, 7, 6, 3, 5, 2, 10, 3, 6]
  assert best_fit(lengths, 10) == [
    [9], [1, 3], [0, 4], [2, 5], [6, 11], [7, 8, 10],
  ]  # fmt: skip


def test_packs_hold_the_numbers_of_the_rows():
  packs = pack_rows([4, 3, 1, 5], 8, np.array([2, 3, 5, 7]))
  assert packs.rows == [[3, 7], [2, 5]]
  assert packs.summary() == 'packed 4 rows into 2 of 8 tokens, padding 18.8 %'


def test_a_row_too_long_for_a_pack():
  with pytest.raises(ValueError, match='row 1 has 9 tokens, a pack 8'):
    best_fit([8, 9], 8)


def test_little_of_a_real_set_is_padding(shared):
  tokenizer = load_tokenizer(shared / 'tokenizers' / 'mistral-v1')
  path = str(shared / 'data' / 'alpaca_gpt4_999.json')
  rows = tokenize_rows(read_rows(path), 'alpaca', tokenizer, 512)
  lengths = [len(ids) for ids in rows.ids]
  packs = pack_rows(lengths, 512, np.arange(len(lengths)))
  assert len(packs.rows) == len(naive(lengths, 512))
  assert 1 - packs.tokens / (len(packs.rows) * 512) < 0.03
  assert 1 - packs.tokens / (len(lengths) * 512) > 0.2
