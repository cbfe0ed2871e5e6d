"""JSON files, always with sorted keys."""

import json
import pathlib
from collections.abc import Callable


def write_json(path: pathlib.Path, value) -> None:
  """Writes JSON with sorted keys, readable in a diff."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n')


def rewrite_json(path: pathlib.Path, edit: Callable[[dict], None]) -> None:
  """Changes a JSON object on disk."""
  value = json.loads(path.read_text())
  edit(value)
  write_json(path, value)
