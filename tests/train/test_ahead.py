"""Batches made ahead: in order, two at most, and no thread outlives its use.

Reference: what the function gives when called in turn; for runs the error that
it raises, and the threads there are before and after.
"""

import threading
import time

import pytest

from lorax_train.errors import DataError
from lorax_train.train import loop
from lorax_train.train.ahead import made_ahead
from lorax_train.train.rows import Rows
from tests.train.test_loop import make_config, metrics


def threads():
  return {t.name for t in threading.enumerate() if t.name.startswith('batches')}


def wait_until(condition):
  ends = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < ends
    time.sleep(0.001)


def test_two_are_made_ahead_in_order_and_no_more():
  made = []

  def make(n):
    made.append(n)
    return n, threading.current_thread()

  with made_ahead(make, range(10, 15)) as ahead:
    for taken in range(5):
      wait_until(lambda: len(made) == min(taken + 2, 5))  # noqa: B023
      time.sleep(0.01)
      assert made == list(range(10, 15))[: taken + 2]
      assert ahead.ready
      number, thread = ahead.take()
      assert number == 10 + taken
      assert thread is not threading.main_thread()
  assert threads() == set()


def test_what_is_not_made_yet_is_not_ready():
  go = threading.Event()
  with made_ahead(lambda n: go.wait() and n, range(3)) as ahead:
    assert not ahead.ready
    go.set()
    assert [ahead.take() for _ in range(3)] == [0, 1, 2]


def test_an_error_comes_when_its_batch_is_asked_for():
  def make(n):
    if n == 1:
      raise DataError(f'batch {n}: the file is gone')
    return n

  with made_ahead(make, range(5)) as ahead:
    assert ahead.take() == 0
    with pytest.raises(DataError, match='batch 1: the file is gone'):
      ahead.take()
  assert threads() == set()


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_no_thread_is_left_behind(error):
  made = []

  def leave():
    with made_ahead(lambda n: made.append(n), range(100)) as ahead:
      ahead.take()
      assert threads()
      raise error

  with pytest.raises(error):
    leave()
  assert threads() == set()
  assert len(made) <= 3


def test_a_run_fails_with_the_error_of_its_thread(
  tiny_model, rows_file, tmp_path, monkeypatch
):
  batch = Rows.batch

  def broken(self, cfg, mesh, step):
    if step == 2:
      raise DataError('rows.json: row 7: gone')
    return batch(self, cfg, mesh, step)

  monkeypatch.setattr(Rows, 'batch', broken)
  with pytest.raises(DataError, match=r'rows\.json: row 7: gone'):
    loop.run(make_config(tiny_model, rows_file, tmp_path / 'run'))
  assert threads() == set()


def test_waiting_for_slow_batches_is_told(
  tiny_model, rows_file, tmp_path, monkeypatch, capsys
):
  batch = Rows.batch

  def slow(self, cfg, mesh, step):
    time.sleep(0.3)
    return batch(self, cfg, mesh, step)

  monkeypatch.setattr(Rows, 'batch', slow)
  run_dir = tmp_path / 'run'
  loop.run(
    make_config(
      tiny_model, rows_file, run_dir, train={'log_every': 4}, eval={'every': 4}
    )
  )
  shares = [share for _, share in metrics(run_dir, 'data_wait')]
  assert len(shares) == 4
  assert all(0 < share <= 1 for share in shares)
  assert max(shares) > 0.3
  assert 'tokens/s  data ' in capsys.readouterr().out
  assert threads() == set()
