"""tokenizer.json out of a lone tokenizer.model, with sentencepiece's ids.

Most of what reads an adapter or a merged model (transformers, PEFT, vLLM) takes
tokenizer.json, and makes one of its own where it is absent: with transformers
5.23 its ids differ from sentencepiece's. The one made here does what
sentencepiece's BPE does (Kudo and Richardson, arXiv:1808.06226; its
bpe_model.cc) by the means of `tokenizers`: the space before a text and U+2581
for each space, user-defined pieces first, then the adjacent pair whose piece
has the best score, the leftmost of equals. What can't be done so is refused.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from lorax_train.data.model_proto import (
  CONTROL,
  NORMAL,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
  ModelProto,
  parse,
)
from lorax_train.data.problems import one_line, shorten
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.errors import ModelError

_JSON = 'tokenizer.json'
_MODEL = 'tokenizer.model'
_CONFIG = 'tokenizer_config.json'
_SPACE = '▁'
# Cuts of a piece are as many as it has characters; real ones have 16 or so.
_LONGEST = 512
# Runs of one character whose pieces share a score are tried out, so bounded.
_LONGEST_RUN = 64
_MOST_TIES = 16
# Alternatives of one pattern that is tried at each character of a text.
_MOST_USER_DEFINED = 4096


class _Refused(ValueError):
  """What can't be made equal, in words."""


def build(
  model_file: str | Path, bos_id: int | None = -1
) -> tokenizers.Tokenizer:
  """The same tokenizer for `tokenizers`: equal ids, and texts of them.

  Special tokens are the control pieces.

  Args:
    model_file: a tokenizer.model.
    bos_id: what its post-processor begins a text with, None for nothing; -1
      for the model's own BOS, if it has one.

  Raises:
    ModelError: not a sentencepiece model, or one that `tokenizers` can't equal,
      naming why.
  """
  path = Path(model_file)
  try:
    # model_file: an empty model_proto would load as an empty model, unseen.
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    proto = parse(reference.serialized_model_proto())
  except Exception as error:  # the library raises kinds of its own
    raise ModelError(
      f'{path}: not a tokenizer ({shorten(one_line(str(error)), 120)}); fetch'
      ' the file again'
    ) from error
  try:
    _check(proto)
    tokenizer = _assemble(proto)
    if bos_id == -1:
      bos_id = reference.bos_id() if reference.bos_id() >= 0 else None
    if bos_id is not None:
      _begin_with(tokenizer, bos_id)
    _compare(tokenizer, reference, proto)
  except _Refused as error:
    raise ModelError(
      f'{path}: no {_JSON} can be made of it: {error}; use the {_JSON} that'
      ' belongs to the model'
    ) from error
  return tokenizer


def missing_files(model_dir: str | Path) -> tuple[dict[str, bytes], str]:
  """What a directory with a lone tokenizer.model lacks.

  Returns:
    {name: content} of tokenizer.json and of the tokenizer_config.json that
    makes transformers take it as it is, and ''; or {} and, where none can be
    made, why.
  """
  folder = Path(model_dir)
  if (folder / _JSON).is_file() or not (folder / _MODEL).is_file():
    return {}, ''
  try:
    own = load_tokenizer(folder)
    made = build(folder / _MODEL, own.bos_id)
  except ModelError as error:
    return {}, str(error)
  path = folder / _CONFIG
  config = json.loads(path.read_bytes()) if path.is_file() else {}
  named = {
    'eos_token': own.piece(own.eos_id),
    'unk_token': made.model.unk_token,
  }
  if own.bos_id is not None:
    named['bos_token'] = own.piece(own.bos_id)
  config = {
    'clean_up_tokenization_spaces': False,
    **named,
    **{key: value for key, value in config.items() if value is not None},
    'add_bos_token': own.bos_id is not None,
    # The one class that leaves tokenizer.json as it is: Llama's has rules of
    # its own for spaces.
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
  return {_JSON: made.to_str().encode(), _CONFIG: text.encode()}, ''


def _check(proto: ModelProto) -> None:
  """Refuses what the parts below do not do."""
  pieces = proto.pieces
  mine = [p for p in pieces if p.kind == USER_DEFINED]
  long = [p for p in pieces if len(p.text) > _LONGEST]
  refused = {
    f'a {proto.kind} model, not BPE': proto.kind != 'BPE',
    'a normalizer that replaces characters': proto.charsmap,
    'remove_extra_whitespaces': proto.remove_extra_whitespaces,
    'no escape_whitespaces': not proto.escape_whitespaces,
    'treat_whitespace_as_suffix': proto.whitespace_as_suffix,
    'a denormalizer': proto.denormalizes,
    'unused pieces': any(p.kind == UNUSED for p in pieces),
    'no piece for a space': all(p.text != _SPACE for p in pieces),
    'a control piece of one character': any(
      p.kind == CONTROL and len(p.text) == 1 for p in pieces
    ),
    f'a piece of more than {_LONGEST} characters': bool(long),
    f'{len(mine)} user-defined pieces': len(mine) > _MOST_USER_DEFINED,
    'scores that are not finite': not all(
      math.isfinite(p.score) for p in pieces
    ),
  }
  told = [what for what, is_so in refused.items() if is_so]
  if told:
    raise _Refused(', '.join(told))


def _assemble(proto: ModelProto) -> tokenizers.Tokenizer:
  ids = {piece.text: id for id, piece in enumerate(proto.pieces)}
  mine = [p.text for p in proto.pieces if p.kind == USER_DEFINED]
  unk = next(p.text for p in proto.pieces if p.kind == UNKNOWN)
  merges = _merges(proto)

  def bpe(ignore_merges: bool) -> models.BPE:
    return models.BPE(
      ids,
      merges,
      unk_token=unk,
      fuse_unk=True,
      byte_fallback=proto.byte_fallback,
      ignore_merges=ignore_merges,
    )

  tokenizer = tokenizers.Tokenizer(bpe(False))
  if mine:
    # Each is cut out and then taken whole; what else might be is cut in two.
    # Added tokens would not do: no space is put before one that comes first.
    cuts = [_any_of(mine), *_cuts(tokenizer, proto)]
    tokenizer.model = bpe(True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(cut), 'isolated') for cut in cuts]
    )
  prefix = [normalizers.Prepend(_SPACE)] if proto.dummy_prefix else []
  tokenizer.normalizer = normalizers.Sequence(
    [*prefix, normalizers.Replace(' ', _SPACE)]
  )
  spelled = _literal(unk.replace(_SPACE, ' '))
  strip = [decoders.Strip(' ', 1, 0)] if proto.dummy_prefix else []
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.Replace(Regex(rf'\A{spelled}\z'), proto.unk_surface),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  tokenizer.add_special_tokens(
    [
      AddedToken(piece.text, special=True, normalized=False)
      for piece in proto.pieces
      if piece.kind == CONTROL
    ]
  )
  return tokenizer


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
  """Pairs, the first to be merged first.

  sentencepiece merges any two neighbours whose sum is a piece, so a piece has
  a pair for each of its cuts. Of pairs with one score the longest left one is
  first, as it is the leftmost in a run of one character (`_check_ties`).
  """
  score = {p.text: p.score for p in proto.pieces if p.kind == NORMAL}
  mine = {p.text for p in proto.pieces if p.kind == USER_DEFINED}
  pairs = []
  for piece in score:
    for cut in range(1, len(piece)):
      pair = piece[:cut], piece[cut:]
      if all(half in score for half in pair):
        pairs.append(pair)
      elif all(
        half in score or (len(half) == 1 and half not in mine) for half in pair
      ):
        raise _Refused(
          f'piece {shorten(repr(piece))} has a character that is no piece'
        )
  pairs.sort(key=lambda pair: (-score[''.join(pair)], -len(pair[0])))
  _check_ties(pairs, score)
  return pairs


def _check_ties(
  pairs: Sequence[tuple[str, str]], score: Mapping[str, float]
) -> None:
  """Refuses pieces of one score, unless they are runs of one character.

  `tokenizers` knows an order of pairs, sentencepiece takes the leftmost of
  equals. Mistral's runs of spaces do share a score; there, what either does
  with a run of any length is tried out.
  """
  equal = defaultdict(set)
  for pair in pairs:
    equal[score[''.join(pair)]].add(''.join(pair))
  tied = [group for group in equal.values() if len(group) > 1]
  if len(tied) > _MOST_TIES:
    raise _Refused(f'{len(tied)} scores that several pieces have')
  for group in tied:
    first = min(group)[0]
    others = any(
      len(half) > 1 and set(half) == {first} and set(left + right) != {first}
      for left, right in pairs
      for half in (left, right)
    )
    runs = {''.join(p) for p in pairs if set(''.join(p)) == {first}}
    lengths = {len(piece) for piece in group}
    if group != runs or others or max(lengths) > _LONGEST_RUN:
      a, b = sorted(group)[:2]
      raise _Refused(
        f'{len(group)} pieces have one score, such as {shorten(repr(a))} and'
        f' {shorten(repr(b))}'
      )
    for n in range(2, 4 * max(lengths) + 4):
      leftmost = _merge_run(n, lengths, lambda left, right: 0)
      ordered = _merge_run(n, lengths, lambda left, right: -left)
      if leftmost != ordered:
        raise _Refused(f'runs of {first!r} have pieces of one score')


def _merge_run(n: int, lengths: set[int], rank: Any) -> list[int]:
  """Lengths of the pieces of n equal characters; the lowest rank goes first."""
  run = [1] * n
  while True:
    able = [
      (rank(run[at], run[at + 1]), at)
      for at in range(len(run) - 1)
      if run[at] + run[at + 1] in lengths
    ]
    if not able:
      return run
    at = min(able)[1]
    run[at : at + 2] = [run[at] + run[at + 1]]


def _cuts(tokenizer: tokenizers.Tokenizer, proto: ModelProto) -> list[str]:
  """What cuts texts that spell a piece, yet are not it, where all is whole.

  Such are "</s>", "<0x0A>" and pieces that no merges lead to. One that stands
  alone between two user-defined pieces would be taken whole, but for a cut
  where its own pieces meet.
  """
  texts = [p.text for p in proto.pieces if p.kind != USER_DEFINED]
  apart: dict[str, list[int]] = {}
  for text, made in zip(
    texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
  ):
    if made.tokens != [text]:
      apart[text] = sorted({start for start, _ in made.offsets} - {0})
  ends = defaultdict(list)
  for text, cuts in apart.items():
    for cut in cuts:
      if text[:cut] not in apart and text[cut:] not in apart:
        ends[text[:cut]].append(text[cut:])
        break
    else:
      # One of one character, or all of it unknown, is what it would be anyway.
      if cuts:
        raise _Refused(f'piece {shorten(repr(text))} beside user-defined ones')
  if not ends:
    return []
  parts = [rf'{_literal(a)}(?={_any_of(b)}\z)' for a, b in ends.items()]
  return [rf'\A(?:{"|".join(parts)})']


def _any_of(texts: Sequence[str]) -> str:
  """A pattern of any of them, the longest that fits."""
  ordered = sorted(texts, key=len, reverse=True)
  return f'(?:{"|".join(map(_literal, ordered))})'


def _literal(text: str) -> str:
  return re.sub(r'[^0-9A-Za-z]', lambda m: rf'\x{{{ord(m[0]):X}}}', text)


def _begin_with(tokenizer: tokenizers.Tokenizer, id: int) -> None:
  bos = tokenizer.id_to_token(id)
  if bos not in {
    t.content for t in tokenizer.get_added_tokens_decoder().values()
  }:
    raise _Refused(f'BOS {shorten(repr(bos))} is no control piece')
  if re.search(r'[\s:$]', bos):
    raise _Refused(f'BOS {shorten(repr(bos))} has a space, colon or dollar')
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[bos, '$A'],
    pair=[bos, '$A', f'{bos}:1', '$B:1'],
    special_tokens=[(bos, id)],
  )


def _compare(
  tokenizer: tokenizers.Tokenizer,
  reference: sentencepiece.SentencePieceProcessor,
  proto: ModelProto,
) -> None:
  """Each piece as a text, by both: the rules above have to hold for all."""
  texts = [piece.text.replace(_SPACE, ' ') for piece in proto.pieces]
  tokenizer.encode_special_tokens = True
  made = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  tokenizer.encode_special_tokens = False
  wanted = reference.encode(texts, out_type=int)
  for text, encoding, ids in zip(texts, made, wanted, strict=True):
    if encoding.ids != ids:
      raise _Refused(f'ids of {shorten(repr(text))} differ')
