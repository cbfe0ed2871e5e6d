"""Conversations to ids and labels: what the assistant says is learned.

With `chat` and `sharegpt` the model's own chat template writes a conversation
as one text, special tokens included, and `tokenizers` reads them there, BOS
too: nothing is added. A special token that is spelled in a message is NOT read:
it gets the ids of its characters, or a user could end his own message and go on
as another. Learned is what `{% generation %}` marks in the template, else what
a message of the assistant's adds to the text; in both the special token that
ends the message, and not the white space after it.

With `mistral_v1` and so on, see mistral_chat.py.
"""

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lorax_train.data import conversation as conversation_lib
from lorax_train.data import mistral_chat
from lorax_train.data.chat_template import ChatTemplate, Rendered
from lorax_train.data.conversation import Conversation, texts_of
from lorax_train.data.encoded import NO_LOSS, Drop, Encoded, caught, in_parts
from lorax_train.data.library import Located, spelling
from lorax_train.data.problems import RowError
from lorax_train.data.rows import Row
from lorax_train.errors import ModelError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

# A special token's spelling in a message, while the template has it: one
# private-use character (Unicode plane 15).
_SPELLED = 0xF0000


class _Chat(NamedTuple):
  """For `Tokenizer.encode_chat`, and the learned spans in its coordinates."""

  text: str | list[str | int]
  spans: list[tuple[int, int]]


def encode_conversations(
  rows: Iterable[Row], name: str, tokenizer: 'Tokenizer'
) -> Iterator[tuple[Row, Encoded | RowError]]:
  """Each row with its encoding, or with what is wrong with it.

  Raises:
    ModelError: the model has no chat template, or one that fails; or the format
      is not its own.
  """
  if name in mistral_chat.FORMATS:
    mistral_chat.check(name, tokenizer)
    yield from _encode_mistral(rows, name, tokenizer)
    return
  with _template(name, tokenizer) as template:
    reader = _Reader(template, name, tokenizer)
    for part in in_parts(rows):
      chats = [caught(reader.chat, row) for row in part]
      good = [c for c in chats if not isinstance(c, RowError)]
      located = iter(tokenizer.encode_chat([c.text for c in good]))
      for row, chat in zip(part, chats, strict=True):
        if isinstance(chat, RowError):
          yield row, chat
        else:
          yield row, caught(_labelled, next(located), chat.spans, tokenizer)


def contents(fields: Mapping[str, Any], name: str) -> list[str]:
  """The texts of a row's messages.

  Raises:
    RowError: it holds no conversation.
  """
  return [m['content'] for m in conversation_lib.read(fields, name).messages]


def _encode_mistral(
  rows: Iterable[Row], name: str, tokenizer: 'Tokenizer'
) -> Iterator[tuple[Row, Encoded | RowError]]:
  def pieces(fields: Mapping[str, Any]) -> list[mistral_chat.Piece]:
    conversation = conversation_lib.read(fields, name)
    return list(mistral_chat.pieces(conversation, name, tokenizer))

  for part in in_parts(rows):
    made = [caught(pieces, row.fields) for row in part]
    encoded = iter(
      tokenizer.encode(
        [
          text
          for of_row in made
          if not isinstance(of_row, RowError)
          for text, _ in of_row
          if isinstance(text, str)
        ]
      )
    )
    for row, of_row in zip(part, made, strict=True):
      if isinstance(of_row, RowError):
        yield row, of_row
        continue
      ids: list[int] = []
      labels: list[int] = []
      for piece, learned in of_row:
        new = next(encoded) if isinstance(piece, str) else [piece]
        ids += new
        labels += new if learned else [NO_LOSS] * len(new)
      yield row, _encoded(ids, labels, tokenizer)


def _template(name: str, tokenizer: 'Tokenizer') -> ChatTemplate:
  if tokenizer.chat_template is None:
    raise ModelError(
      f'data.template={name}: {tokenizer.folder} has no chat template; put a'
      ' chat_template.jinja there, or name the format it was trained with, such'
      f' as {" or ".join(mistral_chat.fitting(tokenizer))}'
    )
  where = f'the chat template of {tokenizer.folder}'
  return ChatTemplate(tokenizer.chat_template, tokenizer.names, where)


class _Reader:
  """Rows to texts, by one template."""

  def __init__(self, template: ChatTemplate, name: str, tokenizer: 'Tokenizer'):
    self._template = template
    self._name = name
    self._tokenizer = tokenizer
    source = tokenizer.chat_template or ''
    self._reads = {
      'tools': bool(re.search(r'\btools\b', source)),
      'tool_calls': 'tool_calls' in source,
      'tool': bool(re.search(r"""['"]tool['"]""", source)),
    }
    self._special = spelling(tokenizer.special)
    self._added = spelling(tokenizer.added)
    self._marks = {
      token: chr(_SPELLED + n) for n, token in enumerate(tokenizer.special)
    }
    self._spelled = {mark: token for token, mark in self._marks.items()}
    self._marked = spelling([*tokenizer.special, *self._spelled])

  def chat(self, row: Row) -> _Chat:
    """What a row is as a text, or as pieces where it spells special tokens.

    Raises:
      RowError: the row or the template can't be used for it.
      ModelError: the template is no good, with the place of the row.
    """
    try:
      return self._chat(row.fields)
    except ModelError as error:
      raise ModelError(f'{row.where}: {error}') from error

  def _chat(self, fields: Mapping[str, Any]) -> _Chat:
    conversation = conversation_lib.read(fields, self._name)
    self._check_tools(conversation)
    texts = [*texts_of(conversation.messages), *texts_of(conversation.tools)]
    if not any(self._special.search(text) for text in texts):
      rendered = self._template.render(*conversation)
      return _Chat(rendered.text, self._ends(rendered))
    for text in texts:
      if any(c >= chr(_SPELLED) for c in text):
        raise RowError(
          'private-use characters from U+F0000 on, beside the spelling of a'
          ' special token'
        )
    rendered = self._template.render(
      self._with_marks(conversation.messages),
      self._with_marks(conversation.tools),
    )
    return self._pieces(rendered.text, self._ends(rendered))

  def _check_tools(self, conversation: Conversation) -> None:
    if conversation.tools and not self._reads['tools']:
      raise RowError("the chat template reads no 'tools'")
    for n, message in enumerate(conversation.messages, start=1):
      if message['role'] == 'tool' and not self._reads['tool']:
        raise RowError("the chat template has no role 'tool'", f'message {n}')
      if 'tool_calls' in message and not self._reads['tool_calls']:
        raise RowError(
          "the chat template reads no 'tool_calls'", f'message {n}'
        )

  def _with_marks(self, value: Any) -> Any:
    if isinstance(value, str):
      return self._special.sub(lambda m: self._marks[m[0]], value)
    if isinstance(value, dict):
      return {
        self._with_marks(key): self._with_marks(inner)
        for key, inner in value.items()
      }
    if isinstance(value, list):
      return [self._with_marks(inner) for inner in value]
    return value

  def _ends(self, rendered: Rendered) -> list[tuple[int, int]]:
    """The spans, each to the special token that ends the message.

    Raises:
      RowError: the last has none: no answer would learn to end.
      Drop: there is no span.
    """
    text = rendered.text
    spans = []
    closed = False
    for begin, end in rendered.spans:
      found = [*self._added.finditer(text, begin, end)]
      closed = bool(found) and not text[found[-1].end() : end].strip()
      if closed:
        end = found[-1].end()
      elif rendered.marked:
        # Marks that leave the end token out would teach answers without end.
        after = _SPACE.match(text, end)
        follows = self._added.match(text, after.end() if after else end)
        closed = follows is not None
        end = follows.end() if follows else end
      spans.append((begin, end))
    if not spans:
      raise Drop('nothing to learn', 'the chat template marks nothing')
    if not closed:
      raise RowError(
        'the chat template puts no special token after an answer, so none would'
        ' learn to end'
      )
    return spans

  def _pieces(self, text: str, spans: list[tuple[int, int]]) -> _Chat:
    """Special tokens as ids, one wide; what messages spell as text again."""
    pieces: list[str | int] = []
    plain = ''
    places: list[tuple[int, int]] = [(0, 0)]  # of both texts, where they shift
    width = 0
    parts = self._marked.split(text)
    at = 0
    for n, part in enumerate(parts):
      at += len(part)
      if n % 2 and part not in self._spelled:
        pieces += [plain, self._tokenizer.special[part]]
        plain = ''
        width += 1
      else:
        part = self._spelled.get(part, part)
        plain += part
        width += len(part)
      places.append((at, width))
    pieces.append(plain)

    def moved(place: int) -> int:
      n = bisect.bisect_right(places, place, key=lambda pair: pair[0])
      before, after = places[n - 1]
      return after + place - before

    return _Chat(pieces, [(moved(b), moved(e)) for b, e in spans])


_SPACE = re.compile(r'\s*')


def _labelled(
  located: Located, spans: list[tuple[int, int]], tokenizer: 'Tokenizer'
) -> Encoded:
  """Learned is each token that has a character of a span."""
  labels: list[int] = []
  merged = False
  waiting = iter([*spans, (1 << 62, 1 << 62)])
  begin, end = next(waiting)
  special = {*tokenizer.special.values()}
  for id, (start, stop) in zip(*located, strict=True):
    while start >= end:
      begin, end = next(waiting)
    # Parts of a character, bytes, may have no width of their own; and a special
    # token before an answer may have eaten the spaces that the answer begins
    # with.
    learned = start >= begin or (stop > begin and id not in special)
    merged |= learned and start < begin
    labels.append(id if learned else NO_LOSS)
  return _encoded(located.ids, labels, tokenizer, merged)


def _encoded(
  ids: list[int],
  labels: list[int],
  tokenizer: 'Tokenizer',
  merged: bool = False,
) -> Encoded:
  bos = int(tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id])
  first = next((n for n, v in enumerate(labels) if v != NO_LOSS), None)
  if first is None:
    raise Drop('nothing to learn', 'what the assistant says has no tokens')
  prompt = max(first - bos, 0)
  return Encoded(ids, labels, bos=bos, prompt=prompt, merged=merged)
