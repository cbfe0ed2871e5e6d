"""Tokenizers small enough to check by hand, and rows."""

import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from lorax_train.data.source import Row

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


def as_tokenizers(model_file, *, prefix=True):
  """The same BPE vocabulary for `tokenizers`; without `prefix`, one bug."""
  model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
  pieces = [model.id_to_piece(id) for id in range(model.get_piece_size())]
  ids = {piece: id for id, piece in enumerate(pieces)}
  # A sentencepiece BPE merges whatever makes the piece of the lowest id.
  merges = [
    (piece[:cut], piece[cut:])
    for piece in pieces
    if len(piece) > 1 and not model.is_byte(ids[piece])
    for cut in range(1, len(piece))
    if piece[:cut] in ids and piece[cut:] in ids
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(ids, merges, unk_token='<unk>', byte_fallback=True)
  )
  steps = [normalizers.Prepend('▁')] if prefix else []
  tokenizer.normalizer = normalizers.Sequence(
    [*steps, normalizers.Replace(' ', '▁')]
  )
  tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
  return tokenizer


def rows_of(*fields):
  return [Row(f, f'a.jsonl:{n}') for n, f in enumerate(fields, start=1)]


def lists(tokenized):
  return [
    (ids.tolist(), labels.tolist())
    for ids, labels in zip(tokenized.ids, tokenized.labels, strict=True)
  ]
