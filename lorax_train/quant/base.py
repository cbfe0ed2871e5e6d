"""What weights that are stored small have in common."""

import abc
from typing import Any

import jax

from lorax_train.lora.weight import product

Array = Any


class QuantWeight(abc.ABC):
  """A frozen weight [*stack, in, out] stored in fewer bits, behind `x @ w`.

  It is made whole for a product and forgotten after it, in the backward pass
  too: inside the scan over the layers one layer's weight stands at a time. Its
  leaves have no gradient.

  Attributes:
    dtype: the dtype that it stands for; static.
  """

  dtype: Any

  # numpy must hand `x @ weight` to us instead of trying elementwise.
  __array_ufunc__ = None

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of what it stands for, [*stack, in, out]."""

  @abc.abstractmethod
  def dequantised(self, dtype: Any = None) -> jax.Array:
    """What it stands for, [*stack, in, out], rounded once to `dtype`.

    Args:
      dtype: None for its own.
    """

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x [..., in] @ W -> [..., out], W in x's dtype.

    Args:
      x: as for `lora.weight.product`.
      out_dtype: dtype of the result and of the sums; None keeps x's.
    """

    # Around the product, not around W alone: a scan would then save the W of
    # each layer for the product's own backward.
    @jax.checkpoint
    def dequantised_product(x, w):
      return product(x, w.dequantised(x.dtype), out_dtype)

    return dequantised_product(x, self)

  def __rmatmul__(self, x: Array) -> Array:
    return self.apply_to(x)

  @property
  def T(self) -> Array:
    """Refused: a quantised weight stands in `x @ w` alone."""
    raise ValueError(
      f'a quantised weight of shape {self.shape} has no transpose:'
      ' `w.dequantised().T` makes it whole'
    )
