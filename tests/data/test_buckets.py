"""Batches of rows of about one length.

Reference: the same order built bucket by bucket in plain lists, and for an
epoch that it is a partition of its rows.
"""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_train.data.batches import (
  BATCHES,
  EMPTY,
  row_order,
  shuffled,
  walk_of,
)
from lorax_train.data.buckets import Buckets, bounds_for
from lorax_train.data.mixture import Mixture


def buckets_of(lengths, bounds, global_batch, seed=3):
  lengths = np.array(lengths)
  walk = walk_of(len(lengths), seed)
  return Buckets(walk, lengths, bounds, global_batch, seed)


def naive_epoch(lengths, bounds, global_batch, seed, epoch):
  """[(rows, bound)] before the batches are shuffled."""
  waiting = list(row_order(len(lengths), seed, epoch))
  batches, left = [], []
  for low, bound in zip([0, *bounds], bounds, strict=False):
    left = [
      i for i in waiting if i in left or low < lengths[i] <= bound
    ]  # in the walk's order
    while len(left) >= global_batch:
      batches.append((left[:global_batch], bound))
      left = left[global_batch:]
  if left:
    fill = [EMPTY] * (global_batch - len(left))
    batches.append((left + fill, bounds[-1]))
  return batches


@settings(deadline=None)
@given(
  lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80),
  wanted=st.sets(st.integers(2, 60), min_size=1, max_size=4),
  global_batch=st.integers(1, 20),
  epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once_in_its_bucket(
  lengths, wanted, global_batch, epoch
):
  bounds = bounds_for(np.array(lengths), sorted(wanted), 64)
  order = buckets_of(lengths, bounds, global_batch)
  n = order.n_batches
  assert n == -(-len(lengths) // global_batch)
  got = [order.at(epoch * n + i) for i in range(n)]
  rows = np.concatenate([rows for rows, _ in got])
  assert sorted(rows[rows != EMPTY]) == list(range(len(lengths)))
  for batch, bound in got:
    assert bound in bounds
    assert all(lengths[i] <= bound for i in batch if i != EMPTY)
  want = naive_epoch(lengths, bounds, global_batch, 3, epoch)
  shuffle = shuffled(n, 3, BATCHES, epoch)
  assert [(r.tolist(), b) for r, b in got] == [want[i] for i in shuffle]


def test_what_is_left_moves_up():
  # 5 short rows and 3 long ones in batches of 4: one short one goes along.
  order = buckets_of([3, 3, 3, 3, 3, 9, 9, 9], (4, 10), 4)
  got = dict((bound, rows) for rows, bound in map(order.at, range(2)))
  assert set(got) == {4, 10}
  assert (got[4] < 5).all()
  assert sorted(got[10])[1:] == [5, 6, 7]
  # 4 x 4 + 4 x 10 tokens of room hold 15 + 27.
  text = 'in buckets of 4, 10 tokens, padding 25.0 %'
  assert order.summary() == text


def test_fewer_rows_than_a_batch():
  rows, length = buckets_of([3, 9, 2], (4, 10), 5).at(7)
  assert length == 10
  assert sorted(rows.tolist()) == [EMPTY, EMPTY, 0, 1, 2]


@pytest.mark.parametrize(
  ('lengths', 'bounds', 'want'),
  [
    ([5, 130, 500], [128, 256, 512], (128, 256, 512)),
    ([5, 130, 200], [128, 256, 512], (128, 256)),  # none so long
    ([5, 500], [512, 256, 128], (128, 512)),  # none between; in any order
    ([5, 700], [128], (128, 768)),  # one that holds the longest
    ([700], [128, 256], (768,)),
    ([128, 129], [128, 256], (128, 256)),
  ],
)
def test_the_buckets_that_are_of_use(lengths, bounds, want):
  assert bounds_for(np.array(lengths), bounds, 768) == want


def test_a_mixture_in_buckets_keeps_its_shares():
  lengths = np.r_[np.full(30, 10), np.full(90, 20)]
  mixture = Mixture((30, 90), (0.5, 0.5), seed=1)
  order = Buckets(mixture.between, lengths, (10, 20), 8, 1)
  for epoch in range(3):
    got = [order.at(epoch * 15 + i) for i in range(15)]
    rows = np.concatenate([r for r, _ in got])
    walk = mixture.between(epoch * 120, 120)
    assert sorted(rows[rows != EMPTY]) == sorted(walk)


def test_the_order_never_changes():
  """Written out once: a resumed run must meet it on any machine or numpy."""
  lengths = 9 + np.arange(5000) * 7919 % 491
  order = buckets_of(lengths, (128, 256, 512), 64, seed=0)
  digest = hashlib.sha256()
  for step in range(200):
    rows, length = order.at(step)
    digest.update(rows.astype('<i8').tobytes() + length.to_bytes(8, 'little'))
  assert digest.hexdigest() == (
    '99408f8ea49788c507610c320fc5f3cd15639228e76749ead7b10115a3069a7b'
  )
