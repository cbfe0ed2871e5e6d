"""Pages that are written by a script are what the script would write."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_configuration_keys_is_current():
  spec = importlib.util.spec_from_file_location(
    'make_config_page', ROOT / 'scripts' / 'make_config_page.py'
  )
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  assert (ROOT / 'docs' / 'config.md').read_text('utf-8') == script.page()
