"""Requests to stop: a signal to any process stops all, at the same step."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax

from lorax_train import together

# A vote is read so many steps later: nobody waits for the step in between.
_LATER = 2


class StopRequests:
  """SIGTERM and ctrl-C, as all processes have heard of them."""

  def __init__(self) -> None:
    self._asked = 0
    self._agreed = 0
    self._votes: deque[jax.Array] = deque()

  def ask(self, number: int) -> None:
    """Takes down a signal that this process got."""
    self._asked = self._asked or number

  def vote(self) -> None:
    """Once a step: tells the others, and hears of what they told before."""
    if not together.several():
      return
    self._votes.append(together.most(self._asked))
    if len(self._votes) > _LATER:
      self._agreed = self._agreed or int(self._votes.popleft())

  @property
  def name(self) -> str:
    """The signal that asks to stop; '' for none."""
    number = self._agreed if together.several() else self._asked
    return signal.Signals(number).name if number else ''


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
  """Collects SIGTERM and ctrl-C; a second one acts at once, as usual."""
  requests = StopRequests()
  if threading.current_thread() is not threading.main_thread():
    yield requests  # only the main thread may set handlers
    return
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

  def ask(number: int, _frame: Any) -> None:
    requests.ask(number)
    for s, handler in before.items():
      signal.signal(s, handler)

  for s in before:
    signal.signal(s, ask)
  try:
    yield requests
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)
