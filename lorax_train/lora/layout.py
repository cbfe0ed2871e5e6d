"""Which axes of each parameter a function contracts, keeps or stacks.

The answer is read off the function's trace: every dimension of a parameter is
followed through transposes, reshapes, slices, scans and calls to the products,
convolutions and look-ups where the parameter is used.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc

from lorax_train.lora.equation import (
  describe,
  inlined_jaxpr,
  open_jaxpr,
  scan_counts,
  trace,
)
from lorax_train.lora.halves import path_of
from lorax_train.lora.tracks import USES, VIEWS, View

Params = Any


# What a value is made of: several parameters after a concatenation.
Views = tuple[View, ...]


@dataclasses.dataclass(frozen=True)
class _Use:
  """One use of a parameter: its axes' letters, and where that was."""

  letters: str
  what: str
  look_up: bool


def layout(
  fn: Callable[..., Any], params: Params, *args: Any, **kwargs: Any
) -> dict[str, str]:
  """What each axis of each weight is to `fn(params, *args, **kwargs)`.

  Nothing is computed. A tied embedding, looked up and then transposed for the
  head, is laid out as the look-up has it.

  Args:
    fn: any JAX function.
    params: tree of arrays, or of `jax.ShapeDtypeStruct`.
    *args: as `fn` takes them; structs will do for arrays.
    **kwargs: likewise.

  Returns:
    {path: letters}, one letter an axis: `i` contracted (in), `v` looked up (in,
    of an embedding), `o` kept (out), `s` stack (layers of a scan, experts,
    batches of weights). Leaves that are only added or multiplied elementwise
    are not in it: they take no adapter.

  Raises:
    ValueError: a leaf is used in two ways that no one layout fits.

  >>> import jax.numpy as jnp
  >>> def fn(params, x):
  ...   return jnp.einsum('btd,dnh->btnh', x, params['q']) + params['bias']
  >>> params = {'q': jnp.ones((4, 2, 3)), 'bias': jnp.ones((2, 3))}
  >>> layout(fn, params, jnp.ones((1, 5, 4)))
  {'q': 'ioo'}
  """
  jaxpr, _, at = trace(fn, (params, *args), kwargs)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  values: list[Views] = [()] * len(at)
  for place, i in enumerate(at):
    if i < len(leaves):
      path, leaf = leaves[i]
      values[place] = _whole(path_of(path), leaf.shape)
  reader = _Reader({})
  reader.read(jaxpr, values)
  in_order = [view.path for views in values for view in views]
  return {
    path: _agreed(path, reader.uses[path])
    for path in in_order
    if path in reader.uses
  }


def _whole(path: str, shape: Sequence[int]) -> Views:
  if len(shape) < 2:
    return ()
  dims = tuple(frozenset({d}) for d in range(len(shape)))
  return (View(path, tuple(shape), dims),)


def _agreed(path: str, uses: Sequence[_Use]) -> str:
  """The letters that all uses share, in and out swapped where need be."""
  first = next((use for use in uses if use.look_up), uses[0])
  swapped = first.letters.translate(str.maketrans('io', 'oi'))
  for use in uses:
    if use.letters not in (first.letters, swapped):
      raise ValueError(
        f'{path} is used in two ways that no one layout fits: {first.letters}'
        f' by {first.what}, and {use.letters} by {use.what}'
      )
  return first.letters.replace('i', 'v') if first.look_up else first.letters


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Collects uses: {path: [use, ...]}."""

  uses: dict[str, list[_Use]]

  def read(self, jaxpr: Any, values: Sequence[Views]) -> list[Views]:
    """The views that come out of a jaxpr into which some go."""
    jaxpr, _ = open_jaxpr(jaxpr)
    known = dict(zip(jaxpr.invars, values, strict=True))

    def read(v):
      return () if isinstance(v, jc.Literal) else known.get(v, ())

    for eqn in jaxpr.eqns:
      operands = [read(v) for v in eqn.invars]
      if any(operands):
        results = self._equation(eqn, operands)
        known |= zip(eqn.outvars, results, strict=False)
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn: Any, operands: list[Views]) -> Sequence[Views]:
    name = eqn.primitive.name
    if name in USES:
      for side, views in enumerate(operands):
        for view in views:
          self._use(eqn, view, USES[name](eqn, side, view))
    if name in _CALLS:
      return _CALLS[name](self, eqn, operands)
    if name in VIEWS:
      return [tuple(VIEWS[name](eqn, view) for view in operands[0])]
    if name == 'concatenate':
      return [tuple(view for views in operands for view in views)]
    if name == 'stack':
      dim = eqn.params['axis']
      return [tuple(v.widened(dim) for views in operands for v in views)]
    if name == 'unstack':
      one = tuple(v.indexed(eqn.params['axis']) for v in operands[0])
      return [one] * len(eqn.outvars)
    if name == 'split':
      return [operands[0]] * len(eqn.outvars)
    if name in ('device_put', 'optimization_barrier'):
      return operands
    if name == 'mul' and any(v.aval.shape == () for v in eqn.invars):
      return [operands[0] or operands[1]]
    if name == 'div' and eqn.invars[1].aval.shape == ():
      return [operands[0]]
    return []

  def _use(self, eqn: Any, value: View, kinds: str | None) -> None:
    """Writes down a use, `kinds` a letter for each dimension of the view."""
    letters = ['s'] * len(value.shape)
    for axes, kind in zip(value.dims, kinds or '', strict=kinds is not None):
      for axis in axes - value.stack:
        if letters[axis] not in ('s', kind):
          return  # parts of one axis are used in different ways
        letters[axis] = kind
    if 'i' not in letters or 'o' not in letters:
      return
    use = _Use(''.join(letters), describe(eqn), eqn.primitive.name == 'gather')
    self.uses.setdefault(value.path, []).append(use)


def _inlined(reader: _Reader, eqn: Any, operands: list[Views]) -> list[Views]:
  return reader.read(inlined_jaxpr(eqn), operands)


def _scan(reader: _Reader, eqn: Any, operands: list[Views]) -> list[Views]:
  n_consts, n_carry = scan_counts(eqn)
  n_fixed = n_consts + n_carry
  jaxpr, _ = open_jaxpr(eqn.params['jaxpr'])
  carry = _carried(
    operands[n_consts:n_fixed], jaxpr.invars[n_consts:n_fixed], jaxpr.outvars
  )
  rows = [tuple(v.indexed(0) for v in views) for views in operands[n_fixed:]]
  reader.read(jaxpr, [*operands[:n_consts], *carry, *rows])
  return carry


def _while(reader: _Reader, eqn: Any, operands: list[Views]) -> list[Views]:
  n_cond, n_body = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  jaxpr, _ = open_jaxpr(eqn.params['body_jaxpr'])
  n_fixed = n_cond + n_body
  carry = _carried(operands[n_fixed:], jaxpr.invars[n_body:], jaxpr.outvars)
  reader.read(eqn.params['cond_jaxpr'], [*operands[:n_cond], *carry])
  reader.read(jaxpr, [*operands[n_cond:n_fixed], *carry])
  return carry


def _carried(
  operands: Sequence[Views], before: Sequence[Any], after: Sequence[Any]
) -> list[Views]:
  """A loop's weights that come out of its body as they went in."""
  return [
    views if b is a else ()
    for views, b, a in zip(operands, before, after, strict=False)
  ]


def _cond(reader: _Reader, eqn: Any, operands: list[Views]) -> list[Views]:
  for branch in eqn.params['branches']:
    reader.read(branch, operands[1:])
  return []


_CALLS: dict[str, Callable[[_Reader, Any, list[Views]], list[Views]]] = {
  'cond': _cond,
  'scan': _scan,
  'while': _while,
  **dict.fromkeys(
    ('checkpoint', 'closed_call', 'core_call', 'custom_jvp_call',
     'custom_vjp_call', 'jit', 'pjit', 'remat', 'remat2', 'shard_map'),
    _inlined,
  ),
}  # fmt: skip
