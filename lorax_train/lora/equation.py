"""Equations of a jaxpr, by public names alone: run one, read one, name one.

A jaxpr is what `jax.make_jaxpr` writes down of a function: equations, each a
primitive (dot_general, scan ...) with its operands and parameters.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
import numpy as np

# Frames below these folders are not the user's own lines.
_NOT_THE_USER = tuple(
  os.path.dirname(os.path.abspath(file)) + os.sep
  for file in (jax.__file__, __file__)
)
_LIBRARIES = ('flax', 'haiku', 'equinox', 'optax')


def trace(
  fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, list[int]]:
  """The jaxpr of `fn(*args, **kwargs)`, a function of the arrays alone.

  What is no array (flags, functions, names) stays what it is to `fn`.

  Returns:
    (jaxpr, structure of fn's result, which leaves of (args, kwargs) are the
    jaxpr's inputs).
  """
  treedef: Any
  leaves, treedef = jax.tree.flatten((args, kwargs))
  at = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

  def of_arrays(*arrays):
    filled = list(leaves)
    for i, array in zip(at, arrays, strict=True):
      filled[i] = array
    args, kwargs = treedef.unflatten(filled)
    return fn(*args, **kwargs)

  jaxpr, result = jax.make_jaxpr(of_arrays, return_shape=True)(
    *(leaves[i] for i in at)
  )
  return jaxpr, jax.tree.structure(result), at


def is_array(x: Any) -> bool:
  """Whether x is traced: arrays, and what stands for one."""
  kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
  return isinstance(x, kinds)


def run(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Emits the equation again, as it stands, on other values.

  It goes through a jaxpr of this one equation: how a primitive wants to be
  called (custom_vjp, pallas_call, effects ...) is then jax's affair.

  Args:
    eqn: of a jaxpr.
    values: one for each operand; those of literals are not looked at.

  Returns:
    One value for each result.
  """
  by_variable = {
    v: value
    for v, value in zip(eqn.invars, values, strict=True)
    if not isinstance(v, jc.Literal)
  }
  info = jc.DebugInfo(
    'transform',
    eqn.primitive.name,
    ('',) * len(by_variable),
    ('',) * len(eqn.outvars),
  )
  jaxpr = jc.Jaxpr(
    (), list(by_variable), eqn.outvars, [eqn], jc.no_effects, info
  )
  closed = jc.ClosedJaxpr(jaxpr, ())
  return jc.jaxpr_as_fun(closed)(*by_variable.values())


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """(jaxpr, its constants) of a closed or an open one."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def scan_counts(eqn: Any) -> tuple[int, int]:
  """How many operands of a scan are constants, and how many are carried."""
  if 'num_consts' in eqn.params:  # jax < 0.11
    return eqn.params['num_consts'], eqn.params['num_carry']
  consts, carry, _ = eqn.params['ft_in'].unpack()
  return len(consts), len(carry)


def inlined_jaxpr(eqn: Any) -> Any | None:
  """The jaxpr of an equation that does nothing but call it, else None."""
  for name in ('call_jaxpr', 'jaxpr', 'fun_jaxpr'):
    if name in eqn.params:
      return eqn.params[name]
  return None


def describe(eqn: Any) -> str:
  """'sin of f32[6,8] (model.py:12)'."""
  operands = ', '.join(v.aval.str_short(short_dtypes=True) for v in eqn.invars)
  return f'{eqn.primitive.name} of {operands}{_line(eqn)}'


def _line(eqn: Any) -> str:
  """Where the user wrote it: ' (model.py:12)', or '' if nobody knows."""
  trace = eqn.source_info.traceback
  for frame in () if trace is None else trace.frames:
    name = frame.file_name
    if name.startswith(_NOT_THE_USER) or name.startswith('<'):
      continue
    if any(f'{os.sep}{library}{os.sep}' in name for library in _LIBRARIES):
      continue
    return f' ({os.path.basename(name)}:{frame.line_num})'
  return ''
