"""Tokenizers as model directories hold them: text to ids and back.

`tokenizer.json` goes through `tokenizers`, a lone `tokenizer.model` through
`sentencepiece`; nothing else reads either file right (with transformers 5.23
a Mistral directory that has only `tokenizer.model` gives wrong ids). No special
token is ever added here, and none is read out of a text: a row that spells
"</s>" gets the ids of those four characters, not the end of a sequence. Two
things the libraries do match in a text: sentencepiece's user-defined pieces,
and tokenizer.json's added tokens that are not marked special. The texts that
chat templates write are another matter: see chat.py.

Rows to ids is tokenized.py; its names are offered here as well.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_train.data.library import (
  Library,
  Located,
  SentencePieceLibrary,
  TokenizersLibrary,
)
from lorax_train.data.problems import one_line, shorten
from lorax_train.data.tokenized import (
  Report,
  TokenizedSet,
  check_ids,
  tokenize_rows,
)
from lorax_train.errors import ModelError

__all__ = [
  'Report',
  'TokenizedSet',
  'Tokenizer',
  'check_ids',
  'check_same_ids',
  'check_vocabulary',
  'load_tokenizer',
  'tokenize_rows',
]

_JSON = 'tokenizer.json'
_MODEL = 'tokenizer.model'
_CONFIG = 'tokenizer_config.json'
_SPECIAL = 'special_tokens_map.json'
_TEMPLATE = 'chat_template.jinja'
_FILES = (_JSON, _MODEL, _CONFIG, _SPECIAL, _TEMPLATE)

# What chat templates call the special tokens: bos_token and so on.
_NAMES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """One model's tokenizer; `load_tokenizer` makes it.

  Attributes:
    bos_id: what a sequence begins with, None where this model adds no BOS.
    eos_id: what a sequence ends with.
    pad_id: fills a batch up; masked, so it never meets the loss.
    size: the highest id of any piece, added tokens too, plus 1.
    files: what to copy beside an adapter.
    fingerprint: sha256 over the names and contents of `files`.
    names: spellings of the special tokens by what chat templates call them,
      {'bos_token': '<s>'}.
    chat_template: in Jinja, None where the directory has none.
  """

  library: Library
  bos_id: int | None
  eos_id: int
  pad_id: int
  size: int
  files: tuple[Path, ...]
  fingerprint: str
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  chat_template: str | None = None

  @property
  def folder(self) -> Path:
    """The model directory."""
    return self.files[0].parent

  @property
  def special(self) -> Mapping[str, int]:
    """Ids of the special tokens by their spelling."""
    return self.library.special

  @property
  def added(self) -> Mapping[str, int]:
    """The same, and all else that is never the product of a merge."""
    return self.library.added

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; no BOS or EOS, and none read out of the text."""
    return self.library.encode(texts)

  def encode_chat(
    self, chats: Sequence[str | list[str | int]]
  ) -> list[Located]:
    """Ids and offsets of texts in which special tokens ARE read.

    Args:
      chats: each a text; or a list of texts in which none is read, and of
        special tokens by id, which count as one character in the offsets.
    """
    return self.library.encode_chat(chats)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; special tokens such as BOS and EOS give none."""
    return self.library.decode(ids)

  def piece(self, id: int) -> str:
    """The piece as the vocabulary spells it; `<no piece 7>` for a gap."""
    piece = self.library.piece(id)
    return f'<no piece {id}>' if piece is None else piece


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
  """Reads the tokenizer of a model directory.

  Raises:
    ModelError: files are absent or corrupt, or no EOS is named anywhere.
  """
  folder = Path(model_dir)
  for name in (_JSON, _MODEL):
    if (folder / name).is_file():
      library = _open(folder / name)
      break
  else:
    raise ModelError(f'{folder}: no tokenizer; put {_JSON} or {_MODEL} there')
  config = _read_json(folder / _CONFIG)
  maps = (config, _read_json(folder / _SPECIAL))
  model_config = _read_json(folder / 'config.json')
  eos_id = _special(folder, library, 'eos', maps, model_config)
  if eos_id is None:
    raise ModelError(
      f'{folder}: no EOS token, so no answer could ever end; name it as'
      f' "eos_token" in {_CONFIG}'
    )
  bos_id = _special(folder, library, 'bos', maps, model_config)
  add_bos = config.get('add_bos_token')
  if add_bos is None:
    add_bos = bos_id is not None and library.adds_bos(bos_id)
  elif add_bos and bos_id is None:
    raise ModelError(
      f'{folder}/{_CONFIG}: add_bos_token is true but no BOS token is named;'
      ' name it as "bos_token" there'
    )
  files = tuple(folder / name for name in _FILES if (folder / name).is_file())
  return Tokenizer(
    library=library,
    bos_id=bos_id if add_bos else None,
    eos_id=eos_id,
    pad_id=_pad(library, maps),
    size=library.size,
    files=files,
    fingerprint=_fingerprint(files),
    names=_names(library, maps, bos_id, eos_id),
    chat_template=_chat_template(folder, config),
  )


def _names(
  library: Library,
  maps: Sequence[dict[str, Any]],
  bos_id: int | None,
  eos_id: int,
) -> dict[str, str]:
  """What the files name, and for BOS and EOS what stands for them anyhow."""
  ids = {'bos': bos_id, 'eos': eos_id}
  spelled = {n: None if i is None else library.piece(i) for n, i in ids.items()}
  named = {n: _named(maps, n) or spelled.get(n) for n in _NAMES}
  return {f'{n}_token': token for n, token in named.items() if token}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
  """chat_template.jinja, or else tokenizer_config.json's, of several 'default'.

  What is neither a text nor such a list counts as none: most runs need none.
  """
  path = folder / _TEMPLATE
  if path.is_file():
    return path.read_bytes().decode('utf-8', 'replace')
  found = config.get('chat_template')
  if isinstance(found, list):
    found = {
      entry['name']: entry.get('template')
      for entry in found
      if isinstance(entry, dict) and isinstance(entry.get('name'), str)
    }.get('default')
  return found if isinstance(found, str) else None


def check_same_ids(model_dir: str | Path, texts: Sequence[str]) -> None:
  """Compares `tokenizer.json` with `tokenizer.model`, where both are there.

  A converted tokenizer.json can differ from the model it came from, and then
  the model is trained on ids it was never trained on. Nothing but trying shows
  it, so try on the texts that are about to be used.

  Raises:
    ModelError: naming the first text on which they differ.
  """
  paths = [Path(model_dir) / name for name in (_JSON, _MODEL)]
  if not all(path.is_file() for path in paths):
    return
  pairs = zip(*(_open(path).encode(texts) for path in paths), strict=True)
  different = [n for n, (a, b) in enumerate(pairs) if a != b]
  if not different:
    return
  text = texts[different[0]]
  a, b = (_open(path).encode([text])[0] for path in paths)
  at = next(
    (n for n, (i, j) in enumerate(zip(a, b, strict=False)) if i != j),
    min(len(a), len(b)),
  )
  ours, theirs = shorten(str(a[at:]), 40), shorten(str(b[at:]), 40)
  raise ModelError(
    f'{model_dir}: {_JSON} and {_MODEL} give different ids for'
    f' {len(different)} of {len(texts)} texts, first'
    f' {shorten(repr(text), 80)}: from id {at} on {ours} against {theirs};'
    ' remove the file that does not belong to the model'
  )


def check_vocabulary(tokenizer: Tokenizer, rows_in_embedding: int) -> None:
  """Refuses a tokenizer with pieces that the model has no embedding for.

  More embedding rows than pieces are fine: they are padding.

  Raises:
    ModelError: listing the first of those pieces.
  """
  ids = range(rows_in_embedding, tokenizer.size)
  if ids:
    pieces = ', '.join(f'{i} {tokenizer.piece(i)!r}' for i in ids[:5])
    raise ModelError(
      f'{tokenizer.files[0]}: {len(ids)} ids have no row in the embedding of'
      f' {rows_in_embedding}: {pieces}{", ..." if len(ids) > 5 else ""}; use'
      ' the tokenizer that belongs to the model'
    )


def _open(path: Path) -> Library:
  try:
    if path.name == _JSON:
      return TokenizersLibrary(path)
    return SentencePieceLibrary(path)
  except Exception as error:  # `tokenizers` raises Exception itself
    raise ModelError(
      f'{path}: not a tokenizer ({shorten(one_line(str(error)), 120)}); fetch'
      ' the file again'
    ) from error


def _read_json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ModelError(
      f'{path}: not JSON ({shorten(one_line(str(error)))}); fetch it again'
    ) from error
  if not isinstance(content, dict):
    raise ModelError(f'{path}: holds no JSON object; fetch it again')
  return content


def _named(maps: Sequence[dict[str, Any]], name: str) -> str | None:
  for content in maps:
    token = content.get(f'{name}_token')
    if isinstance(token, dict):  # an AddedToken, as older files spell it
      token = token.get('content')
    if isinstance(token, str):
      return token
  return None


def _special(
  folder: Path,
  library: Library,
  name: str,
  maps: Sequence[dict[str, Any]],
  model_config: dict[str, Any],
) -> int | None:
  """The id of BOS or EOS, from the files in the order of their authority."""
  token = _named(maps, name)
  if token is not None:
    id = library.id_of(token)
    if id is None:
      raise ModelError(
        f'{folder}: {name}_token {shorten(repr(token))} is no piece of the'
        f' vocabulary; use the {_CONFIG} that belongs to the tokenizer'
      )
    return id
  id = model_config.get(f'{name}_token_id')
  if isinstance(id, list):
    id = id[0] if id else None
  if id is None:
    return library.own(name)
  if type(id) is not int or library.piece(id) is None:
    raise ModelError(
      f'{folder}/config.json: {name}_token_id {shorten(repr(id))} is no id of'
      f' the tokenizer; name {name}_token in {_CONFIG}'
    )
  return id


def _pad(library: Library, maps: Sequence[dict[str, Any]]) -> int:
  """Any id would do, since padding is masked: the least surprising one."""
  for name in ('pad', 'unk'):
    token = _named(maps, name)
    id = library.own(name) if token is None else library.id_of(token)
    if id is not None:
      return id
  return 0


def _fingerprint(files: Sequence[Path]) -> str:
  digest = hashlib.sha256()
  for path in files:
    content = path.read_bytes()
    digest.update(f'{path.name} {len(content)}\n'.encode())
    digest.update(content)
  return digest.hexdigest()
