"""scripts/new_model.py: a tokenizer that all read alike, and sizes.

Reference: sentencepiece on the tokenizer.model that it has trained, and the number
of parameters by hand.
"""

import argparse
import importlib.util
from pathlib import Path

import pytest
import sentencepiece

from lorax_train.data import tokenize
from lorax_train.errors import ConfigError
from lorax_train.formats import hf_config

FILE = Path(__file__).parents[1] / 'scripts' / 'new_model.py'
STORY = 'Tom had 12 red balls.\nHe said, "Look!"  Ä ball fell — bump.\n'


@pytest.fixture
def script():
  spec = importlib.util.spec_from_file_location('new_model', FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def options(tmp_path, **changes):
  text = tmp_path / 'text.txt'
  text.write_text('<|endoftext|>'.join(STORY * n for n in range(1, 9)))
  given = {
    'text': str(text), 'separator': '<|endoftext|>', 'vocab': 300,
    'hidden': 32, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'mlp': 0,
    'max_length': 64, 'untied': False, 'out': str(tmp_path / 'model'),
  }  # fmt: skip
  return argparse.Namespace(**given | changes)


def test_both_files_give_the_ids_of_sentencepiece(tmp_path, script):
  n = script.make(options(tmp_path))
  # q, o of 32 x 32, k, v of 32 x 16, three of 32 x 96, norms, the embedding.
  assert n == 2 * (2 * 1024 + 2 * 512 + 3 * 3072 + 64) + 300 * 32 + 32
  model = tmp_path / 'model'
  cfg = hf_config.read_config(model)
  assert (cfg.vocab, cfg.mlp, cfg.tied, cfg.window) == (300, 96, True, None)
  theirs = sentencepiece.SentencePieceProcessor(
    model_file=str(model / 'tokenizer.model')
  )
  texts = [STORY, 'a  b', ' 7x', '日本 <|endoftext|></s>']
  ours = tokenize.load_tokenizer(model)
  assert ours.files[0].name == 'tokenizer.json'
  assert ours.encode(texts) == theirs.encode(texts)
  assert (ours.bos_id, ours.eos_id, ours.size) == (1, 2, 300)
  # Separators are not text: nothing of one is a piece.
  assert not any('endof' in ours.piece(i) for i in range(300))


@pytest.mark.parametrize(('changes', 'message'), [
  ({'vocab': 4000}, r'--vocab 4000: sentencepiece cannot make that many'),
  ({'heads': 5}, '--hidden 32: not a multiple of --heads 5'),
  ({'out': '.'}, r'--out \.: exists already'),
])  # fmt: skip
def test_what_cannot_be_made_is_one_line(changes, message, tmp_path, script):
  with pytest.raises(ConfigError, match=message) as error:
    script.make(options(tmp_path, **changes))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'model').exists()
