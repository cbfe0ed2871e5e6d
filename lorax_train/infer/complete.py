"""Texts from a model on disk: what the verb `generate` prints."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lorax_train.data import tokenize
from lorax_train.errors import DataError
from lorax_train.formats import find, hf_config
from lorax_train.formats.jsonfile import read_object
from lorax_train.infer.generate import Options, batches, check_prompts
from lorax_train.infer.load import load_model
from lorax_train.models.mistral import Decoder


def complete(
  model: str,
  texts: Sequence[str],
  options: Options,
  adapter: str | None = None,
  dtype: Any = jnp.float32,
  quant: str | None = None,
) -> Iterator[dict[str, Any]]:
  """Continues texts, batch by batch.

  Args:
    model: directory in Hugging Face format, or a hub id.
    texts: the prompts; BOS is put in front where the tokenizer has it so.
    options: how.
    adapter: PEFT adapter directory.
    dtype: compute and storage dtype.
    quant: see `load`.

  Yields:
    {'prompt', 'text', 'ids', 'tokens_per_second'} of each text in turn: the
    speed is that of its whole batch, without the time to compile.

  Raises:
    DataError: what is wrong with a prompt.
    ModelError: what is wrong with the model, the tokenizer or the adapter.
  """
  directory = find.find_model(model)
  cfg = hf_config.read_config(directory)
  tokenizer = tokenize.load_tokenizer(directory)
  tokenize.check_vocabulary(tokenizer, cfg.vocab)
  prompts = _encode(tokenizer, texts)
  longest = read_object(directory / 'config.json').get(
    'max_position_embeddings'
  )
  check_prompts(prompts, cfg.vocab, options, longest)
  stops = stop_ids(directory, tokenizer)
  loaded = load_model(directory, None, adapter, dtype, quant=quant)
  done = 0
  for rows, seconds in batches(
    Decoder(loaded.cfg, dtype), loaded.params, prompts, options, stops
  ):
    speed = sum(map(len, rows)) / seconds
    for ids in rows:
      yield {
        'prompt': texts[done],
        'text': continuation(tokenizer, prompts[done], ids),
        'ids': ids,
        'tokens_per_second': speed,
      }
      done += 1


def _encode(
  tokenizer: tokenize.Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
  """Ids of each prompt, with BOS where the tokenizer adds one."""
  for n, text in enumerate(texts, 1):
    try:
      text.encode('utf-8')
    except UnicodeEncodeError:
      raise DataError(f'prompt {n} is not UTF-8: write it so') from None
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return [bos + ids for ids in tokenizer.encode(texts)]


def stop_ids(directory: Path, tokenizer: tokenize.Tokenizer) -> list[int]:
  """The tokenizer's EOS, and what generation_config.json says besides."""
  path = directory / 'generation_config.json'
  said = read_object(path).get('eos_token_id') if path.is_file() else None
  more = said if isinstance(said, list) else [said]
  return [tokenizer.eos_id, *(id for id in more if type(id) is int)]


def continuation(
  tokenizer: tokenize.Tokenizer, prompt: list[int], ids: list[int]
) -> str:
  """Text of new tokens; alone, sentencepiece would drop a first blank."""
  before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
  if whole.startswith(before):
    return whole[len(before) :]
  return tokenizer.decode(ids)
