"""What processes do as one, seen from each of them.

Reference: the contract of exit codes, and what each process must say. Here the
others' messages are made up; real ones are in tests/train/test_hosts.
"""

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from lorax_train import together
from lorax_train.errors import ConfigError, DataError
from lorax_train.together import FailedError


def test_alone():
  assert not together.several()
  assert together.first()
  assert together.gather({'a': [1]}) == [{'a': [1]}]
  assert together.of_first('x') == 'x'
  with pytest.raises(DataError, match='bad row'), together.together():
    raise DataError('bad row')
  together.check_same({'a': 1})


@pytest.fixture
def others(monkeypatch):
  """This is process 0 of 3; what the others send stands in a list."""
  sent = []
  monkeypatch.setattr(together, 'several', lambda: True)
  monkeypatch.setattr(together, 'gather', lambda own: [own, *sent.pop(0)])
  return sent


@pytest.mark.parametrize(
  ('error', 'others_say', 'failed'),
  [
    # Whose failure it is, its exit code and its line: the lowest process's.
    (None, [None, [3, 'no file']], (2, 3, 'no file')),
    (None, [[4, 'no shard'], [3, 'no file']], (1, 4, 'no shard')),
    (DataError('row 3\nis bad'), [None, None], (0, 3, 'row 3 is bad')),
    (OSError('full'), [None, None], (0, 74, 'input/output error: full')),
    (DataError('all'), [[3, 'all'], [3, 'all']], (0, 3, 'all')),
    (KeyError('x'), [None, None], (0, 1, 'KeyError: x')),
  ],
)
def test_what_fails_on_one_fails_on_all(error, others_say, failed, others):
  others.append(others_say)
  with pytest.raises(FailedError) as caught, together.together():
    if error:
      raise error
  own = caught.value
  assert (own.process, own.code, own.line) == failed


def test_what_all_know_is_not_told_again(others):
  for error in (FailedError(1, 3, 'x'), jax.errors.JaxRuntimeError('gone')):
    with pytest.raises(type(error)) as caught, together.together():
      raise error
    assert caught.value is error
  others.append([None, None])
  with together.together():
    pass
  assert others == []


GONE = 'UNKNOWN: Gloo AllGather failed: Connection reset by peer'


def raised(error, module='jax.experimental.multihost_utils', cause=None):
  """An error as it is caught that a module has raised."""
  own = types.ModuleType(module)
  exec('def fail(error, cause):\n  raise error from cause', vars(own))
  with pytest.raises(type(error)) as caught:
    own.fail(error, cause)
  return caught.value


@pytest.mark.parametrize(
  ('error', 'lost'),
  [
    (jax.errors.JaxRuntimeError(GONE), True),
    # What numpy makes of it, and what orbax makes of that.
    (raised(ValueError(GONE)), True),
    (
      raised(
        TimeoutError('waiting for async_write_complete'),
        'orbax',
        jax.errors.JaxRuntimeError('UNAVAILABLE: heartbeat'),
      ),
      True,
    ),
    (jax.errors.JaxRuntimeError('x: INTERNAL: NCCL failed: exited'), True),
    # Of this process alone.
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GiB'), False),
    (
      jax.errors.JaxRuntimeError('INTERNAL: x: RESOURCE_EXHAUSTED: 9 GiB'),
      False,
    ),
    (jax.errors.JaxRuntimeError('UNIMPLEMENTED: no such kernel'), False),
    # tensorstore's words are like jax's.
    (raised(ValueError('UNKNOWN: No space left'), 'orbax'), False),
    (raised(OSError('full'), 'x', ValueError('UNKNOWN: full')), False),
    (TimeoutError('of a file system'), False),
    (KeyboardInterrupt(), False),
  ],
)
def test_what_says_that_another_is_gone(error, lost, others):
  assert together.lost(error) == lost
  # Nobody is asked then, who would never answer.
  others.append([None, None])
  with pytest.raises(BaseException) as caught, together.together():
    raise error
  passed_on = lost or isinstance(
    error, jax.errors.JaxRuntimeError | KeyboardInterrupt
  )
  assert (caught.value is error) == passed_on
  assert len(others) == passed_on


def test_processes_that_were_started_otherwise(others):
  same = {'train.seed': 1, 'jax': '1.2'}
  others += [[same, same], [None, None]]
  together.check_same(same)
  others += [[same, {**same, 'train.seed': 2}], [None, None]]
  with pytest.raises(FailedError) as caught:
    together.check_same(same)
  assert caught.value.code == ConfigError.exit_code
  assert 'process 2 is not that of process 0: train.seed is 2, not 1' in str(
    caught.value
  )


@pytest.mark.parametrize('length', [0, 1, 1017, 1018, 1019, 5000])
def test_messages_of_any_length_arrive(length, monkeypatch):
  """Of three processes, here threads that meet where jax would send.

  A text of 1,018 letters is the longest that goes in one frame, in quotes and
  with its length before it.
  """
  values = ['x' * length, '', {'a': [1, None]}]
  met, frames = threading.Barrier(len(values)), [None] * len(values)
  own = threading.local()
  rounds = []

  def allgather(frame):
    frames[own.process] = frame
    if not met.wait():
      rounds.append(len(frame))
    stacked = np.stack(frames)
    met.wait()
    return stacked

  monkeypatch.setattr(together, 'several', lambda: True)
  monkeypatch.setattr(together.multihost_utils, 'process_allgather', allgather)

  def gather(process):
    own.process = process
    return together.gather(values[process])

  with ThreadPoolExecutor(len(values)) as pool:
    got = list(pool.map(gather, range(len(values))))
  assert got == [values] * len(values)
  # A second round, of a power of two, where the first did not hold it.
  second = {1019: [1], 5000: [4096]}
  assert rounds == [1024, *second.get(length, [])]
