"""What sentencepiece keeps in a tokenizer.model: pieces, scores, its rules.

The library tells ids and scores but neither which pieces are user-defined nor
the rules for spaces. They are read off its protobuf here, which is simple
enough to do without a library (sentencepiece_model.proto, and protobuf's
encoding: https://protobuf.dev/programming-guides/encoding).
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KINDS = {1: 'unigram', 2: 'BPE', 3: 'word', 4: 'char'}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A row of the vocabulary; `kind` is NORMAL, UNKNOWN ..."""

  text: str
  score: float
  kind: int


@dataclasses.dataclass(frozen=True)
class ModelProto:
  """A tokenizer.model.

  Attributes:
    pieces: by id.
    kind: 'BPE', 'unigram', 'word', 'char'.
    byte_fallback: what is no piece becomes its UTF-8 bytes, not unk.
    whitespace_as_suffix: the space stands behind a word, not before it.
    unk_surface: what unk decodes to.
    charsmap: whether characters are replaced before anything else.
    dummy_prefix: whether a space is put before a text.
    remove_extra_whitespaces: spaces are folded and trimmed.
    escape_whitespaces: a space is read as U+2581.
    denormalizes: whether characters are replaced after decoding.
  """

  pieces: tuple[Piece, ...]
  kind: str
  byte_fallback: bool
  whitespace_as_suffix: bool
  unk_surface: str
  charsmap: bool
  dummy_prefix: bool
  remove_extra_whitespaces: bool
  escape_whitespaces: bool
  denormalizes: bool


def parse(data: bytes) -> ModelProto:
  """Reads a serialized ModelProto.

  Args:
    data: as sentencepiece's `serialized_model_proto` gives it.

  Raises:
    ValueError: no such message.
  """
  pieces = []
  trainer: dict[int, Any] = {}
  normalizer: dict[int, Any] = {}
  denormalizer: dict[int, Any] = {}
  for number, value in _fields(data):
    if number == 1:
      field = dict(_fields(value))
      (score,) = struct.unpack('<f', field.get(2, bytes(4)))
      text = field[1].decode('utf-8')
      pieces.append(Piece(text, score, field.get(3, NORMAL)))
    elif number in (2, 3, 5):
      (trainer, normalizer, denormalizer)[(2, 3, 5).index(number)].update(
        _fields(value)
      )
  kind = trainer.get(3, 1)
  return ModelProto(
    pieces=tuple(pieces),
    kind=_KINDS.get(kind, f'of type {kind}'),
    byte_fallback=bool(trainer.get(35, False)),
    whitespace_as_suffix=bool(trainer.get(24, False)),
    unk_surface=trainer.get(44, ' \u2047 '.encode()).decode('utf-8'),
    charsmap=bool(normalizer.get(2)),
    dummy_prefix=bool(normalizer.get(3, True)),
    remove_extra_whitespaces=bool(normalizer.get(4, True)),
    escape_whitespaces=bool(normalizer.get(5, True)),
    denormalizes=bool(denormalizer.get(2)),
  )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """(field number, value): int of a varint, bytes of anything else."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    wire = key & 7
    if wire == 0:
      value, at = _varint(data, at)
      yield key >> 3, value
      continue
    if wire == 2:
      size, at = _varint(data, at)
    elif wire in (1, 5):
      size = 8 if wire == 1 else 4
    else:
      raise ValueError(f'wire type {wire}')
    if at + size > len(data):
      raise ValueError('a field that ends past its message')
    yield key >> 3, data[at : at + size]
    at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """(value, where the next field begins)."""
  value = 0
  for shift in range(0, 70, 7):
    if at == len(data):
      raise ValueError('a number that ends past its message')
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at
  raise ValueError('a number of more than 64 bits')
