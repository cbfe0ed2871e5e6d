"""Statistics of rows of ids.

Reference: numbers told by hand, and a few lines of plain Python over the same
rows, a row at a time and without hashes.
"""

import numpy as np
import pytest

from lorax_train.data import soundness, statistics
from lorax_train.data.tokenized import tokenize_rows

from .toys import rows_of

NO = -100


def set_of(*rows):
  """A set of rows, each its ids or a pair of ids and labels."""
  pairs = [row if isinstance(row, tuple) else (row, row) for row in rows]
  fields = [{'input_ids': i, 'labels': l} for i, l in pairs]
  return tokenize_rows(rows_of(*fields), 'tokens', None, 10_000)


def all_of(tokenized):
  return np.arange(len(tokenized.lengths))


@pytest.fixture
def random_set():
  """9,000 rows, more than two chunks, of which many are alike."""
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(9000):
    ids = rng.integers(3, 6, rng.integers(2, 9)).tolist()
    labels = [i if rng.random() < 0.7 else NO for i in ids]
    labels[-1] = ids[-1]
    rows.append((ids, labels))
  return set_of(*rows), rows


@pytest.mark.parametrize(
  'lengths, parts',
  [
    ([], []),
    ([4, 6, 2, 8, 30, 2, 3], [[0, 1], [2, 3], [4], [5, 6]]),
    ([2] * 7, [[0, 1, 2], [3, 4, 5], [6]]),
  ],
)
def test_chunks_have_few_rows_and_few_tokens(monkeypatch, lengths, parts):
  monkeypatch.setattr(statistics, '_TOKENS', 10)
  rows = [list(range(3, 3 + n)) for n in lengths]
  tokenized = set_of([9, 9], *rows)  # the first is not looked at
  found = list(statistics.chunks(tokenized, np.arange(len(rows)) + 1, 3))
  assert [(c.rows - 1).tolist() for c in found] == parts
  assert [c.ids.tolist() for c in found] == [
    [id for i in part for id in rows[i]] for part in parts
  ]


def test_learned_tokens_and_ends_are_those_of_a_loop(random_set):
  tokenized, rows = random_set
  chosen = np.arange(5, 9000, 2)
  # The first label has nothing before it that could predict it.
  learned = [[l for l in rows[i][1][1:] if l != NO] for i in chosen]
  assert statistics.learned(tokenized, chosen).tolist() == [*map(len, learned)]
  without = [i for i, row in zip(chosen, learned, strict=True) if row[-1] != 5]
  assert 0 < len(without) < len(chosen)
  assert statistics.without_end(tokenized, chosen, [5]).tolist() == without


def test_statistics_do_not_write_into_the_set():
  tokenized = set_of([3, 4, 5])
  statistics.learned(tokenized, all_of(tokenized))
  assert tokenized.labels[0].tolist() == [3, 4, 5]


def test_duplicates_and_leaks_are_those_of_a_dict(random_set):
  tokenized, rows = random_set
  train, held_out = np.arange(0, 9000, 2), np.arange(1, 9000, 2)
  first, expected = {}, []
  for i in train:
    at = first.setdefault(tuple(rows[i][0]), i)
    if at != i:
      expected.append((i, at))
  again = statistics.duplicates(tokenized, train)
  assert [*zip(*again, strict=True)] == expected
  seen = [
    (i, first[tuple(rows[i][0])])
    for i in held_out
    if tuple(rows[i][0]) in first
  ]
  assert 0 < len(seen) < len(held_out)
  leaks = statistics.leaks(tokenized, train, tokenized, held_out)
  assert [*zip(*leaks, strict=True)] == seen


def test_rows_of_equal_ids_and_other_labels_are_duplicates():
  tokenized = set_of(([3, 4], [NO, 4]), [4, 3], [3, 4], [3, 4, 4])
  again = statistics.duplicates(tokenized, all_of(tokenized))
  assert [x.tolist() for x in again] == [[2], [0]]


def test_nothing_held_out_leaks_nothing():
  tokenized = set_of([3, 4], [3, 4])
  none = np.zeros(0, np.int64)
  found = statistics.leaks(tokenized, all_of(tokenized), tokenized, none)
  assert len(found.rows) == 0


# (lengths, {per cent: tokens} to look at, bins)
LENGTHS = [
  ([7], {1: 7, 50: 7, 99: 7}, [(n, n, int(n == 7)) for n in range(1, 8)]),
  (
    range(1, 101),
    {1: 1, 5: 5, 25: 25, 50: 50, 75: 75, 95: 95, 99: 99},
    [(n + 1, n + 10, 10) for n in range(0, 100, 10)],
  ),
  (
    [1, 60, 61, 512],
    {50: 60, 75: 61, 99: 512},
    [(1, 60, 2), (61, 120, 1)]
    + [(n + 1, n + 60, 0) for n in range(120, 480, 60)]
    + [(481, 540, 1)],
  ),
]


@pytest.mark.parametrize(('lengths', 'quantiles', 'bins'), LENGTHS)
def test_quantiles_and_bins(lengths, quantiles, bins):
  lengths = np.array(list(lengths))
  found = statistics.quantiles(lengths)
  assert {q: found[q] for q in quantiles} == quantiles
  assert statistics.histogram(lengths) == bins


@pytest.mark.parametrize('longest', [1, 9, 10, 11, 99, 512, 1001, 131072])
def test_at_most_ten_bins_reach_the_longest(longest):
  bins = statistics.histogram(np.array([1, longest]))
  assert len(bins) <= 10
  assert bins[-1][0] <= longest <= bins[-1][1]
  assert sum(n for *_, n in bins) == 2


# kind: (a row that is of it, a row that is nearly). BOS is 1, EOS 2, padding 0.
SUSPECTS = {
  'no_end': ([1, 5, 6], [1, 5, 2]),
  'masked_end': (([1, 5, 6, 2], [NO, 5, 6, NO]), [1, 5, 6]),
  'two_bos': ([1, 1, 5, 2], [1, 5, 1, 2]),
  'inner_bos': ([1, 5, 1, 2], [1, 1, 5, 2]),
  'shifted': (
    ([1, 5, 6, 7, 2], [5, 6, 7, 2, NO]),
    ([1, 5, 5, 5, 2], [1, 5, 5, 5, 2]),
  ),
  'other_labels': (
    ([1, 5, 6, 7, 2], [NO, 9, 6, 7, 2]),
    ([1, 5, 6, 7, 2], [5, 6, 7, 2, NO]),
  ),
  'learned_padding': ([1, 5, 2, 2], [1, 5, 0, 2]),
  'padding': (([1, 5, 2, 0, 0], [1, 5, 2, NO, NO]), [1, 5, 2, 0]),
}


@pytest.mark.parametrize('kind', SUSPECTS)
def test_a_suspect_is_told_from_what_is_nearly_one(kind):
  tokenized = set_of(SUSPECTS[kind][1], SUSPECTS[kind][0], SUSPECTS[kind][1])
  rows = all_of(tokenized)
  found = soundness.suspects(tokenized, rows, [2], 1, [0, 2])
  assert getattr(found, kind).tolist() == [1]


def test_a_sound_row_is_none_and_its_neighbours_do_not_matter():
  tokenized = set_of([1, 5, 2], [2, 2], ([1, 5, 5, 2], [NO, NO, 5, 2]))
  found = soundness.suspects(tokenized, np.array([0, 2]), [2], 1, [0, 2])
  assert not any(len(rows) for rows in found)


def test_without_bos_no_row_has_it_twice():
  tokenized = set_of([1, 1, 5, 1, 2])
  found = soundness.suspects(tokenized, all_of(tokenized), [2], None, [])
  assert not any(len(rows) for rows in found)
