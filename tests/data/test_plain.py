"""Documents of plain text, against `str.split` of the whole of it."""

import random

import pytest

from lorax_train.data import plain, prepare, source, stream, tokenize
from lorax_train.errors import DataError


@pytest.mark.parametrize('separator', ['<|endoftext|>', '\n\n', '=', ''])
def test_any_chunks_give_the_documents_of_the_whole(
  separator, tmp_path, monkeypatch
):
  """A separator that is cut by a chunk is one, and lines are counted."""
  rng = random.Random(0)
  text = ''.join(
    rng.choice(['a', 'ä', '=', '\n', '<|end', '<|endoftext|>', ' '])
    for _ in range(2000)
  )
  path = tmp_path / 'a.txt'
  path.write_text(text, 'utf-8')
  monkeypatch.setattr(stream, 'CHUNK', 7)
  rows = list(source.iter_rows(source.files_of(str(path)), separator))
  parts = text.split(separator) if separator else [text]
  want, at = [], 0
  for part in parts:
    if part.strip():
      begin = at + len(part) - len(part.lstrip('\r\n'))
      want.append((part.strip('\r\n'), text.count('\n', 0, begin) + 1))
    at += len(part) + len(separator)
  assert [(row.fields['text'], row.where) for row in rows] == [
    (document, f'{path}:{line}') for document, line in want
  ]


def test_a_document_that_is_none_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(plain, 'MAX_LINE_BYTES', 2**20)
  path = tmp_path / 'a.txt'
  path.write_text('ok\n<|endoftext|>\n' + 'x' * 2**21)
  with pytest.raises(
    DataError, match=r'a\.txt:2: a document over 1 MiB: .*data\.separator'
  ):
    source.read_rows(str(path))


def test_a_long_file_without_its_separator_is_told(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('a line\n' * 4000)
  with pytest.raises(
    DataError, match=r"a\.txt: no '<.*>' in 28,000 characters"
  ):
    source.read_rows(str(path))
  assert len(list(source.iter_rows(source.files_of(str(path)), ''))) == 1


def test_a_readme_beside_the_data_is_none_of_it(tmp_path):
  (tmp_path / 'README.txt').write_text('What this is.')
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}')
  assert [r.fields for r in source.read_rows(str(tmp_path))] == [{'text': 'a'}]


def test_another_separator_is_another_set(tmp_path, abc_dir, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
  path = tmp_path / 'a.txt'
  path.write_text('a\n\nb<|endoftext|>c')
  tokenizer = tokenize.load_tokenizer(abc_dir)
  sets = [
    prepare.prepare(
      str(path), 'text', tokenizer, prepare.Options(99, separator=separator)
    )
    for separator in ('<|endoftext|>', '\n\n', '')
  ]
  assert [len(each.ids) for each in sets] == [2, 2, 1]
