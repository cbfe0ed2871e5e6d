"""Tokenizers small enough to check by hand, and rows."""

import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models

from lorax_train.data.source import Row

TEXTS = [
  'Once upon a time there was a little girl who had a red ball.',
  'Say hello to the world, and name three fruits: apple, pear, plum.',
  'The dog ran after the cat; the cat ran up the tree.',
] * 4
ABC_CONFIG = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True}


def write_tokenizer(folder, tokenizer, **files):
  """A model directory of a `tokenizers` tokenizer and JSON files."""
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  for name, content in files.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


def abc_tokenizer():
  """Characters a, b, c, one merge: 'ab'. Every id can be told by hand."""
  pieces = ['<unk>', '<s>', '</s>', 'a', 'b', 'c', 'ab']
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={piece: id for id, piece in enumerate(pieces)},
      merges=[('a', 'b')],
      unk_token='<unk>',
    )
  )
  tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
  tokenizer.decoder = decoders.Fuse()
  return tokenizer


def sentencepiece_model(**options):
  """A tokenizer.model, like Mistral's but for its size; `options` train it."""
  model = io.BytesIO()
  given = {
    'vocab_size': 320,
    'model_type': 'bpe',
    'byte_fallback': True,
    'hard_vocab_limit': False,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
    'minloglevel': 2,
  }
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, **given | options
  )
  return model.getvalue()


def rows_of(*fields):
  return [Row(f, f'a.jsonl:{n}') for n, f in enumerate(fields, start=1)]


def lists(tokenized):
  return [
    (ids.tolist(), labels.tolist())
    for ids, labels in zip(tokenized.ids, tokenized.labels, strict=True)
  ]
