"""Several sources in fixed proportions.

Reference: the shares themselves in exact fractions, and of each source the walk
that it would have alone.
"""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_train.data import batches, mixture
from lorax_train.data.batches import row_order
from lorax_train.data.mixture import BLOCK_SIZE, Mixture, apportion, shares

_weights = st.lists(
  st.one_of(
    st.floats(1e-6, 1.0), st.integers(1, 9).map(float), st.floats(100, 1e6)
  ),
  min_size=1,
  max_size=9,
)


@pytest.mark.parametrize(
  ('weights', 'want'),
  [
    ([0.7, 0.3], (7, 3)),
    ([70, 30.0], (7, 3)),
    ([1 / 3, 1 / 3], (1, 1)),
    ([0.1, 0.2, 0.7], (1, 2, 7)),
    ([1e-5, 1.0], (1, 100_000)),
    ([5e-324, 5e-324], (1, 1)),
    ([4], (1,)),
  ],
)
def test_weights_are_what_is_written(weights, want):
  assert shares(weights) == want


@settings(deadline=None)
@given(
  parts=_weights.map(shares),
  block=st.integers(1, 50),
  n_blocks=st.integers(1, 300),
)
def test_no_prefix_is_a_draw_away_from_its_share(parts, block, n_blocks):
  before = (0,) * len(parts)
  for n in range(1, n_blocks + 1):
    after = apportion(n * block, parts, before)
    assert sum(after) == n * block
    for part, old, new in zip(parts, before, after, strict=True):
      assert new >= old
      assert abs(new - Fraction(n * block * part, sum(parts))) < 1
    before = after


def test_largest_remainders_would_take_a_draw_back():
  """Why it isn't used: the Alabama paradox, of a source and its tenth draw."""
  parts = (6, 6, 2)

  def largest_remainders(total):
    due = [Fraction(total * part, 14) for part in parts]
    whole = [int(d) for d in due]
    by_rest = sorted(range(3), key=lambda s: whole[s] - due[s])
    for s in by_rest[: total - sum(whole)]:
      whole[s] += 1
    return whole

  assert largest_remainders(10)[2] == 2
  assert largest_remainders(11)[2] == 1
  ten = apportion(10, parts, (0, 0, 0))
  assert apportion(11, parts, ten)[2] >= ten[2]


@pytest.mark.parametrize(
  ('sizes', 'weights'),
  [
    ((7, 2000, 40), (0.5, 0.2, 0.3)),
    ((3, 5), (1, 1)),
    ((900, 60, 1), (1e-4, 1.0, 0.3333)),
    ((11,), (2.0,)),
  ],
)
def test_every_source_walks_its_own_epochs(sizes, weights):
  mixture = Mixture(sizes, weights, seed=5)
  n_blocks = 12
  items = mixture.between(0, n_blocks * BLOCK_SIZE)
  begin = 0
  for s, size in enumerate(sizes):
    own = items[(items >= begin) & (items < begin + size)] - begin
    epochs = range(-(-len(own) // size))
    walk = np.concatenate(
      [np.zeros(0, int), *(row_order(size, 5, e, s) for e in epochs)]
    )
    np.testing.assert_array_equal(own, walk[: len(own)])
    share = Fraction(shares(weights)[s], sum(shares(weights)))
    assert abs(len(own) - share * len(items)) < 1
    begin += size


def test_within_a_block_sources_are_shuffled():
  items = Mixture((100, 100), (1, 1), seed=0).between(0, BLOCK_SIZE)
  second = items >= 100
  assert second.sum() == 512
  assert 450 < (second[1:] != second[:-1]).sum() < 570  # of 1,023


@settings(deadline=None, max_examples=30)
@given(
  begin=st.integers(0, 50_000),
  count=st.integers(1, 3000),
  seed=st.integers(0, 2**63),
  weights=st.sampled_from([(0.7, 0.3), (1 / 3, 0.123456789), (1, 2)]),
)
def test_any_part_is_cut_out_of_the_whole(begin, count, seed, weights):
  sizes = 50, 31
  whole = Mixture(sizes, weights, seed).between(0, begin + count)
  part = Mixture(sizes, weights, seed).between(begin, count)
  np.testing.assert_array_equal(part, whole[begin:])


def test_where_shares_come_out_even_it_begins_anew():
  """After lcm(10, 1024) positions the walk needs no look back."""
  mixture = Mixture((9, 9), (0.7, 0.3), seed=0)
  blocks = 5 * 10**9 + 3
  got = mixture.drawn(blocks)
  assert got == tuple(
    5 * 10**9 * 1024 * part // 10 + few
    for part, few in zip((7, 3), mixture.drawn(3), strict=True)
  )
  assert sum(got) == blocks * BLOCK_SIZE


@pytest.mark.parametrize(
  'weights',
  [
    (0.1 + 0.2, 0.7),
    (1023, 1.0),  # the least that is due a draw in each block
    (1023.5, 1.0),  # a little less
    (1 / 3, 0.0123456789, 0.6),
    (1e-4, 1.0, 0.3333),
    (3e-4, 2e-4, 1e-4, 1.0000001),
    (1e-9, 1.0),
  ],
)
def test_any_block_counts_on_from_all_before_it(weights):
  """Reference: blocks apportioned one after the other."""
  parts = shares(weights)
  want = [(0,) * len(parts)]
  for block in range(1, 3000):
    want.append(apportion(block * BLOCK_SIZE, parts, want[-1]))
  order = Mixture((5,) * len(parts), weights, seed=0)
  for block in (2999, 2998, 0, 1, 2, 1500, 1023, 1024, 1025, 2999):
    assert order.drawn(block) == want[block]


def test_a_late_resume_walks_no_earlier_blocks(monkeypatch):
  asked = []

  def counted(*args):
    asked.append(args)
    return apportion(*args)

  monkeypatch.setattr(mixture, 'apportion', counted)
  sizes = 40, 50, 60
  order = Mixture(sizes, (0.123456789, 1 / 3, 0.1 + 0.2), seed=0)
  order.between(10**7 * 512, 512)
  assert len(asked) == 2


def test_many_sources_keep_their_orders(monkeypatch):
  made = []

  def counted(n_rows, seed, epoch, source=None):
    made.append((source, epoch))
    return row_order(n_rows, seed, epoch, source)

  monkeypatch.setattr(batches, 'row_order', counted)
  order = Mixture([1000] * 50, [1.0] * 50, seed=0)
  for block in range(40):  # 16 rows of each in a block
    order.between(block * BLOCK_SIZE, BLOCK_SIZE)
  assert sorted(made) == [(source, 0) for source in range(50)]


def test_the_order_never_changes():
  """Written out once: a resumed run must meet it on any machine or numpy."""
  items = Mixture((51_924, 999), (0.7, 0.3), seed=1).between(0, 100_000)
  digest = hashlib.sha256(items.astype('<i8').tobytes()).hexdigest()
  assert digest == (
    'a5f47bdc63daf7da557da93aaca946ec80b758209b110aa47f7f5342f9eda420'
  )
