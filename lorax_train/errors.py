"""What a user did, or met, that stops a run: one class per exit code.

Each message is ONE line that says what, where and what to do. `lora` raises
plain `ValueError` (it knows no run); callers translate.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


class UserError(ValueError):
  """Base class; `exit_code` is what the process returns."""

  exit_code = 1


class ConfigError(UserError):
  """The configuration or the command line is wrong."""

  exit_code = 2


class DataError(UserError):
  """Rows, templates or token ids are wrong."""

  exit_code = 3


class ModelError(UserError):
  """Weights, adapter, model config or tokenizer are wrong or absent."""

  exit_code = 4


class ResumeError(UserError):
  """The run directory holds a run that this configuration can't continue."""

  exit_code = 5


class DivergedError(UserError):
  """The loss or its gradient is no longer finite."""

  exit_code = 6


class LockedError(UserError):
  """Another process is writing to the run directory."""

  exit_code = 7


class StoppedError(UserError):
  """Stopped early with a checkpoint safe on disk: run the same command again."""

  exit_code = 75


IO_EXIT_CODE = 74
INTERRUPTED_EXIT_CODE = 130


def report(error: BaseException) -> int:
  """Prints one line on stderr; returns the exit code.

  Args:
    error: a UserError, OSError or KeyboardInterrupt.
  """
  if isinstance(error, BrokenPipeError):
    # Whoever read our output has had enough; Python would complain at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return IO_EXIT_CODE
  told = outcome(error)
  assert told is not None
  code, line = told
  print(line, file=sys.stderr)
  return code


def outcome(error: BaseException) -> tuple[int, str] | None:
  """(exit code, what is printed) of an error of the user; None of others."""
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED_EXIT_CODE, (
      'interrupted at once: checkpoints are as they were, run the same command'
      ' again'
    )
  if isinstance(error, UserError):
    return error.exit_code, _visible(one_line(error))
  if isinstance(error, OSError):
    return IO_EXIT_CODE, f'input/output error: {_visible(one_line(error))}'
  return None


def one_line(error: BaseException) -> str:
  """An error's message with its line breaks folded."""
  return ' '.join(_message(error).split()) or type(error).__name__


def first_and_last(error: BaseException) -> str:
  """The message less its middle, which with some libraries is a traceback."""
  lines = _message(error).strip().splitlines() or [type(error).__name__]
  return ' '.join(' '.join(dict.fromkeys((lines[0], lines[-1]))).split())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences absl's logger: what goes wrong is told in our one line."""
  logger = logging.getLogger('absl')
  before, logger.disabled = logger.disabled, True
  try:
    yield
  finally:
    logger.disabled = before


def _visible(text: str) -> str:
  """Names and data may hold what a terminal would obey: that is escaped."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _message(error: BaseException) -> str:
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  # A KeyError prints as the repr of its message, line breaks spelt out.
  of_key = isinstance(error, KeyError) and error.args
  return str(error.args[0] if of_key else error)
