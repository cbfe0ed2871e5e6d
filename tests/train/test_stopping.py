"""Requests to stop: what a signal leads to, alone and among others.

Reference: by hand, the votes of all processes and the step at which each must
have heard of them.
"""

import os
import signal

import numpy as np
import pytest

from lorax_train import together
from lorax_train.train.stopping import StopRequests, stop_requests


def test_alone_a_signal_counts_at_once():
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  with stop_requests() as stop:
    assert stop.name == ''
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == 'SIGTERM'
    stop.vote()  # asks nobody
    # A second one acts as it would without us.
    assert {s: signal.getsignal(s) for s in before} == before
  assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize('own', [0, signal.SIGINT])
def test_among_others_all_hear_of_it_at_the_same_vote(own, monkeypatch):
  """Another process gets SIGTERM between its second and its third vote."""
  of_other = iter([0, 0, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM])
  monkeypatch.setattr(together, 'several', lambda: True)
  monkeypatch.setattr(
    together, 'most', lambda number: np.int32(max(number, next(of_other)))
  )
  stop = StopRequests()
  heard = []
  for n in range(5):
    if n == 4 and own:  # too late to change what was agreed
      stop.ask(own)
    stop.vote()
    heard.append(stop.name)
  assert heard == ['', '', '', '', 'SIGTERM']
