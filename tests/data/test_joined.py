"""Sets of rows as one.

Reference: the sets' own rows, one after the other.
"""

import hashlib

import numpy as np
import pytest

from lorax_train.data.joined import Joined
from lorax_train.data.source import Row
from lorax_train.data.tokenized import tokenize_rows


def rows(name, *lengths):
  given = [
    Row({'input_ids': list(range(n))}, f'{name}:{i}')
    for i, n in enumerate(lengths, start=1)
  ]
  return tokenize_rows(given, 'tokens', None, 99)


def test_rows_keep_ids_labels_and_places():
  sets = [rows('a', 3, 2), rows('b', 5), rows('c', 2, 4, 3)]
  joined = Joined(sets)
  assert joined.starts.tolist() == [0, 2, 3]
  assert joined.lengths.tolist() == [3, 2, 5, 2, 4, 3]
  want = [(s, i) for s in sets for i in range(len(s.lengths))]
  for at, (part, i) in enumerate(want):
    np.testing.assert_array_equal(joined.ids[at], part.ids[i])
    np.testing.assert_array_equal(joined.labels[at], part.labels[i])
    assert joined.where[np.int64(at)] == part.where[i]
  with pytest.raises(IndexError):
    joined.ids[6]


def test_the_fingerprint_covers_every_set_and_their_order():
  a, b, c = rows('a', 3, 2), rows('b', 5), rows('c', 6)
  prints = [Joined(s).fingerprint for s in ([a, b], [b, a], [a, c], [a])]
  assert len(set(prints)) == 4
  both = f'{a.fingerprint}+{b.fingerprint}'.encode()
  assert prints[0] == hashlib.sha256(both).hexdigest()
