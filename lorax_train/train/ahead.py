"""Batches made ahead of the step that wants them, in a thread."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar('T')

_AHEAD = 2


class Ahead(Generic[T]):
  """What a function gives for one number after the other.

  While one is in use the next two are made. What is made depends on the number
  alone, so nothing of the thread shows in it.
  """

  def __init__(
    self,
    make: Callable[[int], T],
    numbers: Iterable[int],
    pool: ThreadPoolExecutor,
  ):
    """Begins with the first two."""
    self._make, self._numbers, self._pool = make, iter(numbers), pool
    self._made: deque[Future[T]] = deque()
    for _ in range(_AHEAD):
      self._begin_next()

  @property
  def ready(self) -> bool:
    """Whether `take` has no need to wait."""
    return self._made[0].done()

  def take(self) -> T:
    """The next one.

    Raises:
      Exception: what was raised when it was made.
    """
    made = self._made.popleft().result()
    self._begin_next()
    return made

  def _begin_next(self) -> None:
    for number in self._numbers:
      self._made.append(self._pool.submit(self._make, number))
      return


@contextlib.contextmanager
def made_ahead(
  make: Callable[[int], T], numbers: Iterable[int]
) -> Iterator[Ahead[T]]:
  """An `Ahead`; its thread has ended when the block is left, however it is.

  >>> with made_ahead(lambda n: n * n, range(3, 6)) as squares:
  ...   [squares.take() for _ in range(3)]
  [9, 16, 25]
  """
  pool = ThreadPoolExecutor(1, thread_name_prefix='batches')
  try:
    yield Ahead(make, numbers, pool)
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
