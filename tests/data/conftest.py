"""Tokenizers made here, and the real ones where they lie."""

import io

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .toys import ABC_CONFIG, abc_tokenizer, write_tokenizer

TEXTS = [
  'Once upon a time there was a little girl who had a red ball.',
  'Say hello to the world, and name three fruits: apple, pear, plum.',
  'The dog ran after the cat; the cat ran up the tree.',
] * 4


@pytest.fixture(scope='session')
def abc_dir(tmp_path_factory):
  return write_tokenizer(
    tmp_path_factory.mktemp('abc'),
    abc_tokenizer(),
    tokenizer_config=ABC_CONFIG,
  )


@pytest.fixture(scope='session')
def bytes_dir(tmp_path_factory):
  """A byte-level BPE: any text there is can be encoded and decoded."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<s>', '</s>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return write_tokenizer(
    tmp_path_factory.mktemp('bytes'), tokenizer, tokenizer_config=ABC_CONFIG
  )


@pytest.fixture(scope='session')
def sentencepiece_dir(tmp_path_factory):
  """A lone tokenizer.model, like Mistral's but for its size."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    vocab_size=300,
    model_type='bpe',
    byte_fallback=True,
    hard_vocab_limit=False,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  folder = tmp_path_factory.mktemp('sentencepiece')
  (folder / 'tokenizer.model').write_bytes(model.getvalue())
  return folder
