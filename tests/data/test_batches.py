"""The order of the rows, and batches as arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_train.data import batches
from lorax_train.data.batches import (
  EMPTY,
  eval_batches,
  pad_batch,
  pad_packs,
  row_length,
  row_order,
  shuffled,
  split_held_out,
  take_packs,
  take_rows,
  walk_of,
)
from lorax_train.data.packing import pack_rows
from lorax_train.data.source import Row
from lorax_train.data.tokenize import tokenize_rows
from lorax_train.errors import DataError

_ = -100


def rows_at(step, n_rows, global_batch, seed):
  return walk_of(n_rows, seed)(step * global_batch, global_batch)


def tokenized(n):
  """Row i is the ids i, i + 1 ..., of 2 to 4 tokens."""
  return tokenize_rows(
    [
      Row({'input_ids': list(range(i, i + 2 + i % 3))}, f'a:{i}')
      for i in range(n)
    ],
    'tokens',
    None,
    9,
  )


def test_order_never_changes():
  """Written out once: a resumed run must meet it on any machine or numpy."""
  assert row_order(8, seed=0, epoch=0).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]
  assert row_order(8, seed=0, epoch=1).tolist() == [1, 2, 4, 5, 3, 6, 7, 0]
  assert row_order(8, seed=1, epoch=0).tolist() == [7, 1, 6, 3, 5, 0, 2, 4]
  train, held_out = split_held_out(8, 3, seed=0)
  assert (train.tolist(), held_out.tolist()) == ([1, 2, 4, 5, 6], [0, 3, 7])


def test_order_does_not_depend_on_what_was_asked_before():
  steps = list(range(30))
  forward = [rows_at(step, 7, 4, seed=3).tolist() for step in steps]
  walk = walk_of(7, seed=3)
  backward = [walk(4 * step, 4).tolist() for step in steps[::-1]]
  assert forward == backward[::-1]


@settings(deadline=None)
@given(
  n_rows=st.integers(1, 40),
  global_batch=st.integers(1, 100),
  seed=st.integers(0, 2**63),
  first=st.integers(0, 1000),
)
def test_batches_are_the_epochs_cut_up(n_rows, global_batch, seed, first):
  steps = range(first, first + 4)
  got = np.concatenate([rows_at(s, n_rows, global_batch, seed) for s in steps])
  begin, end = first * global_batch, (first + 4) * global_batch
  epochs = range(begin // n_rows, -(-end // n_rows))
  order = np.concatenate([row_order(n_rows, seed, e) for e in epochs])
  offset = begin - epochs[0] * n_rows
  np.testing.assert_array_equal(got, order[offset : offset + len(got)])
  assert len(got) == 4 * global_batch


@pytest.mark.parametrize('n_rows, global_batch', [(12, 4), (10, 4), (3, 8)])
def test_no_row_is_lost_or_seen_twice_in_an_epoch(n_rows, global_batch):
  seen = np.concatenate(
    [rows_at(step, n_rows, global_batch, seed=5) for step in range(60)]
  )
  epochs = len(seen) // n_rows
  for epoch in seen[: epochs * n_rows].reshape(epochs, n_rows):
    assert sorted(epoch) == list(range(n_rows))


def test_seeds_and_epochs_differ():
  orders = [
    row_order(50, seed, epoch).tolist()
    for seed in range(4)
    for epoch in range(4)
  ]
  assert len({tuple(order) for order in orders}) == 16


def test_an_order_can_not_be_spoiled_by_its_reader():
  walk = walk_of(5, seed=0)
  walk(0, 5)[:] = 7
  assert walk(0, 5).tolist() == row_order(5, 0, 0).tolist()


@pytest.mark.parametrize('n_rows, n_eval', [(10, 0), (10, 3), (10, 9), (1, 0)])
def test_held_out_rows(n_rows, n_eval):
  train, held_out = split_held_out(n_rows, n_eval, seed=1)
  assert len(held_out) == n_eval
  assert sorted([*train, *held_out]) == list(range(n_rows))
  assert train.tolist() == sorted(train)
  assert held_out.tolist() == sorted(held_out)


@pytest.mark.parametrize('n_rows, n_eval', [(10, 10), (10, 11), (10, -1)])
def test_too_many_held_out(n_rows, n_eval):
  with pytest.raises(DataError, match=f'eval.rows={n_eval}: 10 rows can'):
    split_held_out(n_rows, n_eval, seed=1)


@pytest.mark.parametrize(
  'max_length, multiple, expected',
  [(512, 64, 64), (512, 2, 4), (512, 3, 6), (5, 64, 5), (4, 64, 4)],
)
def test_one_length_for_the_run(max_length, multiple, expected):
  # the longest row has 4 tokens
  assert row_length(tokenized(3), max_length, multiple) == expected


def test_pad_batch():
  batch = pad_batch(
    [np.array([5, 6, 7]), np.array([8])],
    [np.array([_, 6, 7]), np.array([8])],
    length=4,
    pad_id=9,
  )
  expected = {
    'ids': np.array([[5, 6, 7, 9], [8, 9, 9, 9]], np.int32),
    'labels': np.array([[_, 6, 7, _], [8, _, _, _]], np.int32),
    'mask': np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.bool_),
  }
  assert batch.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(batch[name], array, strict=True)


def test_a_row_too_long_for_the_batch():
  with pytest.raises(ValueError, match='row 1 has 3 tokens, the batch 2'):
    pad_batch([np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)], 2, 0)


def test_pad_packs():
  # The second row learns its first token, which in a pack nothing predicts.
  rows = [np.array([5, 6, 7]), np.array([8, 9]), np.array([4])]
  labels = [np.array([_, 6, 7]), np.array([8, 9]), np.array([4])]
  batch = pad_packs([rows[:2], rows[2:]], [labels[:2], labels[2:]], 6, 3)
  expected = {
    'ids': np.array([[5, 6, 7, 8, 9, 3], [4, 3, 3, 3, 3, 3]], np.int32),
    'labels': np.array([[_, 6, 7, _, 9, _], [_] * 6], np.int32),
    'mask': np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], np.bool_),
    'segments': np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]], np.int32),
    'positions': np.array([[0, 1, 2, 0, 1, 0], [0] * 6], np.int32),
  }
  assert batch.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(batch[name], array, strict=True)


def test_a_pack_too_long_for_the_batch():
  with pytest.raises(ValueError, match='row 0 has 3 tokens, the batch 2'):
    pad_packs([[np.ones(2), np.ones(1)]], [[np.ones(2), np.ones(1)]], 2, 0)


def test_an_epoch_of_packs_holds_every_row_once():
  indices = np.array([1, 4, 5, 7, 8, 11])
  data = tokenized(12)
  packs = pack_rows([len(data.ids[i]) for i in indices], 7, indices)
  assert packs.rows == [[1, 5], [4, 8], [7, 11]]
  seen = []
  for step in range(3):
    chosen = rows_at(step, 3, 1, seed=2)
    batch = take_packs(data, packs, chosen, pad_id=0)
    assert batch['ids'].shape == (1, 7)
    first = (batch['positions'] == 0) & batch['mask']
    seen.append(batch['ids'][first].tolist())  # row i begins with i
  assert seen == [packs.rows[i] for i in row_order(3, seed=2, epoch=0)]


def test_rows_by_their_numbers():
  batch = take_rows(tokenized(9), np.array([7, EMPTY, 2]), length=5, pad_id=99)
  expected = [[7, 8, 9, 99, 99], [99] * 5, [2, 3, 4, 5, 99]]
  assert batch['ids'].tolist() == expected
  assert batch['mask'].sum(axis=1).tolist() == [3, 0, 4]
  np.testing.assert_array_equal(
    batch['labels'], np.where(batch['mask'], expected, _)
  )


def test_sources_have_orders_of_their_own():
  orders = [row_order(50, 3, e, s).tolist() for e in (0, 1) for s in (0, 1)]
  orders += [row_order(50, 3, e).tolist() for e in (0, 1)]
  assert len({tuple(order) for order in orders}) == 6
  walk = walk_of(50, 3, source=1)
  assert walk(40, 70).tolist() == [
    *orders[1][40:],
    *orders[3],
    *row_order(50, 3, 2, 1)[:10],
  ]
  assert walk(40, 0).tolist() == []


def test_shuffled_never_changes():
  """Written out once, as are the orders of rows above."""
  assert shuffled(8, 0, batches.EPOCH, 0).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]
  assert shuffled(8, 0, batches.SOURCE, 0, 1).tolist() == [
    5,
    1,
    7,
    6,
    3,
    0,
    2,
    4,
  ]
  assert shuffled(8, 0, batches.BLOCK, 0).tolist() == [7, 6, 1, 3, 5, 2, 4, 0]
  assert shuffled(8, 0, batches.BATCHES, 0).tolist() == [6, 5, 1, 4, 3, 2, 0, 7]


def test_eval_batches_hold_every_row_once():
  indices = np.array([0, 2, 3, 5, 6])
  found = list(eval_batches(tokenized(7), indices, 2, length=4, pad_id=9))
  assert [batch['ids'].shape for batch in found] == [(2, 4)] * 3
  ids = np.concatenate([batch['ids'] for batch in found])
  mask = np.concatenate([batch['mask'] for batch in found])
  labels = np.concatenate([batch['labels'] for batch in found])
  assert ids[:5, 0].tolist() == indices.tolist()
  assert (ids[5] == 9).all()
  assert (labels[5] == _).all()
  assert not mask[5].any()
  assert mask[:5].sum(axis=1).tolist() == [2, 4, 2, 4, 2]
  np.testing.assert_array_equal(labels, np.where(mask, ids, _))
  assert list(eval_batches(tokenized(2), np.arange(0), 2, 4, 0)) == []
