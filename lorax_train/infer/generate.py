"""Tokens from a model: the prompts in one pass, then a token at a time.

Prompts of a batch are padded on the left, so that all rows write their next
token into the same slot of the cache; positions count from each prompt's own
first token, and padding has negative ones, which nobody attends to. So a row
gets the tokens that it would get alone.

The first pass takes all but the last token of each prompt and gives no logits
(a head over every prompt token would cost more memory than the cache). The
loop then feeds one token a row and chooses the next. It runs on the device
until every row has stopped: a loop in Python that asks after each token
whether to go on took 1.5 times as long on a small model on CPU.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train import parallel
from lorax_train.errors import ConfigError, DataError
from lorax_train.models.mistral import Cache, Decoder, empty_cache, extend

Array = Any
# Lengths are rounded up to multiples of this: few programs are compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Options:
  """How to continue prompts.

  Attributes:
    max_new_tokens: at most so many, the one that stops a row included.
    temperature: 0 takes the likeliest token; above, logits are divided by it
      and a token is drawn.
    top_p: draw from the fewest likeliest tokens that together have this
      probability (Holtzman et al. 2019).
    seed: of the draws. A draw depends on the seed, the row's place among the
      prompts and the token's place in the row, and on nothing else.
    batch_size: rows computed at once.

  Raises:
    ConfigError: a value out of its range.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0
  batch_size: int = 8

  def __post_init__(self):
    for name, fine, wanted in (
      ('max_new_tokens', self.max_new_tokens >= 1, '1 or more'),
      ('temperature', 0 <= self.temperature < math.inf, '0 or more'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
      ('seed', 0 <= self.seed < 2**32, 'from 0 to 4294967295'),
      ('batch_size', self.batch_size >= 1, '1 or more'),
    ):
      if not fine:
        raise ConfigError(f'{name} is {getattr(self, name)}: give {wanted}')


def generate(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  stop_ids: Sequence[int] = (),
  *,
  max_length: int | None = None,
  batch_size: int = 8,
) -> list[list[int]]:
  """The tokens that follow each prompt.

  Args:
    model: the decoder; its dtype is that of the cache.
    params: its weights, plain or adapted.
    prompts: token ids, BOS included where the model wants it.
    max_new_tokens: see `Options`, as for the next three.
    temperature: 0 for greedy.
    top_p: 1 for all tokens.
    seed: of the draws.
    stop_ids: a row ends with the first of these, which is still given back:
      it tells a row that ended from one that was cut.
    max_length: what a prompt and its new tokens may be long together.
    batch_size: rows computed at once.

  Raises:
    ConfigError: an option out of its range.
    DataError: a prompt that is empty, too long, or has ids that are none.
  """
  options = Options(max_new_tokens, temperature, top_p, seed, batch_size)
  check_prompts(prompts, model.cfg.vocab, options, max_length)
  done = batches(model, params, prompts, options, stop_ids)
  return [ids for rows, _ in done for ids in rows]


def check_prompts(
  prompts: Sequence[Sequence[int]],
  vocab: int,
  options: Options,
  max_length: int | None,
) -> None:
  """Refuses prompts that can't be continued; all of them in one error."""
  problems = []
  for n, ids in enumerate(prompts, 1):
    bad = [i for i in ids if not 0 <= i < vocab]
    total = len(ids) + options.max_new_tokens
    if not len(ids):
      problems.append(
        f'prompt {n} is empty and the model has no BOS to begin with: give it'
        ' some text'
      )
    elif bad:
      problems.append(
        f'prompt {n} has id {bad[0]}; the model has {vocab} rows in its'
        ' embedding'
      )
    elif max_length is not None and total > max_length:
      problems.append(
        f'prompt {n} has {len(ids)} tokens, with max_new_tokens'
        f' {options.max_new_tokens} that is {total} of the {max_length} that'
        ' the model was made for: shorten it, or ask for fewer'
      )
  if problems:
    more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
    raise DataError('; '.join(problems[:3]) + more)


def batches(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  options: Options,
  stop_ids: Sequence[int],
) -> Iterator[tuple[list[list[int]], float]]:
  """`generate` without its checks, batch by batch.

  Yields:
    (new tokens of each row, seconds that they took without compiling).
  """
  stops = np.array(sorted(set(stop_ids)), np.int32)
  size = min(options.batch_size, len(prompts))
  for begin in range(0, len(prompts), size or 1):
    rows_B = np.arange(begin, begin + size)
    # The last batch repeats a row rather than being shorter.
    rows_B = np.where(rows_B < len(prompts), rows_B, -1).astype(np.int32)
    batch = [prompts[max(int(row), begin)] for row in rows_B]
    tokens_BN, seconds = _run(model, params, batch, rows_B, options, stops)
    yield (
      [
        _cut(tokens_N[: options.max_new_tokens], stops)
        for row, tokens_N in zip(rows_B, tokens_BN, strict=True)
        if row >= 0
      ],
      seconds,
    )


def sample(
  key: Array,
  logits_BV: Array,
  rows_B: Array,
  step: Array | int,
  temperature: Array | float,
  top_p: Array | float,
) -> Array:
  """A token a row, [B] int32, drawn from the nucleus.

  Each row has a key of its own, folded in by row and by step.
  """
  # Less the largest first: the quotient then can't overflow.
  largest_B1 = logits_BV.max(axis=-1, keepdims=True)
  logits_BV = (logits_BV - largest_B1) / temperature
  # A sort a token is dear on CPU: none where nothing is to be cut.
  logits_BV = jax.lax.cond(
    top_p < 1, lambda x: nucleus(x, top_p), lambda x: x, logits_BV
  )

  def draw(row, logits_V):
    own = jax.random.fold_in(jax.random.fold_in(key, row), step)
    return jax.random.categorical(own, logits_V)

  return jax.vmap(draw)(rows_B, logits_BV).astype(jnp.int32)


def nucleus(logits_BV: Array, top_p: Array | float) -> Array:
  """Logits with -inf outside the nucleus; what ties with its last is in it."""
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  p_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
  in_it_BV = (before_BV < top_p).at[:, 0].set(True)
  last_B1 = jnp.where(in_it_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


class _State(NamedTuple):
  """What the loop over new tokens carries; N is their number."""

  step: Array
  token_B: Array
  done_B: Array
  tokens_BN: Array
  cache: Cache


def _apply(
  model: Any, params: Any, ids_BT: Array, positions_BT: Array, cache: Cache
) -> tuple[Array, Cache]:
  return model.apply({'params': params}, ids_BT, positions_BT, cache=cache)


@functools.partial(jax.jit, static_argnames='model')
def _prefill(
  model: Decoder, params: Any, ids_BT: Array, positions_BT: Array
) -> Cache:
  """The cache that the prompts leave behind; XLA drops the unused head."""
  cache = empty_cache(model.cfg, ids_BT.shape[0], 0, model.dtype)
  _, new = _apply(model, params, ids_BT, positions_BT, cache)
  return new


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'greedy'))
def _decode(
  model: Decoder,
  params: Any,
  prompt: Cache,
  token_B: Array,
  position_B: Array,
  rows_B: Array,
  stop_ids: Array,
  limit: Array,
  sampling: tuple[Array, Array, Array],
  *,
  slots: int,
  greedy: bool,
) -> Array:
  """Up to `limit` <= `slots` new tokens, [B, slots].

  Args:
    model: static.
    params: its weights.
    prompt: the cache of all that stands before `token_B`.
    token_B: the last token of each prompt.
    position_B: its position.
    rows_B: place among all prompts, for the keys; negative in a row that only
      fills up the batch.
    stop_ids: which tokens end a row.
    limit: how many tokens a row.
    sampling: key, temperature, top_p.
    slots: how many tokens there is room for.
    greedy: no draws.
  """
  rows, begin = prompt.positions_BS.shape
  key, temperature, top_p = sampling

  def go_on(state: _State) -> Array:
    return (state.step < limit) & ~state.done_B.all()

  def step(state: _State) -> _State:
    position_B1 = (position_B + state.step)[:, None]
    logits_BTV, new = _apply(
      model, params, state.token_B[:, None], position_B1, state.cache
    )
    logits_BV = logits_BTV[:, 0]
    if greedy:
      token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
      token_B = sample(key, logits_BV, rows_B, state.step, temperature, top_p)
    stopped_B = (token_B[:, None] == stop_ids[None]).any(axis=-1)
    return _State(
      state.step + 1,
      token_B,
      state.done_B | stopped_B,
      jax.lax.dynamic_update_slice_in_dim(
        state.tokens_BN, token_B[:, None], state.step, axis=1
      ),
      extend(state.cache, new, begin + state.step),
    )

  cache = empty_cache(model.cfg, rows, begin + slots, model.dtype)
  state = _State(
    jnp.int32(0),
    token_B,
    rows_B < 0,
    jnp.zeros((rows, slots), jnp.int32),
    extend(cache, prompt, 0),
  )
  return jax.lax.while_loop(go_on, step, state).tokens_BN


def _run(
  model: Decoder,
  params: Any,
  prompts: Sequence[Sequence[int]],
  rows_B: np.ndarray,
  options: Options,
  stop_ids: np.ndarray,
) -> tuple[np.ndarray, float]:
  """(tokens [B, N], seconds) of one batch."""
  ids_BT, positions_BT = _pad_left([ids[:-1] for ids in prompts])
  lower_decode = functools.partial(
    _decode.lower,
    slots=_round_up(options.max_new_tokens),
    greedy=options.temperature == 0,
  )
  rest = (
    np.array([ids[-1] for ids in prompts], np.int32),
    np.array([len(ids) - 1 for ids in prompts], np.int32),
    rows_B,
    stop_ids,
    np.int32(options.max_new_tokens),
    (
      jax.random.key(options.seed),
      np.float32(options.temperature),
      np.float32(options.top_p),
    ),
  )
  # Compiled ahead, which jax remembers, so that the clock sees it not.
  lowered = _prefill.lower(model, params, ids_BT, positions_BT)
  decode = lower_decode(model, params, lowered.out_info, *rest).compile()
  prefill = lowered.compile()
  start = time.perf_counter()
  cache = prefill(params, ids_BT, positions_BT)
  tokens_BN = np.asarray(parallel.fetch(decode(params, cache, *rest)))
  return tokens_BN, time.perf_counter() - start


def _pad_left(
  prompts: Sequence[Sequence[int]],
) -> tuple[np.ndarray, np.ndarray]:
  """(ids, positions) [B, T] int32; padding has negative positions."""
  longest = _round_up(max(map(len, prompts)))
  ids_BT = np.zeros((len(prompts), longest), np.int32)
  for row_T, ids in zip(ids_BT, prompts, strict=True):
    row_T[longest - len(ids) :] = ids
  begins_B = longest - np.array([len(ids) for ids in prompts], np.int32)
  positions_BT = np.arange(longest, dtype=np.int32)[None] - begins_B[:, None]
  return ids_BT, positions_BT


def _round_up(n: int) -> int:
  return max(1, -(-n // _BUCKET)) * _BUCKET


def _cut(tokens_N: np.ndarray, stop_ids: np.ndarray) -> list[int]:
  """The tokens up to and with the first that stops."""
  at = np.flatnonzero(np.isin(tokens_N, stop_ids))
  return tokens_N[: at[0] + 1 if at.size else None].tolist()
