"""metrics.jsonl, the same for TensorBoard, and the progress line."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from lorax_train.train.checkpoint import write_atomically

FILE = 'metrics.jsonl'
BOARD = 'tensorboard'

_WORTH_TELLING = 0.05

Line = dict[str, Any]


class MetricsLog:
  """Appends to metrics.jsonl; a resumed run continues it without overlap.

  Each line is a JSON object with `step` (updates made) and what was measured.
  Its numbers go to TensorBoard's event files as well.

  Attributes:
    lines: all of them, those of earlier runs included.
  """

  def __init__(self, run_dir: Path, resumed_at: int, writes: bool = True):
    """Opens the file and keeps the lines of steps up to `resumed_at`.

    Of several processes one alone writes; the others keep the lines.
    """
    self.lines = read(run_dir, resumed_at)
    self._writes = writes
    if not writes:
      return
    from tensorboardX import SummaryWriter

    # In one move: a crash now must not take the lines that were kept.
    text = ''.join(json.dumps(line) + '\n' for line in self.lines)
    write_atomically(run_dir / FILE, text)
    self._file = open(run_dir / FILE, 'a', encoding='utf-8')  # noqa: SIM115
    # TensorBoard then forgets the later steps of the run that was cut off, or
    # where there was no checkpoint all of them, the look before the first too.
    self._board = SummaryWriter(
      str(run_dir / BOARD), purge_step=resumed_at and resumed_at + 1
    )

  def write(self, step: int, **values: Any) -> None:
    """One line; floats are written so that they read back equal."""
    self.lines.append({'step': step, **values})
    if not self._writes:
      return
    self._file.write(json.dumps(self.lines[-1]) + '\n')
    self._file.flush()
    for key, value in values.items():
      if isinstance(value, float):
        self._board.add_scalar(key, value, step)

  def sync(self) -> None:
    """Brings what was written to the disk."""
    if self._writes:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the files."""
    if self._writes:
      self._file.close()
      self._board.close()


class Progress:
  """A line a report: overwritten on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, steps: int, out: IO[str] | None = None):
    """Nothing is said yet: a run at step `start` of `steps`."""
    self._out = out or sys.stdout
    self._start, self._steps = start, steps
    self._live = self._out.isatty()
    self._seconds = 0.0

  def report(
    self,
    step: int,
    loss: float,
    lr: float,
    tps: float,
    seconds: float,
    data_wait: float = 0.0,
  ) -> None:
    """Says how far training is, and when it will be done at this pace.

    Args:
      step: updates made.
      loss: of the last of them.
      lr: its learning rate.
      tps: tokens a second since the last report.
      seconds: that the steps since then took.
      data_wait: share of them that was spent on waiting for batches, told where
        it is worth telling.
    """
    self._seconds += seconds
    pace = self._seconds / (step - self._start)
    minutes, seconds = divmod(int(pace * (self._steps - step)), 60)
    waited = f'  data {data_wait:.0%}' if data_wait > _WORTH_TELLING else ''
    text = (
      f'step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}'
      f'  {tps:,.0f} tokens/s{waited}  left {minutes}:{seconds:02d}'
    )
    end = '\r' if self._live and step < self._steps else '\n'
    self._out.write(f'{text:<79}{end}' if self._live else text + end)
    self._out.flush()

  def held_out(
    self, step: int, loss: float, accuracy: float | None = None
  ) -> None:
    """What held-out rows show, on a line of its own."""
    text = f'step {step}/{self._steps}  held-out loss {loss:.4f}'
    if accuracy is not None:
      text += f'  accuracy {accuracy:.4f}'
    self._out.write(f'{text:<79}\n' if self._live else text + '\n')
    self._out.flush()


def read(run_dir: Path, step: int, file: str = FILE) -> list[Line]:
  """The lines of the steps that the checkpoint at `step` includes."""
  path = run_dir / file
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
