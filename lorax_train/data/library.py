"""The two libraries that read tokenizer files, behind one interface.

`Tokenizer` in tokenize.py says what their answers are for.
"""

# ruff: noqa: D102 - the methods are told once, in Library

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers

# Where special tokens must be told from their spelling, each is stood in for by
# one private-use character from here on (Unicode plane 16).
STAND_INS = 0x100000


class Located(NamedTuple):
  """Ids of a text, and the characters [begin, end) that each is made of."""

  ids: list[int]
  offsets: list[tuple[int, int]]


def spelling(pieces: Iterable[str]) -> re.Pattern[str]:
  """Matches any of some pieces, in a group; the longest where several begin."""
  longest_first = sorted(filter(None, pieces), key=len, reverse=True)
  return re.compile(f'({"|".join(map(re.escape, longest_first)) or "(?!)"})')


class Library(Protocol):
  """What either library is asked for."""

  @property
  def size(self) -> int:
    """The highest id and 1."""

  @property
  def special(self) -> dict[str, int]:
    """Ids of the special tokens by their spelling."""

  @property
  def added(self) -> dict[str, int]:
    """The same, and all else that is matched whole in a text."""

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """See `Tokenizer.encode`."""

  def encode_chat(
    self, chats: Sequence[str | list[str | int]]
  ) -> list[Located]:
    """See `Tokenizer.encode_chat`."""

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""

  def piece(self, id: int) -> str | None:
    """What the vocabulary has for an id."""

  def id_of(self, piece: str) -> int | None:
    """What the vocabulary has for a piece."""

  def own(self, name: str) -> int | None:
    """The file's own id for bos, eos, pad or unk."""

  def adds_bos(self, bos_id: int) -> bool:
    """Whether the file itself says that a text begins with BOS."""


class TokenizersLibrary:
  """A tokenizer.json."""

  def __init__(self, path: Path):
    self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Files may carry the padding and truncation of whoever saved them.
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    # The name misleads: True makes a special token in a text plain text.
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.size = max(vocabulary.values(), default=-1) + 1
    self._added = self._tokenizer.get_added_tokens_decoder()
    self.added = {token.content: id for id, token in self._added.items()}
    self.special = {
      token.content: id for id, token in self._added.items() if token.special
    }
    self._special = set(self.special.values())
    self._begin = self._tokenizer.encode('').ids
    # All it does to ids is to add BOS and EOS, which is done here; and that of
    # Llama 3 takes spaces out of the offsets.
    self._tokenizer.post_processor = None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    batch = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in batch]

  def encode_chat(
    self, chats: Sequence[str | list[str | int]]
  ) -> list[Located]:
    whole = [chat for chat in chats if isinstance(chat, str)]
    pieces = [chat for chat in chats if not isinstance(chat, str)]
    self._tokenizer.encode_special_tokens = False
    try:
      of_whole = iter(_located(self._tokenizer, whole))
    finally:
      self._tokenizer.encode_special_tokens = True
    of_pieces = iter(self._encode_pieces(pieces) if pieces else [])
    return [
      next(of_whole) if isinstance(chat, str) else next(of_pieces)
      for chat in chats
    ]

  def _encode_pieces(self, chats: Sequence[list[str | int]]) -> list[Located]:
    tokenizer, real = self._with_stand_ins
    stand_ins = {id: chr(STAND_INS + n) for n, id in enumerate(real.values())}
    texts = [
      ''.join(stand_ins[p] if isinstance(p, int) else p for p in pieces)
      for pieces in chats
    ]
    return [
      Located([real.get(id, id) for id in ids], offsets)
      for ids, offsets in _located(tokenizer, texts)
    ]

  @functools.cached_property
  def _with_stand_ins(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A copy that knows each special token by a private-use character too.

    In it the two are told apart: the spelling is text, the character is the
    token. The text around it meets the same rules as around the token itself:
    normalisers and pre-tokenisers treat the start of a text specially.

    Returns:
      the copy, and {id of the stand-in: id of the special token}.
    """
    copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.add_tokens(
      [
        tokenizers.AddedToken(
          chr(STAND_INS + n),
          single_word=token.single_word,
          lstrip=token.lstrip,
          rstrip=token.rstrip,
          normalized=token.normalized,
          special=False,
        )
        for n, token in enumerate(
          self._added[id] for id in self.special.values()
        )
      ]
    )
    return copy, {
      stand_in: id
      for n, id in enumerate(self.special.values())
      if (stand_in := copy.token_to_id(chr(STAND_INS + n))) is not None
    }

  def decode(self, ids: Sequence[int]) -> str:
    # Not skip_special_tokens: it misses special tokens marked `normalized`.
    ids = [id for id in map(int, ids) if id not in self._special]
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def piece(self, id: int) -> str | None:
    return self._tokenizer.id_to_token(id) if 0 <= id < self.size else None

  def id_of(self, piece: str) -> int | None:
    return self._tokenizer.token_to_id(piece)

  def own(self, name: str) -> int | None:
    # Of the four, tokenizer.json has only the model's unk_token.
    unk = getattr(self._tokenizer.model, 'unk_token', None)
    return self.id_of(unk) if name == 'unk' and unk is not None else None

  def adds_bos(self, bos_id: int) -> bool:
    return self._begin[:1] == [bos_id]


class SentencePieceLibrary:
  """A tokenizer.model."""

  def __init__(self, path: Path):
    # model_file: an empty model_proto would load as an empty model, unseen.
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self.size = self._model.get_piece_size()
    self.special = {
      self._model.id_to_piece(id): id
      for id in range(self.size)
      if self._model.is_control(id)
    }
    self._read = spelling(self.special)

  @functools.cached_property
  def added(self) -> dict[str, int]:
    """Control pieces, and the user-defined ones that only the file tells of."""
    pieces = (
      dict(_fields(piece))
      for field, piece in _fields(self._model.serialized_model_proto())
      if field == 1 and isinstance(piece, bytes)
    )
    kinds = [piece.get(3) for piece in pieces]
    user_defined = [id for id, kind in enumerate(kinds) if kind == 4]
    return self.special | {self._model.id_to_piece(i): i for i in user_defined}

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    # All cores, in threads: forking after jax has started can hang.
    return self._model.encode(list(texts), out_type=int, num_threads=-1)

  def encode_chat(
    self, chats: Sequence[str | list[str | int]]
  ) -> list[Located]:
    """Each stretch between special tokens by itself, with its dummy space.

    So do mistral-common and llama.cpp.
    """
    split = [
      self._split(chat) if isinstance(chat, str) else [*_widths(chat)]
      for chat in chats
    ]
    texts = [p for pieces in split for p, _ in pieces if isinstance(p, str)]
    protos = iter(
      self._model.encode(texts, out_type='serialized_proto', num_threads=-1)
    )
    located = []
    for pieces in split:
      ids: list[int] = []
      offsets: list[tuple[int, int]] = []
      at = 0
      for piece, width in pieces:
        if isinstance(piece, str):
          for id, begin, end in _proto_pieces(next(protos), piece):
            ids.append(id)
            offsets.append((at + begin, at + end))
        else:
          ids.append(piece)
          offsets.append((at, at + width))
        at += width
      located.append(Located(ids, offsets))
    return located

  def _split(self, text: str) -> list[tuple[str | int, int]]:
    """Texts and special tokens, with their widths in characters."""
    parts = self._read.split(text)
    return [
      (self.special[part] if n % 2 else part, len(part))
      for n, part in enumerate(parts)
      if part
    ]

  def decode(self, ids: Sequence[int]) -> str:
    # An embedding may have more rows than there are pieces: no text either.
    return self._model.decode([i for i in map(int, ids) if i < self.size])

  def piece(self, id: int) -> str | None:
    return self._model.id_to_piece(id) if 0 <= id < self.size else None

  def id_of(self, piece: str) -> int | None:
    id = self._model.piece_to_id(piece)  # unk for what it does not know
    return id if self._model.id_to_piece(id) == piece else None

  def own(self, name: str) -> int | None:
    id = getattr(self._model, f'{name}_id')()
    return id if id >= 0 else None

  def adds_bos(self, bos_id: int) -> bool:
    return True  # the file does not say; Llama's and Mistral's all do


def _located(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[Located]:
  batch = tokenizer.encode_batch(list(texts), add_special_tokens=False)
  return [Located(encoding.ids, encoding.offsets) for encoding in batch]


def _widths(pieces: Sequence[str | int]) -> Iterator[tuple[str | int, int]]:
  for piece in pieces:
    if piece != '':
      yield piece, len(piece) if isinstance(piece, str) else 1


def _proto_pieces(proto: bytes, text: str) -> Iterator[tuple[int, int, int]]:
  """(id, begin, end) of each piece in a serialised SentencePieceText.

  The one form of the offsets that all versions of the library give. Its field
  2 is a piece: 2 its id, 4 and 5 begin and end in bytes of UTF-8.
  """
  at_byte = None if text.isascii() else _characters(text)
  for field, piece in _fields(proto):
    if field != 2:
      continue
    assert isinstance(piece, bytes)
    found = dict(_fields(piece))
    id, begin, end = (found.get(n, 0) for n in (2, 4, 5))
    assert isinstance(id, int) and isinstance(begin, int)
    assert isinstance(end, int)
    if at_byte:
      begin, end = at_byte[begin], at_byte[end]
    yield id, begin, end


def _characters(text: str) -> list[int]:
  """Byte of UTF-8 -> the character it is part of."""
  at: list[int] = []
  for n, char in enumerate(text):
    at += [n] * len(char.encode())
  return [*at, len(text)]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Protobuf's wire format, as far as sentencepiece's messages need it."""
  at = 0
  while at < len(message):
    key, at = _varint(message, at)
    if key & 7 == 5:  # a float
      at += 4
      continue
    value, at = _varint(message, at)
    if key & 7 == 2:
      yield key >> 3, message[at : at + value]
      at += value
    else:
      yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
  value, shift = message[at] & 127, 7
  while message[at] > 127:
    at += 1
    value |= (message[at] & 127) << shift
    shift += 7
  return value, at + 1
