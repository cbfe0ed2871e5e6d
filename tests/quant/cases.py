"""Random weights, quantised and not, in the shapes that the layouts tell apart.

`STACK` has two second-level blocks a layer; `FLAT` no whole block along `in`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.quant import nf4, quantise

STACK, FLAT = (3, 128, 160), (3, 36, 20)


def matrices(shape, seed=0):
  """float32 [*stack, in, out]."""
  rng = np.random.default_rng((seed, *shape))
  return rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)


def stacked(weights):
  """Weights without stack axes, of numpy arrays, as one on the device."""
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *weights)


def nf4_weight(shape, double=True, seed=0):
  """A stack in NF4."""
  return stacked(
    [
      nf4.from_bitsandbytes(quantise(w.T, double))
      for w in matrices(shape, seed)
    ]
  )
