"""Counts of a jaxpr: FLOPs of matrix products, and the arrays it makes.

XLA's own cost analysis counts the body of a loop once; here bodies count as
often as they run.
"""

import math
from collections.abc import Iterator

import jax


def subjaxprs(eqn) -> Iterator[tuple[object, int]]:
  """(jaxpr, how often it runs) of all that an equation calls."""
  times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
  for value in eqn.params.values():
    for one in value if isinstance(value, (tuple, list)) else [value]:
      inner = getattr(one, 'jaxpr', one)
      if hasattr(inner, 'eqns'):
        yield inner, times


def walk(jaxpr, times: int = 1) -> Iterator[tuple[object, int]]:
  """(equation, how often it runs) of a jaxpr and all within."""
  for eqn in jaxpr.eqns:
    inner = list(subjaxprs(eqn))
    if not inner:
      yield eqn, times
    for sub, n in inner:
      yield from walk(sub, times * n)


def dots(function, *args) -> list[tuple[int, tuple[int, ...]]]:
  """(FLOPs over all runs, result shape) of each matrix product."""
  out = []
  for eqn, times in walk(jax.make_jaxpr(function)(*args).jaxpr):
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      k = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      shape = eqn.outvars[0].aval.shape
      out.append((2 * k * math.prod(shape) * times, shape))
  return out


def flops(function, *args) -> int:
  """FLOPs of all matrix products."""
  return sum(n for n, _ in dots(function, *args))


def result_shapes(function, *args) -> set[tuple[int, ...]]:
  """Shapes of everything that any equation makes, loops included."""
  shapes = set()

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      shapes.update(v.aval.shape for v in eqn.outvars)
      for sub, _ in subjaxprs(eqn):
        visit(sub)

  visit(jax.make_jaxpr(function)(*args).jaxpr)
  return shapes
