"""How much of a program is in memory at once, read off its jaxpr.

XLA gives a value a buffer where something reads it that is not fused with what made
it: a matrix product, a loop, a kernel. What is elementwise, and what is reduced, is
fused; the buffers that it reads live until it is read. So here: a buffer lives from
the equation that makes it to the one that reads it last, in the order of the jaxpr.
Of a loop there is what it carries and stacks, and one run of its body.

The state comes in donated, and what leaves is written over it; so does a loop
that carries an array of the state write over that.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from lorax_train.plan import flops

Var = Any

# What is never fused with the elementwise work that makes what it reads.
_UNFUSED = {
  'dot_general', 'conv_general_dilated', 'ragged_dot', 'ragged_dot_general',
  'sort', 'top_k', 'cumsum', 'cummax', 'cumlogsumexp', 'scan', 'while', 'cond',
  'pallas_call', 'custom_call', 'pure_callback', 'shard_map',
}  # fmt: skip
# The same bytes by another name.
_VIEWS = {
  'reshape', 'squeeze', 'expand_dims', 'transpose', 'name', 'copy', 'copy_p',
  'sharding_constraint', 'reduce_precision', 'pvary',
}  # fmt: skip
_SUMS = ('add', 'add_any')
_CALLED = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')


class Op(NamedTuple):
  """An equation of a program whose calls are inlined.

  Attributes:
    name: of the primitive.
    reads: ids of values; those that come in from outside are negative.
    makes: {id: bytes}.
    inside: bytes that one run of it needs meanwhile.
  """

  name: str
  reads: tuple[int, ...]
  makes: dict[int, int]
  inside: int = 0


class Rules(NamedTuple):
  """In what compilers differ.

  Attributes:
    laid_out: {length of a last axis: how long it is in memory}.
    rewrites: a sum is written over what the values are made of that it adds,
      and not only over one of these.
    gathered: {shape: bytes} of what comes in by parts, and is whole where a product
      reads it.
    cut: {shape: into how many parts a value of it lies}: of weights that are
      trained, their gradients and all that the optimizer makes of them.
  """

  laid_out: Mapping[int, int] = MappingProxyType({})
  rewrites: bool = False
  gathered: Mapping[tuple[int, ...], int] = MappingProxyType({})
  cut: Mapping[tuple[int, ...], int] = MappingProxyType({})

  def size(self, aval: Any) -> int:
    """Bytes of a value in memory."""
    shape: tuple[int, ...] = getattr(aval, 'shape', ())
    own = size_of(aval) // self.cut.get(shape, 1)
    if len(shape) > 3 and shape[-1] in self.laid_out:
      own = own // shape[-1] * self.laid_out[shape[-1]]
    return own


PLAIN = Rules()


def peak(jaxpr: Any, rules: Rules = PLAIN, donated: int = 0) -> int:
  """The most bytes alive at once of what a jaxpr makes.

  What comes in is not counted. Shapes are those of one device.

  Args:
    jaxpr: of the program.
    rules: of the compiler.
    donated: how many of the first arrays that come in may be written over.
  """
  ops, outputs = _flat(getattr(jaxpr, 'jaxpr', jaxpr), rules, donated)
  return _peak_of(ops, outputs, set(), rules)


def stacked(jaxpr: Any, length: int, rules: Rules = PLAIN) -> int:
  """Bytes that the first loop of that many runs stacks: what layers save."""
  for eqn in equations(jaxpr):
    if eqn.primitive.name == 'scan' and eqn.params['length'] == length:
      inner = eqn.params['jaxpr'].jaxpr.outvars
      return sum(
        rules.size(out.aval)
        for out, own in zip(eqn.outvars, inner, strict=True)
        if len(out.aval.shape) > len(own.aval.shape)
      )
  return 0


def equations(jaxpr: Any) -> Iterator[Any]:
  """All of a jaxpr, those in loops once."""
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    yield eqn
    for inner in _bodies(eqn):
      yield from equations(inner)


def size_of(aval: Any) -> int:
  """Bytes of a value by its shape."""
  width = getattr(getattr(aval, 'dtype', None), 'itemsize', 8)  # of a key, 8
  return math.prod(getattr(aval, 'shape', ())) * width


def _bodies(eqn: Any) -> Iterator[Any]:
  """The jaxprs within an equation; of a kernel none: it has its own memory."""
  if eqn.primitive.name == 'pallas_call':
    return
  for inner, _ in flops.subjaxprs(eqn):
    yield inner


def _called(eqn: Any) -> Any:
  """The jaxpr of a call that XLA sees nothing of: of jit, remat, custom_vjp."""
  once = eqn.primitive.name == 'scan' and eqn.params['length'] == 1
  if eqn.primitive.name in _UNFUSED and not once:
    return None
  for key in _CALLED:
    inner = eqn.params.get(key)
    inner = getattr(inner, 'jaxpr', inner)
    if hasattr(inner, 'eqns') and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _flat(
  jaxpr: Any, rules: Rules, donated: int = 0
) -> tuple[list[Op], tuple[int, ...]]:
  """Equations in order, and ids of what leaves; -1, -2, ... come in.

  A loop that carries one of the first `donated` makes no other array of it.
  """
  ops: list[Op] = []
  made, outside = itertools.count(1), itertools.count(-1, -1)

  def visit(jaxpr: Any, env: dict[Var, int]) -> None:
    env.update((var, next(outside)) for var in jaxpr.constvars)
    for eqn in jaxpr.eqns:
      inner = _called(eqn)
      if inner is None:
        reads = tuple(env[a] for a in eqn.invars if not _is_literal(a))
        over = _written_over(eqn, env, donated)
        env.update(over)
        makes = {}
        for out in eqn.outvars:
          if out not in over:
            env[out] = next(made)
            makes[env[out]] = rules.size(out.aval)
        bodies = [_of_body(body, eqn, rules) for body in _bodies(eqn)]
        inside = max(bodies, default=0)
        if eqn.primitive.name == 'dot_general':
          shapes = (tuple(a.aval.shape) for a in eqn.invars)
          inside += sum(rules.gathered.get(shape, 0) for shape in shapes)
        ops.append(Op(eqn.primitive.name, reads, makes, inside))
        continue
      ids = [next(outside) if _is_literal(a) else env[a] for a in eqn.invars]
      env_in = dict(zip(inner.invars, ids, strict=True))
      visit(inner, env_in)
      for out, own in zip(eqn.outvars, inner.outvars, strict=True):
        env[out] = next(outside) if _is_literal(own) else env_in[own]

  env = {var: next(outside) for var in jaxpr.invars}
  visit(jaxpr, env)
  return ops, tuple(0 if _is_literal(v) else env[v] for v in jaxpr.outvars)


def _as_long(whole: Sequence[Var], own: Sequence[Var]) -> list[Var]:
  """Those that a run of a loop's body has as they are, and no slice of."""
  both = zip(whole, own, strict=True)
  return [w for w, o in both if len(w.aval.shape) == len(o.aval.shape)]


def _written_over(
  eqn: Any, env: Mapping[Var, int], donated: int
) -> dict[Var, int]:
  """{what leaves an equation: the donated array that it is written over}."""
  name, pairs = eqn.primitive.name, []
  if name == 'reshape':
    pairs = [(eqn.outvars[0], eqn.invars[0])]
  elif name == 'scan':
    body = eqn.params['jaxpr'].jaxpr
    carried = _as_long(eqn.outvars, body.outvars)
    # Constants of the loop come before what it carries.
    given = _as_long(eqn.invars, body.invars)[-len(carried) or len(body.invars) :]  # fmt: skip
    pairs = list(zip(carried, given, strict=True))
  return {
    out: env[own]
    for out, own in pairs
    if not _is_literal(own) and -donated <= env[own] < 0
  }


def _is_literal(atom: Any) -> bool:
  return hasattr(atom, 'val')


def _of_body(body: Any, eqn: Any, rules: Rules) -> int:
  """One run of a loop's body, with a copy of each slice it is given."""
  ops, outputs = _flat(body, rules)
  if eqn.primitive.name != 'scan':
    return _peak_of(ops, outputs, set(outputs), rules)
  # What comes in has the first ids, in order.
  slices = {
    -1 - i: rules.size(own.aval)
    for i, (own, whole) in enumerate(zip(body.invars, eqn.invars, strict=True))
    if len(own.aval.shape) < len(whole.aval.shape)
  }
  # What is carried is written over what was.
  kept = {
    id_
    for id_, own, whole in zip(outputs, body.outvars, eqn.outvars, strict=True)
    if len(own.aval.shape) < len(whole.aval.shape)
  }
  return _peak_of(_with_slices(ops, slices), outputs, kept, rules)


def _with_slices(ops: list[Op], slices: dict[int, int]) -> list[Op]:
  """A copy of each slice, made where it is first read."""
  out, left = [], dict(slices)
  for op in ops:
    for id_ in op.reads:
      if id_ in left:
        out.append(Op('scan', (), {id_: left.pop(id_)}))
    out.append(op)
  return out


def _peak_of(
  ops: list[Op], outputs: Iterable[int], kept: set[int], rules: Rules
) -> int:
  """Of what leaves, that in `kept` has a buffer of its own."""
  ops = _needed(ops, outputs)
  sources = _sources(ops, kept)
  last: dict[int, int] = {}
  for at, reads in enumerate([*(op.reads for op in ops), tuple(outputs)]):
    last.update((s, at) for id_ in reads for s in sources.get(id_, ()))
  buffers: dict[int, int] = {}
  live = most = 0
  for at, op in enumerate(ops):
    new = {i: n for i, n in op.makes.items() if sources[i] == (i,)}
    added = sum(new.values())
    if op.name in _SUMS:
      over = buffers if rules.rewrites else _read_as_they_are(op, sources)
      free = [buffers[i] for i in over if i in buffers and last.get(i) == at]
      added -= max((n for n in free if n in new.values()), default=0)
    most = max(most, live + added + op.inside)
    buffers.update(new)
    live += sum(new.values())
    for id_ in [i for i in buffers if last.get(i, -1) <= at]:
      live -= buffers.pop(id_)
  return most


def _read_as_they_are(
  op: Op, sources: Mapping[int, tuple[int, ...]]
) -> Iterator[int]:
  """Buffers that an equation reads by themselves."""
  for id_ in op.reads:
    own = sources.get(id_, ())
    if len(own) == 1:
      yield own[0]


def _needed(ops: list[Op], outputs: Iterable[int]) -> list[Op]:
  """Without what nobody reads."""
  wanted, kept = set(outputs), []
  for op in reversed(ops):
    if wanted & op.makes.keys():
      wanted.update(op.reads)
      kept.append(op)
  return kept[::-1]


def _sources(ops: list[Op], kept: set[int]) -> dict[int, tuple[int, ...]]:
  """{id: the buffers that it is read from}; of a buffer itself."""
  kept = set(kept)
  for op in ops:
    if op.name in _UNFUSED:
      kept.update(op.reads)
  # What a view is read from is read as it stands.
  for op in reversed(ops):
    if op.name in _VIEWS and kept & op.makes.keys():
      kept.update(op.reads)
  added = _added(ops)
  of: dict[int, tuple[int, ...]] = {}
  for op in ops:
    below = tuple(dict.fromkeys(s for i in op.reads for s in of.get(i, (i,))))
    for id_ in op.makes:
      if op.name in _VIEWS or id_ in added:
        of[id_] = below
      elif op.name in _UNFUSED or op.name.startswith(('reduce_', 'arg')):
        of[id_] = (id_,)
      else:
        of[id_] = (id_,) if id_ in kept or added & {*op.reads} else below
  return of


def _added(ops: list[Op]) -> set[int]:
  """Products that are but added to something: they are summed in place.

  So x @ W + (x @ A) @ B has one buffer, and not three.
  """
  uses = collections.Counter(i for op in ops for i in op.reads)
  products = {
    i for op in ops if op.name == 'dot_general' for i in op.makes if uses[i] == 1
  }  # fmt: skip
  out: set[int] = set()
  for op in ops:
    if op.name in _SUMS:
      out.update(sorted(products & {*op.reads})[-1:])
  return out
