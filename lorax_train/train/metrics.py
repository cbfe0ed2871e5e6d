"""metrics.jsonl and the progress line."""

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from lorax_train.train.checkpoint import write_atomically

FILE = 'metrics.jsonl'


class MetricsLog:
  """Appends to metrics.jsonl; a resumed run continues it without overlap.

  Each line is a JSON object with `step` (updates made) and what was measured.
  """

  def __init__(self, run_dir: Path, resumed_at: int):
    """Opens the file and keeps the lines of steps up to `resumed_at`."""
    path = run_dir / FILE
    self._lines = _lines_up_to(path, resumed_at)
    # In one move: a crash now must not take the lines that were kept.
    write_atomically(path, ''.join(json.dumps(x) + '\n' for x in self._lines))
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115

  def write(self, step: int, **values: Any) -> None:
    """One line; floats are written so that they read back equal."""
    self._lines.append({'step': step, **values})
    self._file.write(json.dumps(self._lines[-1]) + '\n')
    self._file.flush()

  def sync(self) -> None:
    """Brings what was written to the disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def summary(self, key: str, label: str, absent: str) -> str:
    """'label 2.1 -> 1.4': the first and the last value of a key."""
    values = [line[key] for line in self._lines if key in line]
    if not values:
      return absent
    return f'{label} {values[0]:.4f} -> {values[-1]:.4f}'


class Progress:
  """A line a report: overwritten on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, steps: int, out: IO[str] | None = None):
    """Starts the clock at step `start` of `steps`."""
    self._out = out or sys.stdout
    self._start, self._steps = start, steps
    self._live = self._out.isatty()
    self._began = time.monotonic()

  def report(self, step: int, loss: float, lr: float, tps: float) -> None:
    """Says how far training is, and when it will be done at this pace."""
    pace = (time.monotonic() - self._began) / (step - self._start)
    minutes, seconds = divmod(int(pace * (self._steps - step)), 60)
    text = (
      f'step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}'
      f'  {tps:,.0f} tokens/s  left {minutes}:{seconds:02d}'
    )
    end = '\r' if self._live and step < self._steps else '\n'
    self._out.write(f'{text:<79}{end}' if self._live else text + end)
    self._out.flush()

  def say(self, text: str) -> None:
    """A line of its own."""
    self._out.write(f'{text:<79}\n' if self._live else text + '\n')
    self._out.flush()


def _lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
  """The lines of the steps that the checkpoint at `step` includes."""
  if not path.exists() or not step:
    return []
  kept = []
  for text in path.read_text('utf-8', errors='replace').splitlines():
    try:
      line = json.loads(text)
      if line['step'] > step:
        break
    except (ValueError, KeyError, TypeError):
      break  # the line a crash cut off
    kept.append(line)
  return kept
