"""What the model makes of held-out prompts, as training goes on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from lorax_train import lora
from lorax_train.config import TrainConfig
from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.problems import one_line, shorten
from lorax_train.infer import complete, generate
from lorax_train.models.mistral import Decoder
from lorax_train.models.params import DecoderConfig
from lorax_train.train.rows import Rows

Tree = Any
Line = Mapping[str, Any]  # of metrics.jsonl
Texts = dict[str, str]  # by place of the row

FILE = 'samples.md'

_NEW_TOKENS = 64
_OPTIONS = generate.Options(max_new_tokens=_NEW_TOKENS)


class Sample(NamedTuple):
  """A row that is not trained on.

  Attributes:
    where: its place in the data.
    prompt: ids, BOS included.
    prompt_text: as text.
    wanted: the row's own completion; of a conversation, the first answer.
  """

  where: str
  prompt: list[int]
  prompt_text: str
  wanted: str


def choose(rows: Rows, n: int) -> list[Sample]:
  """The first `n` held-out rows that have a prompt.

  Returns:
    Fewer, down to none, where there are no more, or no tokenizer to read them.
  """
  chosen: list[Sample] = []
  if rows.tokenizer is None:
    return chosen
  for i in rows.eval_rows:
    ids, labels = rows.eval_set.ids[i].tolist(), rows.eval_set.labels[i]
    learned = labels != NO_LOSS
    begin = int(learned.argmax())
    rest = learned[begin:]
    end = len(ids) if rest.all() else begin + int(rest.argmin())
    prompt = ids[:begin]
    known = any(rows.eval_set.where[i] == sample.where for sample in chosen)
    if len(chosen) < n and prompt and not known:
      text = rows.tokenizer.decode(prompt)
      wanted = complete.continuation(rows.tokenizer, prompt, ids[begin:end])
      chosen.append(Sample(rows.eval_set.where[i], prompt, text, wanted))
  return chosen


def make_answer(
  cfg: TrainConfig,
  model_cfg: DecoderConfig,
  model_dir: Path,
  frozen: Tree,
  rows: Rows,
  chosen: Sequence[Sample],
) -> Callable[[Tree], Texts]:
  """trainable -> what each of the chosen prompts is continued with, greedily."""
  model = Decoder(model_cfg, jnp.dtype(cfg.model.dtype))

  def answer(trainable: Tree) -> Texts:
    if not chosen:
      return {}
    assert rows.tokenizer is not None
    prompts = [sample.prompt for sample in chosen]
    stop_ids = complete.stop_ids(model_dir, rows.tokenizer)
    params = lora.bind(frozen, trainable)
    done = generate.batches(model, params, prompts, _OPTIONS, stop_ids)
    new = [ids for batch, _ in done for ids in batch]
    return {
      sample.where: complete.continuation(rows.tokenizer, sample.prompt, ids)
      for sample, ids in zip(chosen, new, strict=True)
    }

  return answer


def by_step(lines: Sequence[Line]) -> dict[int, Texts]:
  """{step: the texts at it}, from lines of metrics.jsonl."""
  return {line['step']: line['samples'] for line in lines if 'samples' in line}


def to_markdown(chosen: Sequence[Sample], lines: Sequence[Line]) -> str:
  """samples.md: each prompt whole, and what it led to at each step."""
  parts = [
    '# Samples\n',
    'Rows that were not trained on, continued greedily with at most'
    f' {_NEW_TOKENS} tokens.\n',
  ]
  steps = by_step(lines)
  for sample in chosen:
    parts.append(f'## {sample.where}\n')
    parts.append(_block('Prompt', sample.prompt_text))
    parts.append(_block("The row's own completion", sample.wanted))
    parts += [
      _block(f'Step {at}', texts[sample.where])
      for at, texts in steps.items()
      if sample.where in texts
    ]
  return '\n'.join(parts)


def _block(title: str, text: str) -> str:
  """A title and a fenced text, the fence longer than any in it."""
  fence = '```'
  while fence in text:
    fence += '`'
  return f'{title}:\n\n{fence}text\n{text}\n{fence}\n'


def before_and_after(
  chosen: Sequence[Sample], lines: Sequence[Line], width: int = 200
) -> str:
  """For the terminal: each prompt and its first and last continuation.

  Args:
    chosen: from `choose`.
    lines: of metrics.jsonl.
    width: characters of a text; of a prompt, what all have in common (the
      template) is left out first.
  """
  steps = by_step(lines)
  if not chosen or not steps:
    return ''
  prompts = _less_common_ends([sample.prompt_text for sample in chosen])
  shown = []
  for n, sample in enumerate(chosen):
    rows = {'prompt': prompts[n], 'wanted': sample.wanted}
    rows |= {
      f'step {at}': steps[at][sample.where]
      for at in (min(steps), max(steps))
      if sample.where in steps[at]
    }
    shown += [
      f'{key:<10} {shorten(one_line(text), width)}'
      for key, text in rows.items()
    ]
    shown.append('')
  return '\n'.join(shown)


def _less_common_ends(texts: Sequence[str]) -> list[str]:
  """What is left of texts without the front and the end they share.

  >>> _less_common_ends(['say: 1 now', 'say: 22 now'])
  ['1', '22']
  >>> _less_common_ends(['alone'])
  ['alone']
  """
  if len(set(texts)) < 2:
    return list(texts)
  front = _shared(texts)
  rest = [text[front:] for text in texts]
  end = _shared([text[::-1] for text in rest])
  return [text[: len(text) - end] for text in rest]


def _shared(texts: Sequence[str]) -> int:
  """How many first characters are the same in all texts."""
  columns = enumerate(zip(*texts, strict=False))
  shortest = min(map(len, texts))
  return next((i for i, column in columns if len(set(column)) > 1), shortest)
