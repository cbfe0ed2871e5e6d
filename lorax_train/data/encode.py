"""A row to ids and labels at its full length."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lorax_train.data import sequences
from lorax_train.data.chat import encode_conversations
from lorax_train.data.choices import Choices
from lorax_train.data.encoded import NO_LOSS, Drop, Encoded, caught, in_parts
from lorax_train.data.problems import RowError
from lorax_train.data.rows import Row
from lorax_train.data.sequences import EncodedChoices
from lorax_train.data.template import (
  CONVERSATIONS,
  TOKENS,
  Example,
  Render,
  template_named,
)
from lorax_train.errors import ModelError

if TYPE_CHECKING:
  from lorax_train.data.tokenize import Tokenizer

_MAX_ID = np.iinfo(np.int32).max


def encode_rows(
  rows: Iterable[Row], template: str, tokenizer: 'Tokenizer | None'
) -> Iterator[tuple[Row, Encoded | EncodedChoices | RowError]]:
  """Each row with its full-length encoding, or with what is wrong with it.

  The rules are told at `tokenized.tokenize_rows`.

  Raises:
    DataError: no such template.
    ModelError: the template needs a tokenizer and there is none, or the model
      has no chat template.
  """
  if template == TOKENS:
    for row in rows:
      yield row, caught(_from_tokens, row.fields)
    return
  chats = template in CONVERSATIONS
  render = None if chats else template_named(template)
  if tokenizer is None:
    raise ModelError(
      f'data.template={template} needs a tokenizer, and the model has none; put'
      ' its tokenizer.json there, or use data.template=tokens'
    )
  if render is None:
    yield from encode_conversations(rows, template, tokenizer)
    return
  for part in in_parts(rows):
    examples = [caught(_rendered, render, row.fields) for row in part]
    good = [e for e in examples if not isinstance(e, RowError)]
    prompts = iter(tokenizer.encode([e.prompt for e in good]))
    joints = iter(tokenizer.encode([t for e in good for t in wholes(e)]))
    for row, example in zip(part, examples, strict=True):
      if isinstance(example, RowError):
        yield row, example
        continue
      prompt, bos_id = next(prompts), tokenizer.bos_id
      if isinstance(example, Choices):
        own = [next(joints) for _ in example.choices]
        args = prompt, own, example.answer, bos_id
        yield row, caught(sequences.encoded, *args)
      else:
        ids = prompt, next(joints), bos_id, tokenizer.eos_id
        yield row, caught(_labelled, *ids)


def wholes(example: Example | Choices) -> list[str]:
  """The prompt with what follows it, or with each text that may."""
  if isinstance(example, Choices):
    return [example.prompt + text for text in example.choices]
  return [example.prompt + example.completion]


def _rendered(render: Render, fields: Mapping[str, Any]) -> Example | Choices:
  example = render(fields)
  if isinstance(example, Example) and not example.completion.strip():
    raise RowError('empty completion')
  return example


def _labelled(
  prompt: list[int], joint: list[int], bos_id: int | None, eos_id: int
) -> Encoded:
  n = sequences.common(prompt, joint)
  if n == len(joint):
    # White space or the like, which the tokenizer's normaliser took away.
    raise Drop('nothing to learn', 'the completion has no tokens')
  bos = [] if bos_id is None else [bos_id]
  return Encoded(
    ids=[*bos, *joint, eos_id],
    labels=[NO_LOSS] * (len(bos) + n) + [*joint[n:], eos_id],
    bos=len(bos),
    prompt=n,
    merged=n < len(prompt),
  )


def _from_tokens(fields: Mapping[str, Any]) -> Encoded:
  if 'input_ids' not in fields:
    raise RowError("no column 'input_ids'")
  ids = fields['input_ids']
  labels = fields.get('labels')
  labels = ids if labels is None else labels
  for name, values in (('input_ids', ids), ('labels', labels)):
    if not isinstance(values, list) or not all(type(v) is int for v in values):
      raise RowError(f'column {name!r} is not a list of integers')
    if any(v > _MAX_ID for v in values):
      raise RowError(f'column {name!r} holds an integer over 32 bits')
  if not ids:
    raise RowError("column 'input_ids' is empty")
  if len(ids) != len(labels):
    raise RowError(
      "'input_ids' and 'labels' differ in length", f'{len(ids)}, {len(labels)}'
    )
  if min(ids) < 0:
    raise RowError("column 'input_ids' holds a negative id", f'{min(ids)}')
  if any(v < 0 and v != NO_LOSS for v in labels):
    raise RowError(f"column 'labels' holds a negative other than {NO_LOSS}")
  return Encoded(ids, labels, bos=0, prompt=len(ids))
