"""Writes docs/config.md, every key of a configuration, from lorax_train.config.

python scripts/make_config_page.py
"""

import dataclasses
import re
import sys
import textwrap
from pathlib import Path

from lorax_train.config import TrainConfig

PAGE = Path(__file__).parents[1] / 'docs' / 'config.md'


def documented(cls: type) -> dict[str, str]:
  """{attribute: its text} of a docstring's Attributes section."""
  _, _, section = (cls.__doc__ or '').partition('Attributes:\n')
  section = textwrap.dedent(section).strip()
  entries = re.split(r'\n(?=\w+: )', section)
  pairs = (entry.split(': ', 1) for entry in entries)
  return {name: ' '.join(text.split()) for name, text in pairs}


def page() -> str:
  """The page as Markdown."""
  lines = [
    '# Configuration',
    '',
    'Written by `python scripts/make_config_page.py` from'
    ' `lorax_train/sections.py`. A key is set in the config file or on the'
    ' command line, `--config.train.steps=100`.',
    '',
    '| key | default | what |',
    '| --- | --- | --- |',
  ]
  top = documented(TrainConfig)
  for field in dataclasses.fields(TrainConfig):
    value = getattr(TrainConfig(), field.name)
    if not dataclasses.is_dataclass(value):
      lines.append(_row(field.name, value, top[field.name], field.metadata))
      continue
    texts = documented(type(value))
    lines += [
      _row(
        f'{field.name}.{key.name}',
        getattr(value, key.name),
        texts[key.name],
        key.metadata,
      )
      for key in dataclasses.fields(value)
    ]
  return '\n'.join(lines) + '\n'


def _row(key: str, default: object, text: str, metadata) -> str:
  choices = metadata.get('choices')
  if choices:
    text = f'{text} One of {", ".join(f"`{c}`" for c in choices)}.'
  shown = "''" if default == '' else default
  return f'| `{key}` | `{shown}` | {text.replace("|", "&#124;")} |'


if __name__ == '__main__':
  PAGE.write_text(page(), 'utf-8')
  sys.stdout.write(f'{PAGE}\n')
