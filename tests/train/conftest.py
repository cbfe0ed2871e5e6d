"""Fixtures of runs."""

import json

import numpy as np
import pytest


@pytest.fixture
def tokens_file(tmp_path):
  """60 rows of 4 to 40 ids that count up."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'tokens.jsonl'
  rows = [
    {'input_ids': list(range(start, start + n))}
    for start, n in zip(
      rng.integers(0, 200, 60).tolist(),
      rng.integers(4, 41, 60).tolist(),
      strict=True,
    )
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path
