"""plots/loss.png: how the loss went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = 'plots/loss.png'

# Of the running mean that is drawn over the losses of single steps.
_WINDOW = 50


def loss_curve(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Draws the losses in lines of metrics.jsonl.

  Args:
    lines: with `step` and `loss` or `eval_loss`; `eval_accuracy` has an axis of
      its own.
    path: .png, replaced where it exists.
  """
  import numpy as np
  from matplotlib.figure import Figure  # slow to import: only when drawing
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(8, 4.5), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  steps, losses = series(lines, 'loss')
  if steps:
    axes.plot(
      steps, losses, color='0.75', linewidth=1, label='training, a step'
    )
    window = max(1, min(_WINDOW, len(losses) // 5))
    mean = np.convolve(losses, np.ones(window) / window, 'valid')
    axes.plot(
      steps[window - 1 :], mean, color='C0', label=f'mean of {window} steps'
    )
  held_out = series(lines, 'eval_loss')
  if held_out[0]:
    axes.plot(*held_out, 'o-', color='C1', label='held-out rows')
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel('step')
  accuracy = series(lines, 'eval_accuracy')
  axes.set_ylabel('loss' if accuracy[0] else 'loss a learned token')
  axes.grid(alpha=0.3)
  if accuracy[0]:
    right = axes.twinx()
    right.plot(*accuracy, 's--', color='C2')
    right.set_ylabel('accuracy on held-out rows', color='C2')
    right.set_ylim(0, 1)
  if steps or held_out[0]:
    axes.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def series(
  lines: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[int], list[float]]:
  """Steps and values of the lines that have a key."""
  having = [line for line in lines if key in line]
  return [line['step'] for line in having], [line[key] for line in having]
