"""The weight protocol, and LoRA behind it.

A model uses a weight `w` in four ways only: `x @ w`, `w[ids]`, `w.T` and
`w.shape` / `w.dtype` (plus `apply_to` where it wants another result dtype).
A plain array does these by itself; `LoraWeight` does them as W + scale * A^T B
without ever forming that sum (Hu et al. 2021, equation 3).

Axis letters: R rank. `in` and `out` are the axes that `x @ w` contracts and
keeps. Every array of a weight carries the stack axes (those of a layer scan)
in front, because a scan slices every leaf.
"""

import abc
import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Array = Any


@typing.dataclass_transform(frozen_default=True, eq_default=False)
def node(*data: str, static: tuple[str, ...] = ()):
  """A frozen dataclass that is a pytree node."""

  def wrap(cls):
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    return jax.tree_util.register_dataclass(
      cls, data_fields=list(data), meta_fields=list(static)
    )

  return wrap


@node(
  *('w', 'scale', 'rate', 'a', 'a0', 'b0', 'norm2'),
  static=('ranks', 'axes', 'look_up'),
)
class Fixed:
  """The frozen half of an adapted leaf.

  Attributes:
    w: an array, or anything with the weight protocol.
    scale: [*stack] float32: alpha / r, or alpha / sqrt(r) for rsLoRA; 0 where
      the stack index has no adapter.
    rate: [*stack] float32 dropout rate, None without dropout.
    ranks: the true rank of each stack index, row-major. Static: counts and
      export need it, the arithmetic doesn't (factors are padded with zeros).
    axes: what each axis of w is to the function, a letter an axis: `s` stack,
      `i` contracted (in), `o` kept (out). [*stack, in, out] is 'io', 'sio' ...
    a: A where it is frozen (LoRA-FA), else None.
    a0: [*stack, R, *in], with b0 what is subtracted from the update, so that
      it starts from nothing though A and B do not (PiSSA, OLoRA).
    b0: [*stack, R, *out].
    norm2: [*stack, *out] float32 squares of W's norms over in (DoRA).
    look_up: whether in is looked up and not contracted: an embedding.
  """

  w: Array
  scale: Array
  rate: Array | None
  ranks: tuple[int, ...]
  axes: str
  a: Array | None = None
  a0: Array | None = None
  b0: Array | None = None
  norm2: Array | None = None
  look_up: bool = False

  def a_of(self, adapter: 'Adapter') -> Array:
    """A, whichever half it stands in."""
    return self.a if adapter.a is None else adapter.a


@node('a', 'b', 'm')
class Adapter:
  """The trainable half, float32.

  A is in PEFT's layout and B in its transpose. Rows past a stack index's true
  rank are zero in both, and stay exactly zero under any elementwise optimizer:
  each one's gradient is a product with the other.

  Attributes:
    a: [*stack, R, *in]; None where it is frozen.
    b: [*stack, R, *out].
    m: [*stack, *out] DoRA's magnitude, None without it.
  """

  a: Array | None
  b: Array
  m: Array | None = None


class Around(abc.ABC):
  """A weight that holds another, and behaves as that and what is beside it.

  Attributes:
    w: the other, [*stack, in, out].
  """

  w: Array

  # numpy must hand `x @ weight` to us instead of trying elementwise.
  __array_ufunc__ = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of W."""
    return self.w.shape

  @property
  def ndim(self) -> int:
    """Number of axes of W."""
    return len(self.w.shape)

  @property
  def dtype(self) -> Any:
    """Dtype W is stored in."""
    return self.w.dtype

  @abc.abstractmethod
  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x [..., in] @ what it stands for -> [..., out]; see `product`."""

  def __rmatmul__(self, x: Array) -> Array:
    return self.apply_to(x)


@node('w', 'a', 'b', 'scale', 'rate', 'key', 'a0', 'b0', 'norm2', 'm')
class LoraWeight(Around):
  """W [*stack, in, out] and its low-rank update, behaving as the sum.

  `key` ([*stack] typed PRNG keys) turns dropout on: it falls on the input of
  A only, as in the paper and in PEFT. The others are as in `Fixed` and
  `Adapter`.
  """

  w: Array
  a: Array
  b: Array
  scale: Array
  rate: Array | None = None
  key: Array | None = None
  a0: Array | None = None
  b0: Array | None = None
  norm2: Array | None = None
  m: Array | None = None

  def apply_to(self, x: Array, out_dtype: Any = None) -> Array:
    """x @ (W + scale A^T B) as x @ W + ((x A^T) scale) B.

    With DoRA (Liu et al. 2024, equation 5) the columns of that sum are then
    brought to the length m.

    Args:
      x: [..., in]; the factors are cast to its dtype here, inside whatever
        scan we are in, so no second copy of all the adapters exists.
      out_dtype: dtype of the result and of the sums; None keeps x's.

    Returns:
      [..., out].
    """
    base = product(x, self.w, out_dtype)
    seen = x
    if self.key is not None and self.rate is not None:
      seen = dropped(x, self.key, self.rate)
    update = self._branch(seen, self.a, self.b, out_dtype)
    if self.a0 is not None:
      update = update - self._branch(x, self.a0, self.b0, out_dtype)
    if self.m is None:
      return base + update
    g = _over_rows(self._gain(), base).astype(base.dtype)
    if seen is x:
      return g * checkpoint_name(base + update, 'before_magnitude')
    # As PEFT: what m adds to the base is an update, and so sees dropout.
    return base + (g - 1) * product(seen, self.w, out_dtype) + g * update

  def _branch(self, x: Array, a: Array, b: Array, out_dtype: Any) -> Array:
    u = _contract(x, a.astype(x.dtype), -1)
    u = checkpoint_name(u * over(self.scale, u).astype(u.dtype), 'low_rank')
    return _contract(u, b.astype(x.dtype), -2, out_dtype)

  def _gain(self) -> Array:
    """m / |W + scale A^T B| over in, [*stack, out]; 1 without an adapter.

    The norm counts as a constant in the backward pass (section 4.3).
    """
    assert self.m is not None
    a, b, scale = lax.stop_gradient((self.a, self.b, self.scale))
    if self.a0 is not None and self.b0 is not None:
      a = jnp.concatenate([a, self.a0], -2)
      b = jnp.concatenate([b, -self.b0], -2)
    with jax.default_matmul_precision('highest'):
      norm2 = sum_norm2(self.w, self.norm2, a, b, scale)
    return gain(self.m, norm2, scale)

  def __getitem__(self, ids: Array) -> Array:
    """Rows of W + scale A^T B: the embedding look-up, [..., out]."""
    if len(self.shape) != 2:
      raise ValueError(f'look-up in a stacked weight of shape {self.shape}')
    if self.a0 is not None:
      raise ValueError('a look-up has no base that is adapted')
    rows = self.w[ids]
    u = jnp.moveaxis(self.a[:, ids], 0, -1) * self.scale
    rows = rows + _contract(u, self.b, -2).astype(rows.dtype)
    return rows if self.m is None else self._gain().astype(rows.dtype) * rows

  @property
  def T(self) -> 'LoraWeight':
    """The transpose: A and B change places. Dropout has no meaning there."""
    if self.key is not None:
      raise ValueError('a transposed adapter has no input to drop from')
    if self.m is not None:
      raise ValueError('DoRA has lengths of columns, not of rows: no transpose')
    w = self.w.T if is_quantised(self.w) else jnp.swapaxes(self.w, -1, -2)
    return LoraWeight(
      w=w, a=self.b, b=self.a, scale=self.scale,
      a0=self.b0, b0=self.a0,
    )  # fmt: skip

  def merged(self) -> Array:
    """The sum itself, made in float32, in W's own dtype."""
    delta = low_rank(self.a, self.b, self.scale)
    if self.a0 is not None:
      delta = delta - low_rank(self.a0, self.b0, self.scale)
    total = plain(self.w, jnp.float32) + delta
    if self.m is not None:
      total = total * self._gain()[..., None, :]
    return total.astype(self.w.dtype)


def is_quantised(w: Any) -> bool:
  """Whether w is a weight stored in fewer bits, as those of `quant` are."""
  return hasattr(w, 'dequantised')


def plain(w: Any, dtype: Any) -> Array:
  """w [*stack, in, out] in a dtype: an array, or what it stands for."""
  return w.dequantised(dtype) if is_quantised(w) else w.astype(dtype)


def low_rank(a: Array, b: Array, scale: Array) -> Array:
  """scale A^T B [*stack, in, out]."""
  return jnp.einsum('...ri,...ro,...->...io', a, b, scale)


def gain(m: Array, norm2: Array, scale: Array) -> Array:
  """m / |W + scale A^T B| [*stack, *out]; 1 without an adapter.

  Args:
    m: [*stack, *out] magnitude.
    norm2: [*stack, *out] squares of the norms over in.
    scale: [*stack], 0 where there is no adapter.
  """
  live = (over(scale, norm2) != 0) & (norm2 > 0)
  return jnp.where(live, m / jnp.sqrt(jnp.where(live, norm2, 1.0)), 1.0)


def sum_norm2(
  w: Array, norm2: Array, a: Array, b: Array, scale: Array
) -> Array:
  """|W + scale A^T B|^2 over in [*stack, out], without making that sum.

  |W|^2 + 2 scale <W, A^T B> + scale^2 |A^T B|^2, of which the second is B times
  A W, and the third B times (A A^T) B: as much work as R rows of x.
  """
  s = scale[..., None]
  aw = product(a, w)
  aa = jnp.einsum('...ri,...qi->...rq', a, a)
  cross = jnp.einsum('...ro,...ro->...o', b, aw)
  square = jnp.einsum('...ro,...rq,...qo->...o', b, aa, b)
  return norm2 + 2 * s * cross + s**2 * square


def dropped(x: Array, key: Array, rate: Array) -> Array:
  """Inverted dropout of x, one mask an adapter."""
  if rate.ndim:
    raise ValueError('dropout needs one layer at a time: scan the stack')
  keep = 1.0 - rate
  mask = jax.random.bernoulli(key, keep, x.shape)
  return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros_like(x))


def product(x: Array, w: Array, out_dtype: Any = None) -> Array:
  """x @ w for a plain array or for anything with `apply_to`.

  A weight stored in another dtype is cast for the product alone and cast
  again in the backward pass: saved instead, the casts of all the layers of a
  scan would be a second copy of the model.
  """
  if hasattr(w, 'apply_to'):
    return w.apply_to(x, out_dtype)
  if w.dtype == x.dtype:
    return _contract(x, w, -2, out_dtype)

  @jax.checkpoint
  def cast_product(x, w):
    return _contract(x, w.astype(x.dtype), -2, out_dtype)

  return cast_product(x, w)


def _contract(x: Array, w: Array, axis: int, out_dtype: Any = None) -> Array:
  """x's last axis against w's `axis`; leading axes of w are batch axes.

  Written as one dot_general: its derivative in w is then g^T x, with the rank
  in front, which runs many times faster on CPU than x^T g.
  """
  batch = tuple(range(w.ndim - 2))
  if batch and x.shape[: len(batch)] != w.shape[: len(batch)]:
    raise ValueError(
      f'x of shape {x.shape} does not line up with a stack of weights of'
      f' shape {w.shape}'
    )
  dims = (((x.ndim - 1,), (w.ndim + axis,)), (batch, batch))
  return lax.dot_general(x, w, dims, preferred_element_type=out_dtype)


def _over_rows(gain: Array, y: Array) -> Array:
  """gain [*stack, out] with axes of size 1 until it broadcasts over y."""
  *stack, n = gain.shape
  return gain.reshape(*stack, *(1,) * (y.ndim - gain.ndim), n)


def over(x: Array, like: Array) -> Array:
  """x [*stack] with axes of size 1 until it broadcasts over `like`."""
  return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
