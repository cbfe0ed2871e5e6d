"""Counts of a jaxpr: FLOPs of its products, and the arrays that it makes.

XLA's own cost analysis counts the body of a loop once; here bodies count as
often as they run, and kernels as often as their grid has cells, whether or not a
cell is skipped.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def subjaxprs(eqn: Any) -> Iterator[tuple[Any, int]]:
  """(jaxpr, how often it runs) of all that an equation calls."""
  times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
  if eqn.primitive.name == 'pallas_call':
    times = math.prod(eqn.params['grid_mapping'].grid)
  for value in eqn.params.values():
    for one in value if isinstance(value, tuple | list) else [value]:
      inner = getattr(one, 'jaxpr', one)
      if hasattr(inner, 'eqns'):
        yield inner, times


def walk(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
  """(equation, how often it runs) of a jaxpr and all within."""
  for eqn in jaxpr.eqns:
    inner = list(subjaxprs(eqn))
    if not inner:
      yield eqn, times
    for sub, n in inner:
      yield from walk(sub, times * n)


def products(jaxpr: Any) -> Iterator[tuple[int, tuple[int, ...]]]:
  """(FLOPs over all runs, result shape) of each matrix product, convolution."""
  for eqn, times in walk(getattr(jaxpr, 'jaxpr', jaxpr)):
    terms = _TERMS.get(eqn.primitive.name)
    if terms is not None:
      shape = eqn.outvars[0].aval.shape
      yield 2 * terms(eqn) * math.prod(shape) * times, shape


def _contracted(eqn: Any) -> int:
  (axes, _), _ = eqn.params['dimension_numbers']
  return math.prod(eqn.invars[0].aval.shape[i] for i in axes)


def _taps(eqn: Any) -> int:
  """Weights that make up one output of a convolution."""
  shape = eqn.invars[1].aval.shape
  return math.prod(shape) // shape[eqn.params['dimension_numbers'].rhs_spec[0]]


# Of one number of the result, how many products are summed.
_TERMS: dict[str, Callable[[Any], int]] = {
  'dot_general': _contracted,
  'conv_general_dilated': _taps,
}


def total(jaxpr: Any) -> int:
  """FLOPs of all products of a jaxpr."""
  return sum(n for n, _ in products(jaxpr))


def dots(function: Callable, *args: Any) -> list[tuple[int, tuple[int, ...]]]:
  """(FLOPs over all runs, result shape) of each product of a function."""
  return list(products(_traced(function, args)))


def flops(function: Callable, *args: Any) -> int:
  """FLOPs of all products of a function."""
  return total(_traced(function, args))


def _traced(function: Callable, args: tuple[Any, ...]) -> Any:
  return jax.make_jaxpr(function)(*args)


def result_shapes(function: Callable, *args: Any) -> set[tuple[int, ...]]:
  """Shapes of everything that any equation makes, loops included."""
  shapes: set[tuple[int, ...]] = set()

  def visit(jaxpr: Any) -> None:
    for eqn in jaxpr.eqns:
      shapes.update(v.aval.shape for v in eqn.outvars)
      for sub, _ in subjaxprs(eqn):
        visit(sub)

  visit(_traced(function, args).jaxpr)
  return shapes
