"""NEFTune: noise on the embeddings while training (Jain et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Array = Any

EMBEDDING = 'embed_tokens'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyEmbedding:
  """An embedding [V, D] whose look-ups are uniformly noisy, its head not.

  The noise is in +-alpha / sqrt(T D), padding counted in T as in TRL.
  """

  w: Array
  key: Array
  alpha: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of W."""
    return self.w.shape

  @property
  def dtype(self) -> Any:
    """Dtype W is stored in."""
    return self.w.dtype

  @property
  def T(self) -> Array:
    """A tied head sees no noise."""
    return self.w.T

  def __getitem__(self, ids_BT: Array) -> Array:
    rows_BTD = self.w[ids_BT]
    n_tokens, n_dims = rows_BTD.shape[-2:]
    size = self.alpha / jnp.sqrt(jnp.float32(n_tokens * n_dims))
    noise_BTD = jax.random.uniform(
      self.key, rows_BTD.shape, jnp.float32, -size, size
    )
    return rows_BTD + noise_BTD.astype(rows_BTD.dtype)


def with_noise(
  params: Mapping[str, Any], key: jax.Array, alpha: float
) -> dict[str, Any]:
  """The parameters of our decoder, with a noisy embedding."""
  noisy = NoisyEmbedding(params[EMBEDDING], key, jnp.float32(alpha))
  return {**params, EMBEDDING: noisy}
