"""docs/chat.md's table, token by token, on the three real tokenizers.

Reference: the table itself, which was checked by hand.
"""

import re
from pathlib import Path

import pytest

from lorax_train.data.encode import encode_rows
from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.formats.find import find_model
from tests.formats import smollm2

from .chats import row
from .toys import rows_of

PAGE = Path(__file__).parents[2] / 'docs' / 'chat.md'
FIELDS = row(
  's:Be brief.', 'u:Name a colour.', 'a:Blue.', 'u:</s> Another?', 'a:Red.'
)


def table(label):
  """[(piece, learned)] of a line of the page's first table."""
  line, *_ = [
    line
    for line in PAGE.read_text('utf-8').splitlines()
    if line.startswith(f'| {label} |')
  ]
  cells = re.findall(r'(\*\*\+\*\*)?`([^`]+)`', line.split(' | ', 1)[1])
  return [(piece.replace('\\|', '|'), bool(plus)) for plus, piece in cells]


@pytest.mark.parametrize('label', ['`mistral_v1`', '`mistral_v3`', '`chat`, SmolLM2'])  # fmt: skip
def test_the_page_says_what_is_learned(label, request):
  name = label.split('`')[1]
  if name == 'chat':
    folder = find_model(str(smollm2.find()))
  else:
    shared = request.getfixturevalue('shared')
    folder = shared / 'tokenizers' / name.replace('_', '-')
  tokenizer = load_tokenizer(folder)
  [(_, got)] = encode_rows(rows_of(FIELDS), name, tokenizer)
  assert table(label) == [
    (tokenizer.piece(id), target != NO_LOSS)
    for id, target in zip(got.ids, got.labels, strict=True)
  ]
