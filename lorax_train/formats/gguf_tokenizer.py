"""The tokenizer inside a GGUF file, as the files of a model directory.

Byte-level BPE ("gpt2") becomes tokenizer.json, with the pre-tokenizer that
`tokenizer.ggml.pre` names: where digits are split decides the ids of every
number, and a wrong one goes unnoticed, so names whose ids we have not compared
with another implementation's are refused. Pieces with scores ("llama") become
the sentencepiece model that they once came from.
"""

import json
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_train.errors import ModelError
from lorax_train.formats.gguf_header import Gguf
from lorax_train.formats.safetensors import few

# Hugging Face's name of a special token -> GGUF's.
SPECIAL = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}

# ggml's and sentencepiece's kinds of pieces: the numbers are the same.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def _byte_level(use_regex: bool) -> dict[str, Any]:
  return {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': use_regex,
  }


def _split(pattern: str) -> list[dict[str, Any]]:
  split = {
    'type': 'Split',
    'pattern': {'Regex': pattern},
    'behavior': 'Isolated',
    'invert': False,
  }
  return [split, _byte_level(False)]


# tokenizer.ggml.pre -> (pre-tokenizers; whether a piece that is in the
# vocabulary is taken whole, its merges unasked; whether BOS is the default).
_PRE: dict[str, tuple[list[dict[str, Any]], bool, bool]] = {
  'gpt-2': ([_byte_level(True)], False, False),
  'smollm': (
    [{'type': 'Digits', 'individual_digits': True}, _byte_level(True)],
    False,
    False,
  ),
  'llama-bpe': (
    _split(
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
      r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    True,
    True,
  ),
  'tekken': (
    _split(
      r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
      r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
      r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
      r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
      r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    True,
    True,
  ),
}


def files(opened: Gguf, vocab: int) -> dict[str, bytes]:
  """{file name: content} of the tokenizer.

  Args:
    opened: a file's head.
    vocab: rows of the embedding.

  Raises:
    ModelError: a tokenizer that we don't know, or that contradicts itself.
  """
  kind = opened.text('tokenizer.ggml.model')
  if kind not in ('gpt2', 'llama'):
    raise ModelError(
      f'{opened.path}: tokenizer.ggml.model {kind!r} is not supported;'
      ' supported: gpt2, llama'
    )
  tokens = opened.texts('tokenizer.ggml.tokens')
  if not 0 < len(tokens) <= vocab:
    raise _wrong(opened, f'{len(tokens)} tokens for {vocab} embedding rows')
  twice = [repr(t)[:40] for t, n in Counter(tokens).items() if n > 1]
  if twice:
    raise _wrong(opened, f'tokens that are there twice: {few(twice)}')
  types = opened.numbers('tokenizer.ggml.token_type', len(tokens)).tolist()
  special = {
    name: tokens[id]
    for name, key in SPECIAL.items()
    if (id := opened.token_id(f'tokenizer.ggml.{key}_token_id', len(tokens)))
    is not None
  }
  if 'eos' not in special:
    raise ModelError(f'{opened.path}: tokenizer.ggml.eos_token_id is missing')
  if kind == 'llama':
    add_bos = opened.flag('tokenizer.ggml.add_bos_token', True)
    made = {'tokenizer.model': _sentencepiece(opened, tokens, types, special)}
  else:
    splits, whole, add_bos = _pre(opened)
    add_bos = opened.flag('tokenizer.ggml.add_bos_token', add_bos)
    tokenizer = _byte_level_bpe(opened, tokens, types, splits, whole)
    if add_bos and 'bos' in special:
      tokenizer['post_processor'] = _begin_with(
        special['bos'], tokens.index(special['bos'])
      )
    made = {'tokenizer.json': _json(tokenizer)}
  if add_bos and 'bos' not in special:
    raise _wrong(opened, 'a text shall begin with BOS, but none is named')
  config = {
    **{f'{name}_token': token for name, token in special.items()},
    'add_bos_token': add_bos,
    'add_eos_token': opened.flag('tokenizer.ggml.add_eos_token', False),
    'clean_up_tokenization_spaces': False,
    'model_max_length': opened.fields.get('llama.context_length'),
    # The one class that leaves tokenizer.json as it is.
    'tokenizer_class': (
      'LlamaTokenizer' if kind == 'llama' else 'PreTrainedTokenizerFast'
    ),
  }
  if 'tokenizer.chat_template' in opened.fields:
    config['chat_template'] = opened.text('tokenizer.chat_template')
  return {**made, 'tokenizer_config.json': _json(config)}


def _pre(opened: Gguf) -> tuple[list[dict[str, Any]], bool, bool]:
  name = opened.text('tokenizer.ggml.pre')
  if name not in _PRE:
    raise ModelError(
      f'{opened.path}: tokenizer.ggml.pre {name!r} is not supported;'
      f' supported: {", ".join(_PRE)}; another splitting of words and numbers'
      ' would give wrong ids'
    )
  if opened.flag('tokenizer.ggml.add_space_prefix', False):
    raise _wrong(opened, 'add_space_prefix is not supported with gpt2')
  return _PRE[name]


def _byte_level_bpe(
  opened: Gguf,
  tokens: Sequence[str],
  types: Sequence[int],
  splits: list[dict[str, Any]],
  whole: bool,
) -> dict[str, Any]:
  """tokenizer.json, as `tokenizers` writes it."""
  odd = sorted({*types} - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED})
  if odd:
    raise _wrong(opened, f'tokens of types {odd} in byte-level BPE')
  ids = {token: id for id, token in enumerate(tokens)}
  merges = [tuple(m.split(' ')) for m in opened.texts('tokenizer.ggml.merges')]
  bad = [
    repr(' '.join(m))[:40]
    for m in merges
    if len(m) != 2 or not {*m, ''.join(m)} <= ids.keys()
  ]
  if bad:
    raise _wrong(opened, f'merges that are not of two tokens: {few(bad)}')
  added = [
    {
      'id': id,
      'content': token,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': types[id] == _CONTROL,
    }
    for id, token in enumerate(tokens)
    if types[id] in (_CONTROL, _USER_DEFINED)
  ]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': splits},
    'post_processor': None,
    'decoder': _byte_level(True),
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      'ignore_merges': whole,
      'vocab': ids,
      'merges': merges,
    },
  }


def _begin_with(token: str, id: int) -> dict[str, Any]:
  """What makes transformers put BOS before a text; we do it by ourselves."""

  def one(kind: str, name: str, type_id: int) -> dict[str, Any]:
    return {kind: {'id': name, 'type_id': type_id}}

  first = [one('SpecialToken', token, 0), one('Sequence', 'A', 0)]
  second = [one('SpecialToken', token, 1), one('Sequence', 'B', 1)]
  return {
    'type': 'TemplateProcessing',
    'single': first,
    'pair': first + second,
    'special_tokens': {token: {'id': token, 'ids': [id], 'tokens': [token]}},
  }


def _sentencepiece(
  opened: Gguf,
  tokens: Sequence[str],
  types: Sequence[int],
  special: dict[str, str],
) -> bytes:
  """tokenizer.model: sentencepiece's ModelProto, field by field."""
  for key in ('precompiled_charsmap', 'remove_extra_whitespaces'):
    if opened.fields.get(f'tokenizer.ggml.{key}', False) is not False:
      raise _wrong(opened, f'{key} is not supported')
  scores = opened.numbers('tokenizer.ggml.scores', len(tokens))
  scores = scores.astype(np.float32)
  counts = Counter(types)
  odd = sorted({*types} - {*range(_NORMAL, _BYTE + 1)})
  if odd or counts[_UNKNOWN] != 1 or counts[_BYTE] not in (0, 256):
    raise _wrong(opened, f'token types {dict(sorted(counts.items()))}')
  of_bytes = {t for t, kind in zip(tokens, types, strict=True) if kind == _BYTE}
  if not of_bytes <= {f'<0x{byte:02X}>' for byte in range(256)}:
    raise _wrong(opened, 'byte tokens that are not <0x00> to <0xFF>')
  if '' in tokens or not np.isfinite(scores).all():
    raise _wrong(opened, 'an empty token, or a score that is not finite')
  pieces = b''.join(
    _bytes(1, _bytes(1, token.encode()) + _float(2, score) + _int(3, kind))
    for token, score, kind in zip(tokens, scores.tolist(), types, strict=True)
  )
  bpe = 2
  trainer = _int(3, bpe) + _int(4, len(tokens)) + _int(35, counts[_BYTE] > 0)
  trainer += _bytes(45, tokens[types.index(_UNKNOWN)].encode())
  for field, name in {46: 'bos', 47: 'eos', 48: 'pad'}.items():
    if name in special:
      trainer += _bytes(field, special[name].encode())
  prefix = opened.flag('tokenizer.ggml.add_space_prefix', True)
  normalizer = _bytes(1, b'identity') + _int(3, prefix) + _int(4, 0)
  normalizer += _int(5, 1)
  return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
  out = b''
  while value > 127:
    out += bytes([value & 127 | 128])
    value >>= 7
  return out + bytes([value])


def _int(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
  return _varint(field << 3 | 5) + struct.pack('<f', value)


def _bytes(field: int, value: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(value)) + value


def _json(content: Any) -> bytes:
  return (json.dumps(content, ensure_ascii=False, indent=2) + '\n').encode()


def _wrong(opened: Gguf, what: str) -> ModelError:
  return ModelError(f'{opened.path}: tokenizer: {what}')
