"""The train step: (state, frozen, batch) -> (state, metrics).

Only `state.trainable` is differentiated. The frozen base is an argument of
its own: never donated, never checkpointed.

Axis letters: A micro-batches, B rows, T tokens, V vocab.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_train import lora
from lorax_train.train import neftune

Tree = Any
Batch = dict[str, jax.Array]
Apply = Callable[..., jax.Array]

IGNORED = -100

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


def next_token_loss(
  logits_BTV: jax.Array, labels_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Summed cross-entropy and the number of tokens it is summed over.

  Labels are unshifted, as transformers has them: position t is scored on
  label t + 1. Labels of -100 count for nothing.

  Args:
    logits_BTV: float32.
    labels_BT: token ids or -100.

  Returns:
    (sum in float32, count in int32), so that micro-batches and hosts can be
    added up and divided once.
  """
  next_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
  scored_BT = next_BT != IGNORED
  # -100 is clipped before it is looked up: as an index it would give NaN.
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, jnp.maximum(next_BT, 0)
  )
  total = jnp.sum(jnp.where(scored_BT, loss_BT, 0.0))
  return total, jnp.sum(scored_BT, dtype=jnp.int32)


def make_loss(
  apply: Apply, neftune_alpha: float = 0.0
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """loss(trainable, frozen, micro, key) -> (sum, count) of one micro-batch.

  Args:
    apply: (params, ids) -> logits; of packs, by positions and segments as well.
    neftune_alpha: of the noise on our decoder's embeddings, where a key is
      given.
  """

  def loss(trainable, frozen, micro, key):
    params = lora.bind(frozen, trainable, key)
    if neftune_alpha and key is not None:
      own = jax.random.fold_in(key, _NEFTUNE)
      params = neftune.with_noise(params, own, neftune_alpha)
    packed = {n: micro[n] for n in ('positions', 'segments') if n in micro}
    logits_BTV = apply(params, micro['ids'], **packed)
    return next_token_loss(logits_BTV, micro['labels'])

  return loss


def make_train_step(
  apply: Apply,
  tx: optax.GradientTransformation,
  noise_key: jax.Array | None = None,
  neftune_alpha: float = 0.0,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict]]:
  """One optimizer step over the micro-batches of a batch.

  Losses and gradients are summed over micro-batches and divided once by the
  number of learned tokens, so how a batch is cut does not change the step.

  Args:
    apply: see `make_loss`.
    tx: the optimizer.
    noise_key: root key of dropout and NEFTune; None for neither.
    neftune_alpha: see `make_loss`.

  Returns:
    train_step(state, frozen, batch) with batch `ids` and `labels` [A, B, T],
    of packs also `positions` and `segments`; metrics are `loss`, `grad_norm`
    (before clipping) and `tokens` (learned).
  """
  loss = make_loss(apply, neftune_alpha)

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
  apply: Apply,
) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]:
  """eval_step(trainable, frozen, micro [B, T]) -> (summed loss, count)."""
  loss = make_loss(apply)
  return lambda trainable, frozen, micro: loss(trainable, frozen, micro, None)
