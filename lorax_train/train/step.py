"""The train step: (state, frozen, batch) -> (state, metrics).

Only `state.trainable` is differentiated. The frozen base is an argument of
its own: never donated, never checkpointed.

Axis letters: A micro-batches, B rows, T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_train import lora
from lorax_train.data.sequences import TARGETS
from lorax_train.models import ops
from lorax_train.train import choices, neftune
from lorax_train.train.losses import next_token_loss, next_token_loss_of_states

Tree = Any
Batch = dict[str, jax.Array]
Apply = Callable[..., jax.Array | ops.BeforeHead]

_NEFTUNE = 0x4E45  # what is folded into the step's key for it


class TrainState(NamedTuple):
  """All that changes in training.

  Attributes:
    step: updates made so far, int32.
    trainable: from `lora.split`: A and B of every adapter, what is trained
      whole.
    opt_state: the optimizer's.
    fixed_factors: in a checkpoint `lora.fixed_factors`; None in the step, whose
      frozen half has them.
  """

  step: Any
  trainable: Tree
  opt_state: Tree
  fixed_factors: Tree = None


def init_state(trainable: Tree, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def make_loss(
  apply: Apply, neftune_alpha: float = 0.0, loss_chunk: int = 0
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """loss(trainable, frozen, micro, key) -> (sum, count) of one micro-batch.

  Of a batch of choices (`data.sequences.take`) it is the cross-entropy over
  their scores, counted in rows; of any other that of the next token.

  Args:
    apply: (params, ids) -> logits, or what stands before the head; of packs, by
      positions and segments as well.
    neftune_alpha: of the noise on our decoder's embeddings, where a key is
      given.
    loss_chunk: see `losses.next_token_loss_of_states`; of logits they are all
      there.
  """

  forward = _make_forward(apply, neftune_alpha)

  def loss(trainable, frozen, micro, key):
    out = forward(trainable, frozen, micro, key)
    if TARGETS in micro:
      return choices.cross_entropy(choices.likelihoods(out, micro, loss_chunk))
    if isinstance(out, ops.BeforeHead):
      return next_token_loss_of_states(*out, micro['labels'], loss_chunk)
    return next_token_loss(out, micro['labels'])

  return loss


def _make_forward(
  apply: Apply, neftune_alpha: float = 0.0
) -> Callable[..., jax.Array | ops.BeforeHead]:
  """(trainable, frozen, micro, key) -> what `apply` gives, of all sequences."""

  def forward(trainable, frozen, micro, key):
    params = lora.bind(frozen, trainable, key)
    if neftune_alpha and key is not None:
      own = jax.random.fold_in(key, _NEFTUNE)
      params = neftune.with_noise(params, own, neftune_alpha)
    packed = {n: micro[n] for n in ('positions', 'segments') if n in micro}
    ids = micro['ids']
    return apply(params, ids.reshape(-1, ids.shape[-1]), **packed)

  return forward


def make_train_step(
  apply: Apply,
  tx: optax.GradientTransformation,
  noise_key: jax.Array | None = None,
  neftune_alpha: float = 0.0,
  loss_chunk: int = 0,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict]]:
  """One optimizer step over the micro-batches of a batch.

  Losses and gradients are summed over micro-batches and divided once by the
  number of learned tokens, or of rows of choices, so how a batch is cut does not
  change the step.

  Args:
    apply: see `make_loss`.
    tx: the optimizer.
    noise_key: root key of dropout and NEFTune; None for neither.
    neftune_alpha: see `make_loss`.
    loss_chunk: likewise.

  Returns:
    train_step(state, frozen, batch) with batch `ids` and `labels` [A, B, T],
    of packs also `positions` and `segments`, or one of choices; metrics are
    `loss`, `grad_norm` (before clipping) and `tokens` (learned, or rows).
  """
  loss = make_loss(apply, neftune_alpha, loss_chunk)

  def train_step(state, frozen, batch):
    step_key = None
    if noise_key is not None:
      step_key = jax.random.fold_in(noise_key, state.step)

    def accumulate(carry, micro_and_index):
      micro, index = micro_and_index
      key = None if step_key is None else jax.random.fold_in(step_key, index)
      (total, count), grads = jax.value_and_grad(loss, has_aux=True)(
        state.trainable, frozen, micro, key
      )
      return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zero = (
      jnp.zeros((), jnp.float32),
      jnp.zeros((), jnp.int32),
      jax.tree.map(jnp.zeros_like, state.trainable),
    )
    n_micro = batch['ids'].shape[0]
    (total, count, grads), _ = jax.lax.scan(
      accumulate, zero, (batch, jnp.arange(n_micro))
    )
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    metrics = {
      'loss': total / tokens,
      'grad_norm': optax.global_norm(grads),
      'tokens': count,
    }
    # optax promotes dtypes in its schedules.
    with jax.numpy_dtype_promotion('standard'):
      updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
      trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, opt_state), metrics

  return train_step


def make_eval_step(
  apply: Apply, loss_chunk: int = 0, compared: bool = True
) -> Callable[[Tree, Tree, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
  """eval_step(trainable, frozen, micro) -> {metric: (sum, count)}.

  Args:
    apply: see `make_loss`.
    loss_chunk: likewise.
    compared: of choices, whether the loss is over their scores, or the next
      token's of the right one.

  Returns:
    `loss`, and of choices `accuracy` as well.
  """
  loss = make_loss(apply, loss_chunk=loss_chunk)
  forward = _make_forward(apply)

  def eval_step(trainable, frozen, micro):
    if TARGETS not in micro:
      return {'loss': loss(trainable, frozen, micro, None)}
    out = forward(trainable, frozen, micro, None)
    of = choices.likelihoods(out, micro, loss_chunk)
    measure = choices.cross_entropy if compared else choices.next_token_loss
    return {'loss': measure(of), 'accuracy': choices.hits(of)}

  return eval_step
