"""Cross-entropy of the next token, with or without all its logits in memory.

Axis letters: B rows, T tokens, C tokens of a chunk, D model, V vocab.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_train import parallel
from lorax_train.models import ops

Array = Any

IGNORED = -100

_LEAST_TOKENS, _MOST_LOGITS = 512, 2**25


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
  next_BT, count = _scored(labels_BT)
  # -100 is clipped before it is looked up: as an index it would give NaN.
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, jnp.maximum(next_BT, 0)
  )
  return jnp.sum(jnp.where(next_BT != IGNORED, loss_BT, 0.0)), count


def next_token_loss_of_states(
  x_BTD: jax.Array, w_head: Array, labels_BT: jax.Array, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
  """`next_token_loss` of the logits x @ w_head, of which few stand in memory.

  In a scan over chunks of tokens each chunk's logits are made once: where
  gradients are wanted, theirs are formed beside the loss and multiplied back at
  once, as Liger does (arXiv 2410.10989), so that nothing of V numbers a token
  is kept or made again. Of a weight, gradients are formed for those parts alone
  that are differentiated. What has a label stands in front in its row, so that
  chunks in which no row has one left are skipped. Dropout of an adapter of the
  head draws one mask, which all chunks share.

  Args:
    x_BTD: final hidden states; the gradient of the logits is rounded to their
      dtype.
    w_head: [D, V], anything that `ops.dot` takes.
    labels_BT: token ids or -100, unshifted.
    chunk: tokens a device whose logits stand in memory at once; 0 for
      `chunk_of(V)`.
  """
  next_BT, count = _scored(_after(x_BTD, labels_BT))
  n_rows, n_tokens = next_BT.shape
  tokens = chunk or chunk_of(w_head.shape[-1])
  n_chunks = -(-n_tokens // max(1, tokens // _rows_a_device(n_rows)))
  return _summed(x_BTD, w_head, next_BT, n_chunks), count


def chunk_of(vocab: int) -> int:
  """Tokens whose logits stand in memory at once, if nobody says how many.

  As many as have 2^25 logits, 128 MiB, but 512 at the least: with fewer, a
  product with the head waits for the head's own numbers.

  >>> chunk_of(32000), chunk_of(131072)
  (1048, 512)
  """
  return max(_LEAST_TOKENS, _MOST_LOGITS // vocab)


def log_probs(logits_BKV: jax.Array, ids_BK: jax.Array) -> jax.Array:
  """Log-likelihoods of tokens [B, K]; of -100 they are anything finite."""
  # Compared, not looked up: that stays where the vocabulary is cut.
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits_BKV.shape, 2)
  hit_BKV = vocab == ids_BK[..., None]
  own_BK = jnp.sum(jnp.where(hit_BKV, logits_BKV, 0.0), axis=-1)
  return own_BK - jax.nn.logsumexp(logits_BKV, axis=-1)


def log_probs_of_states(
  x_BKD: jax.Array, w_head: Array, ids_BK: jax.Array, chunk: int = 0
) -> jax.Array:
  """`log_probs` of the logits x @ w_head, of which few stand in memory.

  Those of a chunk are made again in the backward pass, unless one is all.

  Args:
    x_BKD: final hidden states.
    w_head: see `next_token_loss_of_states`.
    ids_BK: token ids or -100.
    chunk: see `next_token_loss_of_states`.
  """
  n_rows, n_tokens = ids_BK.shape
  tokens = chunk or chunk_of(w_head.shape[-1])
  length = max(1, tokens // _rows_a_device(n_rows))
  if length >= n_tokens:
    return log_probs(_logits(x_BKD, w_head), ids_BK)
  n = -(-n_tokens // length)
  more = (0, n * length - n_tokens)
  x_BKD = jnp.pad(x_BKD, ((0, 0), more, (0, 0)))
  ids_BK = jnp.pad(ids_BK, ((0, 0), more), constant_values=IGNORED)
  w_head = _gathered(w_head)

  @jax.checkpoint
  def of_chunk(x_BKD, ids_BK, w_head, at):
    x_BCD, ids_BC = _chunk(x_BKD, at, length), _chunk(ids_BK, at, length)
    return log_probs(_logits(x_BCD, w_head), ids_BC)

  _, parts = jax.lax.scan(
    lambda _, at: (None, of_chunk(x_BKD, ids_BK, w_head, at)),
    None,
    jnp.arange(n) * length,
  )
  return jnp.concatenate(parts, axis=1)[:, :n_tokens]


def _rows_a_device(rows: int) -> int:
  mesh: Any = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else parallel.batch_ways(mesh)
  return rows // ways if rows % ways == 0 else rows


def _after(x_BTD: jax.Array, labels_BT: jax.Array) -> jax.Array:
  """The labels, once there are states; where these are NaN, always a label.

  A collective that waits for nothing is begun before those of the layers by some
  of XLA's CPU devices and after them by others, and then all wait for ever (seen
  with jax 0.10.2). That a NaN shows in the loss, label or none, is as it should
  be: it is in the gradient.
  """
  nan_BT = jnp.isnan(jax.lax.stop_gradient(x_BTD[..., 0]))
  return jnp.where(nan_BT, jnp.maximum(labels_BT, 0), labels_BT)


def _scored(labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What each position is scored on, or -100; how many are."""
  next_BT = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
  return next_BT, jnp.sum(next_BT != IGNORED, dtype=jnp.int32)


def _gathered(w_head: Array) -> Array:
  """A head with all of D on each device: gathered once, not for each chunk."""

  def whole(leaf: jax.Array) -> jax.Array:
    if leaf.ndim < 2:
      return leaf
    axes: list[str | None] = [None] * leaf.ndim
    if w_head.shape[-1] in leaf.shape:
      axes[leaf.shape.index(w_head.shape[-1])] = 'vocab'
    return parallel.constrain(leaf, *axes)

  return jax.tree.map(whole, w_head)


def _in_chunks(
  x_BTD: jax.Array, next_BT: jax.Array, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Both with labels in front, filled up to n chunks; order; where they start."""
  order_BT = jnp.argsort(next_BT == IGNORED, axis=1, stable=True)
  n_tokens = next_BT.shape[1]
  length = -(-n_tokens // n)
  more = (0, n * length - n_tokens)
  x_BTD = jnp.pad(taken(x_BTD, order_BT), ((0, 0), more, (0, 0)))
  next_BT = jnp.take_along_axis(next_BT, order_BT, axis=1)
  next_BT = jnp.pad(next_BT, ((0, 0), more), constant_values=IGNORED)
  return x_BTD, next_BT, order_BT, jnp.arange(n) * length


def taken(x_BTD: jax.Array, at_BT: jax.Array) -> jax.Array:
  """What stands at some places of each row, all of them within it."""
  at_BT1 = at_BT[..., None]
  return jnp.take_along_axis(x_BTD, at_BT1, 1, mode='promise_in_bounds')


def _chunk(x: jax.Array, at: jax.Array, length: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, at, length, axis=1)


def _logits(x_BCD: jax.Array, w_head: Array) -> jax.Array:
  logits_BCV = ops.dot(x_BCD, w_head, jnp.float32)
  return parallel.constrain(logits_BCV, 'batch', None, 'vocab')


def _cross_entropy(
  logits_BCV: jax.Array, next_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The sum, and its gradient in the logits."""
  scored_BC = next_BC != IGNORED
  # Compared, not looked up: that stays where the vocabulary is cut.
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
  hit_BCV = vocab == next_BC[..., None]
  log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  own_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
  total = jnp.sum(jnp.where(scored_BC, log_z_BC - own_BC, 0.0))
  p_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
  p_BCV = p_BCV - hit_BCV.astype(jnp.float32)
  return total, jnp.where(scored_BC[..., None], p_BCV, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(
  x_BTD: jax.Array, w_head: Array, next_BT: jax.Array, n_chunks: int
) -> jax.Array:
  """Cross-entropy summed over all tokens."""
  w_head = _gathered(w_head)
  x_BTD, next_BT, _, starts = _in_chunks(x_BTD, next_BT, n_chunks)
  length = next_BT.shape[1] // n_chunks

  def add(total, at):
    next_BC = _chunk(next_BT, at, length)

    def own():
      logits_BCV = _logits(_chunk(x_BTD, at, length), w_head)
      return _cross_entropy(logits_BCV, next_BC)[0]

    none = lambda: jnp.zeros((), jnp.float32)  # noqa: E731
    return total + jax.lax.cond(jnp.any(next_BC != IGNORED), own, none), None

  return jax.lax.scan(add, jnp.zeros((), jnp.float32), starts)[0]


def _summed_fwd(x: Any, w_head: Any, next_: Any, n_chunks: int) -> tuple:
  """The sum; as residuals its gradients, in x and in what is learned of w.

  Each leaf of the arguments comes with whether it is differentiated.
  """
  tree: Any
  primals, tree = jax.tree.flatten(w_head, is_leaf=_is_primal)
  learned = [i for i, primal in enumerate(primals) if primal.perturbed]
  w_head = _gathered(tree.unflatten([primal.value for primal in primals]))
  values = jax.tree.leaves(w_head)
  x_BTD, next_BT, order_BT, starts = _in_chunks(x.value, next_.value, n_chunks)
  length = next_BT.shape[1] // n_chunks

  def with_own(own: list[jax.Array]) -> Array:
    leaves = list(values)
    for i, leaf in zip(learned, own, strict=True):
      leaves[i] = leaf
    return tree.unflatten(leaves)

  def add(carry, at):
    total, dx_BTD, dw = carry
    x_BCD, next_BC = _chunk(x_BTD, at, length), _chunk(next_BT, at, length)

    def own(dw):
      loss, ct_BCV = _cross_entropy(_logits(x_BCD, w_head), next_BC)
      ct_BCV = ct_BCV.astype(x_BCD.dtype)
      # In x's dtype on both sides: a product of float32 and bfloat16 would be
      # one of float32 for the hardware.
      product = lambda x, own: ops.dot(x, with_own(own))  # noqa: E731
      if isinstance(w_head, jax.Array) and not learned:
        back = jax.linear_transpose(lambda x: product(x, []), x_BCD)
        return loss, *back(ct_BCV), dw
      _, both_back = jax.vjp(product, x_BCD, [values[i] for i in learned])
      dx_BCD, more = both_back(ct_BCV)
      dw = [s + m.astype(s.dtype) for s, m in zip(dw, more, strict=True)]
      return loss, dx_BCD, dw

    def none(dw):
      return jnp.zeros((), jnp.float32), jnp.zeros_like(x_BCD), dw

    loss, dx_BCD, dw = jax.lax.cond(jnp.any(next_BC != IGNORED), own, none, dw)
    dx_BTD = jax.lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, at, axis=1)
    return (total + loss, dx_BTD, dw), None

  zero = (
    jnp.zeros((), jnp.float32),
    jnp.zeros_like(x_BTD),
    [jnp.zeros(values[i].shape, jnp.float32) for i in learned],
  )
  (total, dx_BTD, dw), _ = jax.lax.scan(add, zero, starts)
  dx_BTD = taken(dx_BTD, jnp.argsort(order_BT, axis=1))
  grads: list[Any] = [None] * len(primals)
  for i, sums in zip(learned, dw, strict=True):
    grads[i] = sums.astype(values[i].dtype)
  return total, (dx_BTD, tree.unflatten(grads))


def _summed_bwd(n_chunks: int, grads: tuple, g: jax.Array) -> tuple:
  del n_chunks
  scaled = lambda d: (g * d.astype(jnp.float32)).astype(d.dtype)  # noqa: E731
  return *jax.tree.map(scaled, grads), None


def _is_primal(x: Any) -> bool:
  return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


_summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)
