"""A jaxpr run again with low-rank weights among its inputs.

Equations that touch no such weight are emitted as they stand. Those that do
have a rule (`products`, `views`), or call other jaxprs, and are then written
again here by jax's public functions around the same walk.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_train.lora import lookups, products, views
from lorax_train.lora.equation import (
  describe,
  inlined_jaxpr,
  open_jaxpr,
  run,
  scan_counts,
)
from lorax_train.lora.factored import Factored, NoRule

Rule = Callable[[Any, Sequence[Any]], list[Any]]

RULES: dict[str, Rule] = {
  'broadcast_in_dim': views.broadcast_in_dim,
  'concatenate': views.concatenate,
  'conv_general_dilated': products.conv_general_dilated,
  'convert_element_type': views.convert_element_type,
  'copy': views.same_factors,
  'copy_p': views.same_factors,
  'device_put': views.same_factors,
  'div': views.div,
  'dot_general': products.dot_general,
  'dynamic_slice': views.dynamic_slice,
  'gather': lookups.gather,
  'mul': views.mul,
  'name': views.same_factors,
  'neg': views.neg,
  'optimization_barrier': views.optimization_barrier,
  'pvary': views.same_factors,
  'ragged_dot_general': products.ragged_dot_general,
  'reshape': views.reshape,
  'rev': views.rev,
  'sharding_constraint': views.same_factors,
  'slice': views.slice_,
  'split': views.split,
  'squeeze': views.squeeze,
  'stack': views.stack,
  'stop_gradient': views.stop_gradient,
  'transpose': views.transpose,
  'unstack': views.unstack,
}


class LowRankError(ValueError):
  """A function does to an adapted weight what only a full matrix allows."""


@dataclasses.dataclass(frozen=True)
class Walk:
  """How to go through a jaxpr.

  Attributes:
    materialise: form the sum of W and its update where there is no rule.
    inline_custom_vjp: take the derivative of a custom_vjp's own function
      where an adapted weight enters it.
  """

  materialise: bool
  inline_custom_vjp: bool

  def __call__(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """Results of the jaxpr; weights may come out as they went in."""
    jaxpr, consts = open_jaxpr(jaxpr)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, values, strict=True)

    def read(v):
      return v.val if isinstance(v, jc.Literal) else known[v]

    for eqn in jaxpr.eqns:
      results = self._equation(eqn, [read(v) for v in eqn.invars])
      known |= zip(eqn.outvars, results, strict=True)
    results = [read(v) for v in jaxpr.outvars]
    return [
      jnp.asarray(result) if isinstance(v, jc.Literal) else result
      for v, result in zip(jaxpr.outvars, results, strict=True)
    ]

  def _equation(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
    weights = [v for v in values if isinstance(v, Factored)]
    if not weights:
      return run(eqn, values)
    name = eqn.primitive.name
    try:
      if name in CALLS:
        return CALLS[name](self, eqn, values)
      if name in RULES:
        return [_vector_formed(v) for v in RULES[name](eqn, values)]
      raise NoRule('')
    except NoRule as reason:
      what = describe(eqn) + (f': {reason}' if str(reason) else '')
    return run(eqn, [self.settled(v, what) for v in values])

  def settled(self, value: Any, what: str) -> Any:
    """An array for whatever `what` may not see as factors.

    Raises:
      LowRankError: nobody allowed to materialise, or dropout is on.
    """
    if not isinstance(value, Factored):
      return value
    if not self.materialise:
      raise LowRankError(
        f'{value.path} is adapted, and there is no low-rank rule for {what};'
        ' pass materialise=True to form the whole weight there, or leave it'
        ' out of the targets'
      )
    if value.key is not None:
      raise LowRankError(
        f'{value.path} has dropout, which a materialised weight cannot have,'
        f' and there is no low-rank rule for {what}; leave out the key'
      )
    return value.total()


def _vector_formed(value: Any) -> Any:
  """An array in place of a weight of which in or out is left alone.

  It is a row of a matrix, say, and costs no more than the row.
  """
  if not isinstance(value, Factored) or value.key is not None:
    return value
  return value if {'i', 'o'} <= set(value.axes) else value.total()


def _jit(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  def body(*values):
    placed = _placed(values, eqn.params['in_shardings'])
    return walk(eqn.params['jaxpr'], placed)

  body.__name__ = eqn.params['name']
  return _placed(jax.jit(body)(*values), eqn.params['out_shardings'])


def _placed(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
  """Arrays under a call's own shardings, where it has any."""
  return [
    lax.with_sharding_constraint(v, s)
    if isinstance(s, jax.sharding.Sharding) and not isinstance(v, Factored)
    else v
    for v, s in zip(values, shardings, strict=True)
  ]


def _inline(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  return walk(inlined_jaxpr(eqn), values)


def _custom_vjp(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  if not walk.inline_custom_vjp:
    raise NoRule(
      'its own backward pass returns the gradient of the whole weight, unless'
      ' inline_custom_vjp=True puts its function in place of it'
    )
  return _inline(walk, eqn, values)


def _checkpoint(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  body = jax.checkpoint(
    lambda *values: walk(eqn.params['jaxpr'], values),
    prevent_cse=eqn.params['prevent_cse'],
    policy=eqn.params['policy'],
  )
  return body(*values)


def _scan(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  n_consts, n_carry = scan_counts(eqn)
  n_fixed = n_consts + n_carry
  consts, init, xs = (
    values[:n_consts],
    values[n_consts:n_fixed],
    values[n_fixed:],
  )
  jaxpr, _ = open_jaxpr(eqn.params['jaxpr'])
  still = _unchanged(
    init, jaxpr.invars[n_consts:n_fixed], jaxpr.outvars[:n_carry]
  )
  for x in xs:
    if isinstance(x, Factored) and x.axes[0] != 's':
      raise NoRule(f'it goes along the first axis of {x.axes}, no stack axis')

  def body(carry, xs):
    # The letters of `axes` are static: a scan neither strips the first one
    # from what it slices, nor adds one to what it stacks.
    rows = [_axes(x, lambda axes: axes[1:]) for x in xs]
    out = walk(eqn.params['jaxpr'], [*consts, *still.refill(carry), *rows])
    ys = [_axes(y, lambda axes: 's' + axes) for y in out[n_carry:]]
    return still.moving(out[:n_carry]), ys

  carry, ys = lax.scan(
    body,
    still.moving(init),
    xs,
    length=eqn.params['length'],
    reverse=eqn.params['reverse'],
    unroll=eqn.params['unroll'],
  )
  return [*still.refill(carry), *ys]


def _while(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  n_cond, n_body = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  of_cond, of_body = values[:n_cond], values[n_cond : n_cond + n_body]
  init = values[n_cond + n_body :]
  jaxpr, _ = open_jaxpr(eqn.params['body_jaxpr'])
  still = _unchanged(init, jaxpr.invars[n_body:], jaxpr.outvars)

  def go_on(carry):
    return walk(eqn.params['cond_jaxpr'], [*of_cond, *still.refill(carry)])[0]

  def body(carry):
    out = walk(eqn.params['body_jaxpr'], [*of_body, *still.refill(carry)])
    return still.moving(out)

  return still.refill(lax.while_loop(go_on, body, still.moving(init)))


def _cond(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  index, *operands = values

  def settled(branch, *operands):
    what = f'a branch that returns it: {describe(eqn)}'
    return [walk.settled(v, what) for v in walk(branch, operands)]

  branches = [
    lambda *operands, branch=branch: settled(branch, *operands)
    for branch in eqn.params['branches']
  ]
  return lax.switch(index, branches, *operands)


def _shard_map(walk: Walk, eqn: Any, values: list[Any]) -> list[Any]:
  params = eqn.params
  specs = [
    _factor_specs(v, s) if isinstance(v, Factored) else s
    for v, s in zip(values, params['in_specs'], strict=True)
  ]

  def body(*values):
    what = f'returning it from a {describe(eqn)}'
    return tuple(walk.settled(v, what) for v in walk(params['jaxpr'], values))

  return jax.shard_map(
    body,
    mesh=params['mesh'],
    in_specs=tuple(specs),
    out_specs=tuple(params['out_specs']),
    axis_names=params['newly_manual_axes'],
    check_vma=params['check_vma'],
  )(*values)


def _factor_specs(value: Factored, spec: Any) -> Factored:
  """Specs of all parts: a factor's axis lies as W's own does."""
  of_w = [*spec, *[None] * (len(value.axes) - len(spec))]

  def of(kind):
    return [s for s, k in zip(of_w, value.axes, strict=True) if k == kind]

  stack = PartitionSpec(*of('s'))
  return dataclasses.replace(
    value,
    w=spec,
    a=PartitionSpec(*of('s'), None, *of('i')),
    b=PartitionSpec(*of('s'), None, *of('o')),
    scale=stack,
    gain=None if value.gain is None else PartitionSpec(*of('s'), *of('o')),
    rate=None if value.rate is None else stack,
    key=None if value.key is None else stack,
  )


@dataclasses.dataclass(frozen=True)
class _Unchanged:
  """Weights that a loop carries along: {place in the carry: weight}."""

  weights: dict[int, Factored]

  def moving(self, carry: Sequence[Any]) -> list[Any]:
    return [v for i, v in enumerate(carry) if i not in self.weights]

  def refill(self, moving: Sequence[Any]) -> list[Any]:
    rest = iter(moving)
    n = len(moving) + len(self.weights)
    return [
      self.weights[i] if i in self.weights else next(rest) for i in range(n)
    ]


def _unchanged(
  init: Sequence[Any], before: Sequence[Any], after: Sequence[Any]
) -> _Unchanged:
  weights = {i: v for i, v in enumerate(init) if isinstance(v, Factored)}
  for i, value in weights.items():
    if before[i] is not after[i]:
      raise NoRule(f'the loop changes {value.path}, which it carries')
  return _Unchanged(weights)


def _axes(value: Any, change: Callable[[str], str]) -> Any:
  if not isinstance(value, Factored):
    return value
  return dataclasses.replace(value, axes=change(value.axes))


CALLS: dict[str, Callable[[Walk, Any, list[Any]], list[Any]]] = {
  'checkpoint': _checkpoint,
  'closed_call': _inline,
  'cond': _cond,
  'core_call': _inline,
  'custom_jvp_call': _inline,
  'custom_vjp_call': _custom_vjp,
  'jit': _jit,
  'pjit': _jit,
  'remat': _checkpoint,
  'remat2': _checkpoint,
  'scan': _scan,
  'shard_map': _shard_map,
  'while': _while,
}
