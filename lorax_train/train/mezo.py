"""MeZO: steps without gradients (Malladi et al. 2023, arXiv 2305.17333).

Along a random direction z the loss is looked at a little ahead and a little
behind, and the weights go down the slope between the two:

    g = (L(w + eps z) - L(w - eps z)) / (2 eps),   w <- w - lr g z

Two forward passes, one after the other, and no backward pass: memory is that of
inference. z follows from the key of the step (`lora.perturbed`), so the scalars
g and lr of all steps are all there is to say of a run (`replay`).

Axis letters: A micro-batches, B rows, T tokens, P probes (directions of a step).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_train.lora import perturbed
from lorax_train.train.step import Apply, Batch, TrainState, make_loss

Tree = Any

_ROOT = 2  # what is folded into the run's key for directions


class MezoConfig(NamedTuple):
  """How a step looks around.

  Attributes:
    epsilon: how far.
    probes: P, directions of a step; it goes along their mean.
    at_once: the probes' passes are one, vmapped: P times the activations. Of
      weights that are trained whole there would be P copies of each layer.
  """

  epsilon: float
  probes: int = 1
  at_once: bool = True


def root_key(seed: int) -> jax.Array:
  """The key that all directions of a run follow from."""
  # By threefry whatever jax's default is: others differ by mesh or under vmap.
  return jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), _ROOT)


def directions(root: jax.Array, step: jax.Array, probes: int) -> jax.Array:
  """Keys [P] of the directions of a step."""
  of_step = jax.random.fold_in(root, step)
  return jax.vmap(jax.random.fold_in, (None, 0))(of_step, jnp.arange(probes))


def make_update(
  root: jax.Array,
) -> Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], Tree]:
  """update(trainable, frozen, step, slopes [P], rate) -> trainable.

  The step and its replay are this one function.
  """

  def update(trainable, frozen, step, slopes, rate):
    # What comes before must not change how this is computed: to the bit.
    step, slopes, rate = jax.lax.optimization_barrier((step, slopes, rate))
    keys = directions(root, step, len(slopes))
    scales = -rate * slopes / len(slopes)
    return perturbed.stepped(frozen, trainable, keys, scales)

  return update


def make_train_step(
  apply: Apply,
  schedule: optax.Schedule,
  root: jax.Array,
  cfg: MezoConfig,
  loss_chunk: int = 0,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict]]:
  """A step over the micro-batches of a batch; see `step.make_train_step`.

  Args:
    apply: see `step.make_loss`.
    schedule: learning rate of step 0, 1, ...
    root: from `root_key`.
    cfg: how it looks around.
    loss_chunk: see `step.make_loss`.

  Returns:
    train_step(state, frozen, batch); metrics are `loss` (the mean of both
    sides), `slopes` [P] (g of each probe), `learning_rate` and `tokens`.
  """
  loss = make_loss(apply, loss_chunk=loss_chunk)
  update = make_update(root)

  def train_step(state, frozen, batch):
    def at(key, epsilon):
      """Summed loss and count of the batch, that far along a direction."""
      near = perturbed.perturb(frozen, state.trainable, key, epsilon)

      def add(carry, micro):
        return jax.tree.map(jnp.add, carry, loss(near, frozen, micro, None)), None  # fmt: skip

      zero = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
      return jax.lax.scan(add, zero, batch)[0]

    def of_all(epsilon):
      if cfg.at_once and cfg.probes > 1:
        return jax.vmap(at, (0, None))(keys, epsilon)
      return jax.lax.map(lambda key: at(key, epsilon), keys)

    keys = directions(root, state.step, cfg.probes)
    sides = jnp.float32(cfg.epsilon) * jnp.array([1.0, -1.0], jnp.float32)
    totals_2P, counts_2P = jax.lax.map(of_all, sides)
    count = counts_2P[0, 0]
    losses_2P = totals_2P / jnp.maximum(count, 1).astype(jnp.float32)
    slopes = (losses_2P[0] - losses_2P[1]) / (2 * cfg.epsilon)
    with jax.numpy_dtype_promotion('standard'):
      rate = jnp.asarray(schedule(state.step), jnp.float32)
    trainable = update(state.trainable, frozen, state.step, slopes, rate)
    metrics = {
      'loss': jnp.mean(losses_2P),
      'slopes': slopes,
      'learning_rate': rate,
      'tokens': count,
    }
    return TrainState(state.step + 1, trainable, state.opt_state), metrics

  return train_step
