"""bind / merge / count: what a frozen and a trainable half are together.

`split` makes them; see the head of split.py.
"""

import collections
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax_train.lora import axes as axes_lib
from lorax_train.lora import whole as whole_lib
from lorax_train.lora.matching import adapted, flat, resolve
from lorax_train.lora.spec import LoraSpec
from lorax_train.lora.weight import Adapter, Fixed, LoraWeight
from lorax_train.lora.whole import Original, TunedTable

Params = Any


def path_of(path: tuple) -> str:
  """A key path of `jax.tree_util` as 'layers/self_attn/q_proj'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def bind(
  frozen: Params, trainable: Params, key: jax.Array | None = None
) -> Params:
  """The adapted parameters: a LoraWeight where there is an adapter.

  No FLOPs, no copy: the result is a view to be used inside the step. What is
  trained whole comes in the dtype that the leaf had, an embedding of which some
  rows are trained as a TunedTable.

  Args:
    frozen: from `split`.
    trainable: from `split`, or trained.
    key: typed PRNG key of this step; given, dropout is on.

  >>> import jax.numpy as jnp
  >>> from lorax_train.lora import split
  >>> params = {'q': jnp.ones((3, 5))}
  >>> halves = split(jax.random.key(0), params, LoraSpec('q', rank=2))
  >>> (jnp.ones((1, 3)) @ bind(*halves)['q']).shape
  (1, 5)
  """

  def join(path, fixed, adapter):
    if not isinstance(adapter, Adapter):
      return leaf_of(path, fixed, adapter, table=TunedTable)
    if not isinstance(fixed, Fixed):
      raise ValueError(f'{path_of(path)}: an adapter but no frozen half')
    if not axes_lib.is_matrix(fixed.axes):
      raise ValueError(
        f'{path_of(path)} of axes {fixed.axes} is no [*stack, in, out], for'
        ' which @ could stand: use lora.transform'
      )
    keys = None
    if key is not None and fixed.rate is not None:
      own, stack = key_at(key, path_of(path)), fixed.scale.shape
      keys = jax.random.split(own, stack) if stack else own
    return dataclasses.replace(
      _bound(fixed, adapter),
      rate=None if keys is None else fixed.rate,
      key=keys,
    )

  return jax.tree_util.tree_map_with_path(
    join, frozen, trainable, is_leaf=is_half
  )


def merge(frozen: Params, trainable: Params) -> Params:
  """Plain arrays W + scale A^T B, summed in float32, in W's own dtype.

  A quantised W is made whole in float32 first, so the sum is as exact as over
  a plain one. Leaves without an adapter stay as they are.

  For export and serving, and as the oracle of tests: it materialises what
  `bind` avoids.
  """

  def join(path, fixed, adapter):
    if not isinstance(adapter, Adapter):
      return leaf_of(path, fixed, adapter)
    axes, n_stack = fixed.axes, fixed.scale.ndim
    whole = _bound(fixed, adapter)
    # Factors have a rank axis between stack and own axes, norms have not.
    kept = {'a': 1, 'b': 1, 'a0': 1, 'b0': 1, 'norm2': 0, 'm': 0}
    flat: dict[str, Any] = {
      name: axes_lib.flatten(getattr(whole, name), n_stack + more)
      for name, more in kept.items()
      if getattr(whole, name) is not None
    }
    w = axes_lib.to_matrices(fixed.w, axes)
    matrices = dataclasses.replace(whole, w=w, **flat).merged()
    return axes_lib.from_matrices(matrices, fixed.w.shape, axes)

  return jax.tree_util.tree_map_with_path(
    join, frozen, trainable, is_leaf=is_half
  )


def leaf_of(
  path: tuple,
  fixed: Any,
  own: Any,
  table: Callable[..., Any] | None = None,
) -> Any:
  """A leaf without an adapter: frozen, or trained itself.

  Args:
    path: of the leaf.
    fixed: its frozen half; None where `own` was put in its place.
    own: its trainable half.
    table: what makes an embedding of (W, trained rows, which); None for a
      plain array.

  Raises:
    ValueError: halves that don't belong together.
  """
  if own is None:
    return base_of(path, fixed)
  if fixed is None:
    return own
  if not isinstance(fixed, Original):
    raise ValueError(f'{path_of(path)} is in both halves, and is no adapter')
  if table and fixed.rows is not None:
    return table(fixed.w, own, fixed.rows)
  return fixed.replaced(own)


def base_of(path: tuple, fixed: Any) -> Any:
  """The leaf that a frozen half began from.

  Raises:
    ValueError: all of it is trained, and nobody kept it.
  """
  if isinstance(fixed, Original) and fixed.w is None:
    raise ValueError(f'{path_of(path)} is trained whole: its base is not kept')
  return fixed.w if is_trained(fixed) else fixed


def _bound(fixed: Fixed, adapter: Adapter) -> LoraWeight:
  """Both halves as one, without dropout."""
  return LoraWeight(
    w=fixed.w,
    a=fixed.a_of(adapter),
    b=adapter.b,
    scale=fixed.scale,
    a0=fixed.a0,
    b0=fixed.b0,
    norm2=fixed.norm2,
    m=adapter.m,
  )


def fixed_factors(frozen: Params) -> Params:
  """The factors that training leaves alone, to be kept with a checkpoint.

  LoRA-FA's A, and what PiSSA and OLoRA began with: another machine's SVD would
  give other ones. A tree of Adapters, None where there are none.
  """

  def of(fixed):
    if not isinstance(fixed, Fixed):
      return None
    a = fixed.a if fixed.a0 is None else fixed.a0
    return None if a is None else Adapter(a, fixed.b0)

  return jax.tree.map(of, frozen, is_leaf=is_half)


def with_fixed_factors(frozen: Params, factors: Params) -> Params:
  """`frozen` with what `fixed_factors` once gave in place of its own."""

  def put(fixed, kept):
    if kept is None:
      return fixed
    return dataclasses.replace(
      fixed,
      a=None if fixed.a is None else kept.a,
      a0=None if fixed.a0 is None else kept.a,
      b0=kept.b,
    )

  return jax.tree.map(put, frozen, factors, is_leaf=is_half)


def count(frozen: Params) -> tuple[int, int]:
  """(trainable, base) numbers of parameters, by the true ranks.

  Reads shapes only. Base is what the model has without adapters.

  >>> from lorax_train.lora import split
  >>> params = {'q': jax.numpy.ones((3, 5))}
  >>> halves = split(jax.random.key(0), params, LoraSpec('q', rank=2))
  >>> count(halves[0])
  (16, 15)
  """
  trainable = base = 0
  for leaf in jax.tree.leaves(frozen, is_leaf=is_half):
    if isinstance(leaf, Original):
      trainable += whole_lib.size(leaf)
    if isinstance(leaf, Fixed):
      n_in, n_out = (
        math.prod(axes_lib.sizes(leaf.w.shape, leaf.axes, kind))
        for kind in 'io'
      )
      a_row = n_in if leaf.a is None else 0
      trainable += sum(leaf.ranks) * (a_row + n_out)
      if leaf.norm2 is not None:
        trainable += sum(rank > 0 for rank in leaf.ranks) * n_out
      leaf = leaf.w
    base += math.prod(leaf.shape)
  return trainable, base


def spec_of(frozen: Params, names: Mapping[str, tuple[str, ...]]) -> LoraSpec:
  """The LoraSpec of adapters whose ranks and scales came from elsewhere.

  What `algebra` and `mixing` made has no spec of its own to be saved by. Every
  module is named in full; what most have is rank and alpha, the rest patterns.

  Args:
    frozen: from `algebra.as_adapter`; scales are read, so no tracers.
    names: {path: module names, one for each stack index}, as `split` had them.

  >>> import jax.numpy as jnp
  >>> from lorax_train.lora import split
  >>> params = {'q': jnp.ones((3, 5)), 'v': jnp.ones((3, 5))}
  >>> spec = LoraSpec('q,v', rank=2, alpha=4, rank_pattern={'v': 1})
  >>> frozen, _ = split(jax.random.key(0), params, spec)
  >>> again = spec_of(frozen, {'q': ('q',), 'v': ('v',)})
  >>> again.rank, again.alpha, again.rank_pattern, again.alpha_pattern
  (2, 4.0, {'v': 1}, {})
  """
  found: dict[str, tuple[int, float]] = {}
  for path, half in jax.tree_util.tree_leaves_with_path(
    frozen, is_leaf=is_half
  ):
    if not isinstance(half, Fixed):
      continue
    scales = np.asarray(half.scale, np.float64).reshape(-1)
    for name, rank, scale in zip(
      names[path_of(path)], half.ranks, scales, strict=True
    ):
      if rank:
        found[name] = rank, float(scale) * rank
  if not found:
    raise ValueError('no adapter in it')
  rank, alpha = (
    collections.Counter(values).most_common(1)[0][0]
    for values in zip(*found.values(), strict=True)
  )

  def spec(targets: str, key: Callable[[str], str]) -> LoraSpec:
    return LoraSpec(
      targets,
      rank=rank,
      alpha=alpha,
      rank_pattern={key(n): r for n, (r, _) in found.items() if r != rank},
      alpha_pattern={key(n): a for n, (_, a) in found.items() if a != alpha},
    )

  plain = spec(','.join(found), str)
  want = {n: (r, a / r) for n, (r, a) in found.items()}
  try:
    placed = adapted(resolve(plain, flat(names)))
  except ValueError:
    placed = {}
  if {n: (p.rank, p.scale) for n, p in placed.items()} == want:
    return plain
  # Some name is the end of another, or none to a list of names.
  regex = '|'.join(map(re.escape, found))
  return spec(f'(?:{regex})', lambda n: f'^{re.escape(n)}')


def is_weight(x: Any) -> bool:
  """Weights of other kinds (quantised ones) are pytrees with a shape."""
  return x is None or hasattr(x, 'shape')


def is_trained(x: Any) -> bool:
  """Whether x is the frozen half of something that is trained."""
  return isinstance(x, Fixed | Original)


def is_half(x: Any) -> bool:
  """Where `frozen` ends: a split leaf, a plain one, or nothing."""
  return is_trained(x) or is_weight(x)


def key_at(key: jax.Array, path: str) -> jax.Array:
  """The key of what hangs on a path, of its own for each path."""
  # crc32 and not hash(): the latter is salted per process, and every host of
  # a run must draw the same adapters.
  return jax.random.fold_in(key, zlib.crc32(path.encode()))
