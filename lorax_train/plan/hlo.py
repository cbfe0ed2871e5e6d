"""What stands in the text of a compiled program.

Reads what `compiled.as_text()` gives on CPU, GPU and TPU: collectives with their
sizes and how often each runs, kernels, and shapes of products.
"""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)

_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-$]+) \(.*\{\s*$')
_CALLS = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|called_computations)='
  r'(?:\{([^}]*)\}|%?([\w.\-$]+))'
)
_LOOP = re.compile(r' while\(.*condition=%?([\w.\-$]+), body=%?([\w.\-$]+)')
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_CONSTANT = re.compile(r's32\[\]\S* constant\((\d+)\)')
_ARRAY = re.compile(r'\b(pred|bf16|f\d+\w*|[su]\d+)\[([\d,]*)\]')
_KIND = re.compile(rf' ({"|".join(KINDS)})(-start)?\(')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_KERNEL = re.compile(r'custom_call_target="([^"]*)"')
_OPERANDS = re.compile(r'(%[\w.\-$]+)')
_PRODUCT = re.compile(r' (?:dot|convolution)\(|custom_call_target="[^"]*gemm')


class Collective(NamedTuple):
  """One of a program.

  Attributes:
    kind: of `KINDS`.
    bytes: of its result on a device.
    runs: how often it runs in a step.
  """

  kind: str
  bytes: int
  runs: int


def collectives(text: str) -> list[Collective]:
  """Each collective of a program, once."""
  bodies = _computations(text)
  runs = _runs(text, bodies)
  found: dict[tuple[str, str], Collective] = {}
  for name, lines in bodies.items():
    for line in lines:
      match = _KIND.search(line)
      if match is None:
        continue
      # What starts one returns what goes in beside what comes out.
      sizes = list(_sizes(line.partition('=')[2][: match.start()]))
      size = max(sizes, default=0)
      if match[2] is None and line.partition('=')[2].lstrip().startswith('('):
        size = sum(sizes)
      # One that is taken into several fusions is still one.
      channel = _CHANNEL.search(line)
      key = match[1], channel[1] if channel else line
      found[key] = Collective(match[1], size, runs.get(name, 1))
  return list(found.values())


def kernels(text: str) -> dict[str, int]:
  """{target of a custom call: how often it stands in the program}."""
  out: dict[str, int] = {}
  for name in _KERNEL.findall(text):
    out[name] = out.get(name, 0) + 1
  return out


def products_of_shape(
  text: str, shapes: Iterable[tuple[int, ...]], summed: Container[int]
) -> set[tuple[int, ...]]:
  """Which of these shapes a product has that sums so many numbers for each.

  Where it does not show how many it sums, it may be any.
  """
  wanted = {tuple(sorted(shape)): shape for shape in shapes}
  found = set()
  for lines in _computations(text).values():
    sizes = {}
    for line in lines:
      name, _, rest = line.partition('=')
      array = _ARRAY.search(rest)
      if array is None:
        continue
      dims = _dims(array[2])
      sizes[name.split()[-1]] = math.prod(dims)
      own = tuple(sorted(n for n in dims if n != 1))
      if own in wanted and _PRODUCT.search(line):
        n = _summed(rest, sizes, math.prod(dims))
        if n is None or n in summed:
          found.add(wanted[own])
  return found


def float_stacks(
  text: str, shapes: Iterable[tuple[int, ...]], layers: int
) -> set[tuple[int, ...]]:
  """Which of these matrices stand as floats, of all layers at once.

  Args:
    text: the program.
    shapes: [in, out] of each; in may be written as blocks of 64.
    layers: of the stack.
  """
  wanted = {}
  for n_in, n_out in shapes:
    for part in ((n_in,), (n_in // 64, 64), (n_in // 64, 2, 32)):
      wanted[tuple(sorted((layers, *part, n_out)))] = (n_in, n_out)
  return {
    wanted[own]
    for dtype, dims in _ARRAY.findall(text)
    if 'f' in dtype
    and (own := tuple(sorted(n for n in _dims(dims) if n != 1))) in wanted
  }


def _summed(line: str, sizes: Mapping[str, int], size: int) -> int | None:
  """How many numbers a product without batch axes sums, by its sizes alone."""
  operands = [sizes.get(n) for n in _OPERANDS.findall(line.partition('(')[2])]
  if None in operands[:2] or len(operands) < 2:
    return None
  squared, rest = divmod(operands[0] * operands[1], size)  # type: ignore[operator]
  root = math.isqrt(squared)
  return None if rest or root**2 != squared else root


def _dims(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(','))) if text else ()


def _sizes(text: str) -> Iterator[int]:
  for dtype, dims in _ARRAY.findall(text):
    bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
    yield math.prod(_dims(dims)) * bits // 8


def _computations(text: str) -> dict[str, list[str]]:
  """{name: its lines}."""
  out: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if match := _HEAD.match(line):
      lines = out.setdefault(match[1], [])
    else:
      lines.append(line)
  return out


def _runs(text: str, bodies: dict[str, list[str]]) -> dict[str, int]:
  """{computation: how often it runs in a step}."""
  called = {name for lines in bodies.values() for _, name in _calls(lines, bodies)}  # fmt: skip
  runs = dict.fromkeys(bodies.keys() - called, 1)
  todo = list(runs)
  while todo:
    name = todo.pop()
    for times, callee in _calls(bodies[name], bodies):
      if callee in bodies and runs[name] * times > runs.get(callee, 0):
        runs[callee] = runs[name] * times
        todo.append(callee)
  return runs


def _calls(
  lines: Iterable[str], bodies: dict[str, list[str]]
) -> Iterator[tuple[int, str]]:
  """(how often, computation) of all that these lines call."""
  for line in lines:
    times = 1
    if loop := _LOOP.search(line):
      known = _TRIPS.search(line)
      # A loop over layers counts to a constant.
      condition = '\n'.join(bodies.get(loop[1], ()))
      bounds = [int(n) for n in _CONSTANT.findall(condition)]
      times = int(known[1]) if known else max(bounds, default=1)
    for several, one in _CALLS.findall(line):
      for name in several.split(',') if several else [one]:
        yield times, name.strip().lstrip('%')
