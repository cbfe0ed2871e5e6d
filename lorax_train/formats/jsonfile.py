"""JSON objects in files that come with a model."""

import json
from pathlib import Path
from typing import Any

from lorax_train.errors import ModelError, one_line


def read_object(path: Path, absent: str = '') -> dict[str, Any]:
  """The JSON object that a file holds.

  Args:
    path: the file.
    absent: what to say beyond "no such file".

  Raises:
    ModelError: no such file, or something else in it.
  """
  try:
    raw = json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    raise ModelError(f'{path}: no such file{absent}') from None
  except (ValueError, RecursionError) as error:
    raise ModelError(f'{path}: not JSON: {one_line(error)}') from None
  if not isinstance(raw, dict):
    raise ModelError(f'{path}: not a JSON object')
  return raw
