"""What the processes of a run do as one: agree, fail, stop.

Process 0 decides and writes; all compute. Each function here is called by all
processes at the same place, and alone does what is obvious.
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train import errors

# Bytes of a message; a longer one is sent in two goes.
_FRAME = 1024
_LENGTH = 4

# What the message of a collective has whose other side is gone, and that of what
# is of this process alone, as a program that can't be compiled, has not.
_GONE = re.compile(
  r'\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL'
  r'|UNAVAILABLE|UNKNOWN): '
)
_NO_MEMORY = 'RESOURCE_EXHAUSTED'


class FailedError(Exception):
  """What failed on one process, on all of them.

  Attributes:
    process: where it failed.
    code: exit code of all.
    line: what is wrong, in one line.
  """

  def __init__(self, process: int, code: int, line: str):
    super().__init__(line)
    self.process, self.code, self.line = process, code, line


def several() -> bool:
  """Whether there is another process."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
  """Whether this is the process that decides and writes."""
  return not several() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """A value that JSON can hold, of every process in order."""
  if not several():
    return [value]
  text = json.dumps(value).encode()
  size = np.frombuffer(len(text).to_bytes(_LENGTH, 'little'), np.uint8)
  begin, rest = text[: _FRAME - _LENGTH], text[_FRAME - _LENGTH :]
  frames = _gather(
    np.concatenate([size, np.frombuffer(begin, np.uint8)]), _FRAME
  )
  sizes = [int.from_bytes(f[:_LENGTH].tobytes(), 'little') for f in frames]
  parts = [f[_LENGTH:].tobytes() for f in frames]
  left = max(sizes) - (_FRAME - _LENGTH)
  if left > 0:
    # In powers of two: each length is a program of its own.
    room = 1 << (left - 1).bit_length()
    more = _gather(np.frombuffer(rest, np.uint8), room)
    parts = [a + b.tobytes() for a, b in zip(parts, more, strict=True)]
  return [json.loads(p[:n]) for p, n in zip(parts, sizes, strict=True)]


def _gather(array: np.ndarray, room: int) -> np.ndarray:
  """uint8 [n] of each process as [processes, room]."""
  padded = np.pad(array, (0, room - len(array)))
  return np.asarray(multihost_utils.process_allgather(padded))


def of_first(value: Any) -> Any:
  """Process 0's value, on all of them."""
  return gather(value)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """What is done in it fails on all processes where it fails on one.

  No process leaves it before all have come to its end. So what computes on the
  mesh of all may stand in it only where it fails for all or for none.

  Raises:
    FailedError: one of several processes failed.
    Exception: alone, whatever was raised.
  """
  if not several():
    yield
    return
  failure = None
  try:
    yield
  except (FailedError, jax.errors.JaxRuntimeError):
    raise  # all know it already, or there is nobody to tell
  except Exception as error:
    if lost(error):
      raise
    failure = errors.outcome(error)
    if failure is None:
      traceback.print_exc(file=sys.__stderr__)
      failure = 1, f'{type(error).__name__}: {errors.one_line(error)}'
  for process, outcome in enumerate(gather(failure)):
    if outcome:
      raise FailedError(process, *outcome)


def lost(error: BaseException) -> bool:
  """Whether an error, or what led to it, says that another process is gone."""
  cause: BaseException | None = error
  while cause is not None:
    if _of_jax(cause) and _GONE.search(str(cause)):
      return _NO_MEMORY not in str(cause)
    cause = cause.__cause__
  return False


def _of_jax(error: BaseException) -> bool:
  if isinstance(error, jax.errors.JaxRuntimeError):
    return True
  # Where numpy fetches a result it is a ValueError, and so is tensorstore's of
  # a full disk, which begins alike.
  if not isinstance(error, ValueError):
    return False
  frames = list(traceback.walk_tb(error.__traceback__))
  return bool(frames) and frames[-1][0].f_globals['__name__'].startswith('jax.')


def leave(code: int, line: str) -> None:
  """Ends this process at once: the others notice, and end too.

  The usual end would wait for them, who wait for this one.
  """
  out = sys.__stderr__
  if out is not None:
    print(f'process {jax.process_index()}: {line}', file=out, flush=True)
  os._exit(code)


def check_same(what: Mapping[str, Any]) -> None:
  """Refuses processes that were not started alike.

  Args:
    what: must be the same everywhere, and ready for JSON.

  Raises:
    FailedError: says what differs, and where.
  """
  of_all = gather(dict(what))
  with together():
    for process, theirs in enumerate(of_all):
      differ = [
        f'{key} is {theirs.get(key)!r}, not {of_all[0].get(key)!r}'
        for key in sorted({*theirs, *of_all[0]})
        if theirs.get(key) != of_all[0].get(key)
      ]
      if differ:
        raise errors.ConfigError(
          f'process {process} is not that of process 0: {"; ".join(differ[:3])}:'
          ' start all with the same command, data, code and versions'
        )


def most(number: int) -> jax.Array:
  """The largest of the numbers of all processes, not waited for."""
  mesh = _by_process()
  numbers = jax.make_array_from_process_local_data(
    NamedSharding(mesh, P('process')),
    np.array([number], np.int32),
    (mesh.shape['process'],),
  )
  return _largest(mesh)(numbers)


@functools.cache
def _by_process() -> Mesh:
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  each = np.array(devices).reshape(jax.process_count(), -1)
  return Mesh(each, ('process', 'device'))


@functools.cache
def _largest(mesh: Mesh) -> Any:
  return jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
