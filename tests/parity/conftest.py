"""Marks every test here `parity`, and bears with what PEFT says on its own."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent

# It needs torch: pytest must not import it by itself.
collect_ignore = ['reference.py']

MARKS = [
  pytest.mark.parity,
  # PEFT 0.21 reads it off transformers' models.
  pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`'),
  # It then writes the base's own weight beside the factors.
  pytest.mark.filterwarnings(
    'ignore:Setting `save_embedding_layers` to `True`:UserWarning'
  ),
]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent == HERE:
      for mark in MARKS:
        item.add_marker(mark)
