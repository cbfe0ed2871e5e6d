"""How likely a model finds the texts to choose from: loss and accuracy.

A text's score is its mean log-likelihood a token behind the prompt, as MeZO
takes it (Malladi et al. 2023, arXiv 2305.17333): sums would favour short texts.

Axis letters: B rows, C choices, S sequences (B C, or B where each row's are all
behind one prompt), T tokens, K tokens of the longest choice (there of all of the
row's choices), D model, V vocab.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from lorax_train.data.encoded import Sizes
from lorax_train.data.sequences import TARGETS
from lorax_train.errors import ConfigError, DataError
from lorax_train.models import ops
from lorax_train.train import losses

if TYPE_CHECKING:
  from lorax_train.data.tokenized import TokenizedSet

Batch = dict[str, jax.Array]


def sizes_of(
  sets: 'Sequence[TokenizedSet]', loss: str, packing: bool
) -> tuple[Sizes, bool]:
  """The most there is in rows of choices, and whether they are compared.

  Args:
    sets: rows to train on and held out; of rows without choices, zeros.
    loss: see `train.loss` of the configuration.
    packing: whether rows are packed.

  Raises:
    DataError: some have choices and some have none.
    ConfigError: rows can't be had as the run wants them.
  """
  every = [rows.report.sizes for rows in sets]
  if not any(sizes.choices for sizes in every):
    if loss == 'choices':
      raise ConfigError(
        'train.loss=choices: these rows have none; give a template of choices'
        ' (docs/choice.md), or leave train.loss out'
      )
    return Sizes(), False
  if not all(sizes.choices for sizes in every):
    raise DataError(
      'some rows to train on or held out have choices and some have none; give'
      ' them to all, or train on each by itself'
    )
  if packing:
    raise ConfigError(
      'data.packing: not with rows of choices, which are several sequences; leave'
      ' it out, or give data.buckets'
    )
  return functools.reduce(Sizes.most, every), loss != 'tokens'


class Likelihoods(NamedTuple):
  """Of each choice; the first of a row is right.

  Attributes:
    sum_BC: of the log-likelihoods of its tokens, float32.
    tokens_BC: how many there are, int32; 0 where there is no such choice.
  """

  sum_BC: jax.Array
  tokens_BC: jax.Array

  @property
  def rows_B(self) -> jax.Array:
    """Which are rows and no padding, bool."""
    return self.tokens_BC[:, 0] > 0

  @property
  def score_BC(self) -> jax.Array:
    """Mean a token; -inf where there is no such choice, 0 in padding."""
    n_BC = jnp.maximum(self.tokens_BC, 1).astype(jnp.float32)
    mean_BC = self.sum_BC / n_BC
    there_BC = (self.tokens_BC > 0) | ~self.rows_B[:, None]
    return jnp.where(there_BC, mean_BC, -jnp.inf)


def likelihoods(
  out: jax.Array | ops.BeforeHead, batch: Batch, chunk: int = 0
) -> Likelihoods:
  """Of the choices of a batch, whose logits are made at their tokens alone.

  Args:
    out: logits [S, T, V] in float32, or what stands before the head.
    batch: from `data.sequences.take`.
    chunk: see `losses.next_token_loss_of_states`.
  """
  targets_BCK = batch[TARGETS]
  # What stands before a token predicts it.
  k_11K = jnp.arange(targets_BCK.shape[-1])[None, None]
  at_BCK = batch['begins'][..., None] - 1 + k_11K
  n_sequences = batch['ids'].shape[0] * batch['ids'].shape[1]
  target_SK, at_SK = (x.reshape(n_sequences, -1) for x in (targets_BCK, at_BCK))
  taken = out.x_BTD if isinstance(out, ops.BeforeHead) else out
  at_SK = jnp.minimum(at_SK, taken.shape[1] - 1)
  taken = losses.taken(taken, at_SK)
  if isinstance(out, ops.BeforeHead):
    log_p_SK = losses.log_probs_of_states(taken, out.w_head, target_SK, chunk)
  else:
    log_p_SK = losses.log_probs(taken, target_SK)
  there_BCK = targets_BCK != losses.IGNORED
  log_p_BCK = log_p_SK.reshape(targets_BCK.shape)
  return Likelihoods(
    jnp.sum(jnp.where(there_BCK, log_p_BCK, 0.0), axis=-1),
    jnp.sum(there_BCK, axis=-1, dtype=jnp.int32),
  )


def cross_entropy(of: Likelihoods) -> tuple[jax.Array, jax.Array]:
  """Of the softmax over a row's scores: its sum, and the number of rows."""
  score_BC = of.score_BC
  loss_B = jax.nn.logsumexp(score_BC, axis=-1) - score_BC[:, 0]
  return jnp.sum(jnp.where(of.rows_B, loss_B, 0.0)), _n(of.rows_B)


def next_token_loss(of: Likelihoods) -> tuple[jax.Array, jax.Array]:
  """Of the right choice's tokens: the sum, and how many there are."""
  return -jnp.sum(of.sum_BC[:, 0]), jnp.sum(of.tokens_BC[:, 0])


def hits(of: Likelihoods) -> tuple[jax.Array, jax.Array]:
  """How many rows have the right choice as the likeliest, and all rows.

  A tie is none: a model that can't tell has learned nothing.
  """
  best_B = jnp.max(of.score_BC[:, 1:], axis=-1)
  hit_B = of.rows_B & (of.score_BC[:, 0] > best_B)
  return jnp.sum(hit_B, dtype=jnp.float32), _n(of.rows_B)


def _n(flags: jax.Array) -> jax.Array:
  return jnp.sum(flags, dtype=jnp.int32)
