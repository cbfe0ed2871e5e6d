"""Rows as text with what is learned marked.

Reference: each text as it should read, written out; and for any text and any
cut the text itself, put together again from the runs.
"""

import re

import pytest

from lorax_train.data import preview
from lorax_train.data.preview import Run
from lorax_train.data.tokenize import load_tokenizer

NO = -100
CONTROL = re.compile(r'[\x00-\x09\x0b-\x1f\x7f-\x9f]')


@pytest.fixture(params=['bytes_dir', 'sentencepiece_dir'])
def tokenizer(request):
  return load_tokenizer(request.getfixturevalue(request.param))


# (prompt, completion, as it is shown after BOS)
SHOWN = [
  ('A dog', ' ran.', 'A dog⟦ ran.⟨</s>⟩⟧'),
  ('', 'all', '⟦all⟨</s>⟩⟧'),
  ('one\ntwo', '\nthree', 'one\n  two⟦\n  three⟨</s>⟩⟧'),
  ('a [b]', ' ⟦c⟧', r'a [b]⟦ \u27e6c\u27e7⟨</s>⟩⟧'),
  ('</s>', ' ⟨</s>⟩', r'</s>⟦ \u27e8</s>\u27e9⟨</s>⟩⟧'),
  (r'C:\new', ' x', r'C:\\new⟦ x⟨</s>⟩⟧'),
  ('\x1b]0;title\x07', '\x1b[2J\r', r'\x1b]0;title\x07⟦\x1b[2J\r⟨</s>⟩⟧'),
  ('\x9b31m', ' \u202eabc', r'\x9b31m⟦ \u202eabc⟨</s>⟩⟧'),
  ('\t\0', '\u2028', r'\t\x00⟦\u2028⟨</s>⟩⟧'),
  ('é 日本', ' 🦙', 'é 日本⟦ 🦙⟨</s>⟩⟧'),
]


@pytest.mark.parametrize(('prompt', 'completion', 'shown'), SHOWN)
def test_what_is_shown(prompt, completion, shown, tokenizer):
  ids = tokenizer.encode([prompt + completion])[0]
  n = next(
    n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n]) == prompt
  )
  ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
  labels = [NO] * (n + 1) + ids[n + 1 :]
  row = preview.runs(ids, labels, tokenizer)
  assert preview.shown(row, colour=False) == f'  ⟨<s>⟩{shown}'


def test_half_a_character_is_shown_by_its_pieces(sentencepiece_dir):
  tokenizer = load_tokenizer(sentencepiece_dir)
  ids = tokenizer.encode(['a 🦙.'])[0]
  pieces = [tokenizer.piece(i) for i in ids]
  begin = pieces.index('<0xF0>')
  for learned in (1, 2, 3):
    labels = [NO] * (begin + learned) + ids[begin + learned :]
    marks = [f'⟨{p}⟩' for p in ('<0xF0>', '<0x9F>', '<0xA6>', '<0x99>')]
    marks.insert(learned, '⟦')
    row = preview.runs(ids, labels, tokenizer)
    assert preview.shown(row, colour=False) == f'  a {"".join(marks)}.⟧'


@pytest.mark.parametrize('text', ['The dog, é 🦙 日本! ', ' two  spaces\n'])
def test_wherever_it_is_cut_the_text_is_whole(text, tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode([text])[0], tokenizer.eos_id]
  for cut in range(1, len(ids)):
    row = preview.runs(ids, [NO] * cut + ids[cut:], tokenizer)
    words = ''.join(r.text for r in row if not r.piece)
    # Whole, or without the one character that the cut is in.
    one_less = {text[:n] + text[n + 1 :] for n in range(len(text))}
    assert words in {text, *one_less}
    assert row[-1] == Run('</s>', True, True)


def test_ids_without_a_piece_and_rows_without_text(tokenizer):
  ids = [tokenizer.bos_id, 10**6, tokenizer.eos_id]
  row = preview.runs(ids, [NO, NO, tokenizer.eos_id], tokenizer)
  expected = '  ⟨<s>⟩⟨<no piece 1000000>⟩⟦⟨</s>⟩⟧'
  assert preview.shown(row, colour=False) == expected


def test_without_a_tokenizer_there_are_the_ids():
  row = preview.runs([1, 20, 3, 2], [1, NO, 3, 2], None)
  assert preview.shown(row, colour=False) == '  1 20⟦ 3 2⟧'


COLOURED = [
  ([Run('a', False, False)], '  a'),
  ([Run('a', True, False)], '  \x1b[32ma\x1b[0m'),
  ([Run('<s>', False, True)], '  \x1b[2m<s>\x1b[0m'),
  ([Run('</s>', True, True)], '  \x1b[2m\x1b[32m</s>\x1b[0m'),
  # A pager forgets the colour at the end of a line.
  ([Run('a\n\nb', True, False)], '  \x1b[32ma\x1b[0m\n  \n  \x1b[32mb\x1b[0m'),
  ([Run('\x1b[31m', True, False)], '  \x1b[32m\\x1b[31m\x1b[0m'),
]


@pytest.mark.parametrize(('row', 'text'), COLOURED)
def test_in_colour(row, text):
  assert preview.shown(row, colour=True) == text


def test_no_character_there_is_reaches_a_terminal_as_a_control():
  for block in range(0, 0x110000, 0x1000):
    text = ''.join(map(chr, range(block, block + 0x1000)))
    assert not CONTROL.search(preview.visible(text))
    assert '\n' not in preview.visible(text, keep='')
    preview.visible(text).encode()  # lone surrogates are escaped
