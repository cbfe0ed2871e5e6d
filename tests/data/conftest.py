"""Tokenizers made here, and the real ones where they lie."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .toys import (
  ABC_CONFIG,
  TEXTS,
  abc_tokenizer,
  sentencepiece_model,
  write_tokenizer,
)


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
  folder = tmp_path_factory.mktemp('sentencepiece')
  (folder / 'tokenizer.model').write_bytes(sentencepiece_model(vocab_size=300))
  return folder
