"""metrics.jsonl across crashes and resumes, and the progress line.

Reference: the lines themselves, before and after; floats must read back equal.
"""

import io
import json
import math
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from lorax_train.train import metrics
from lorax_train.train.metrics import MetricsLog, Progress


def line(step, **values):
  return json.dumps({'step': step, **values}) + '\n'


def read(run_dir):
  text = (run_dir / metrics.FILE).read_text('utf-8')
  assert text == '' or text.endswith('\n')
  return [json.loads(one) for one in text.splitlines()]


FULL = [
  {'step': 0, 'eval_loss': 3.5},
  {'step': 1, 'loss': 3.1},
  {'step': 2, 'loss': 2.9},
  {'step': 2, 'eval_loss': 3.0},
  {'step': 3, 'loss': 2.8},
  {'step': 4, 'loss': 2.7},
]
WHOLE = ''.join(json.dumps(one) + '\n' for one in FULL)


def test_what_is_written_reads_back(tmp_path):
  numbers = [0.1, 1 / 3, 1e-300, 123456789.123456789, 5e-324]
  log = MetricsLog(tmp_path, 0)
  for step, number in enumerate(numbers, 1):
    log.write(step, loss=number, learning_rate=number / 3)
    # On disk at once: a killed run keeps the lines it wrote.
    assert read(tmp_path)[-1] == {
      'step': step, 'loss': number, 'learning_rate': number / 3
    }  # fmt: skip
  log.sync()
  log.close()
  assert [one['loss'] for one in read(tmp_path)] == numbers


def test_who_does_not_write_keeps_the_lines(tmp_path):
  log = MetricsLog(tmp_path, 0, writes=False)
  log.write(1, loss=0.5)
  log.sync()
  log.close()
  assert log.lines == [{'step': 1, 'loss': 0.5}]
  assert not list(tmp_path.iterdir())


# (what is on disk, step of the checkpoint, how many lines of it stay)
CUTS = {
  'a fresh start keeps nothing': (WHOLE, 0, 0),
  'a fresh start without a file': (None, 0, 0),
  'a resume without a file': (None, 3, 0),
  'a resume with an empty file': ('', 3, 0),
  'later steps go': (WHOLE, 2, 4),
  'the last step stays': (WHOLE, 4, 6),
  'a checkpoint past the file': (WHOLE, 9, 6),
  'a last line cut off': (WHOLE[:-9], 9, 5),
  'a last line without its newline': (WHOLE[:-1], 9, 6),
  'a last line of zeros': (WHOLE + '\0' * 40, 9, 6),
  'a last line of bytes that are no UTF-8': (WHOLE + 'ÿ', 9, 6),
  'a line that is no object': (WHOLE + '3\n', 9, 6),
  'a line without a step': (WHOLE + '{"loss": 1}\n', 9, 6),
  'a step that is no number': (WHOLE + '{"step": "x"}\n', 9, 6),
  'a cut-off line beyond the checkpoint': (WHOLE[:-9], 2, 4),
}


@pytest.mark.parametrize('case', CUTS)
def test_a_resumed_log_goes_on_at_the_checkpoint(tmp_path, case):
  text, step, kept = CUTS[case]
  if text is not None:
    # latin-1: so that one case is no UTF-8
    (tmp_path / metrics.FILE).write_bytes(text.encode('latin-1'))
  log = MetricsLog(tmp_path, step)
  assert read(tmp_path) == FULL[:kept]
  log.write(step + 1, loss=1.0)
  log.close()
  assert read(tmp_path) == [*FULL[:kept], {'step': step + 1, 'loss': 1.0}]


def test_a_crash_while_resuming_keeps_the_lines(tmp_path, monkeypatch):
  (tmp_path / metrics.FILE).write_text(WHOLE)

  def crash(*_):
    raise OSError(28, 'No space left on device')

  # From cutting the file back to the first new line nothing may be lost.
  monkeypatch.setattr('os.replace', crash)
  with pytest.raises(OSError, match='No space left'):
    MetricsLog(tmp_path, 2)
  monkeypatch.undo()
  assert read(tmp_path) == FULL
  killed = MetricsLog(tmp_path, 2)  # and killed before it writes a line
  assert read(tmp_path) == FULL[:4]
  killed.close()


def test_the_lines_are_those_of_the_whole_run(tmp_path):
  (tmp_path / metrics.FILE).write_text(WHOLE)
  log = MetricsLog(tmp_path, 2)
  log.write(3, eval_loss=2.25)
  assert log.lines == [*FULL[:4], {'step': 3, 'eval_loss': 2.25}]
  log.close()
  assert metrics.read(tmp_path, 3) == log.lines


def scalars(run_dir):
  """{tag: [(step, value)]} of the event files, as TensorBoard shows them."""
  accumulator = event_accumulator.EventAccumulator(
    str(run_dir / metrics.BOARD), purge_orphaned_data=True
  )
  accumulator.Reload()
  return {
    tag: [(e.step, e.value) for e in accumulator.Scalars(tag)]
    for tag in accumulator.Tags()['scalars']
  }


def test_tensorboard_reads_the_same_numbers(tmp_path):
  log = MetricsLog(tmp_path, 0)
  for line in FULL:
    log.write(**line)
  log.write(4, samples=['no number'])
  log.close()
  want = {
    'loss': [(1, 3.1), (2, 2.9), (3, 2.8), (4, 2.7)],
    'eval_loss': [(0, 3.5), (2, 3.0)],
  }
  got = scalars(tmp_path)
  assert got.keys() == want.keys()
  for tag, points in want.items():
    assert [s for s, _ in got[tag]] == [s for s, _ in points]
    np.testing.assert_allclose(
      [v for _, v in got[tag]], [v for _, v in points], rtol=1e-6
    )


@pytest.mark.parametrize('step', [0, 2])
def test_tensorboard_forgets_what_a_killed_run_did_since_its_checkpoint(
  tmp_path, step
):
  killed = MetricsLog(tmp_path, 0)
  for line in FULL:
    killed.write(**line)
  killed.close()
  time.sleep(1.1)  # an event file is named by the second
  log = MetricsLog(tmp_path, step)
  again = [line for line in FULL if line['step'] > step or step == 0]
  for line in again[:-1]:
    log.write(**line)
  log.close()
  got = scalars(tmp_path)
  for tag, points in got.items():
    want = [line['step'] for line in log.lines if tag in line]
    assert [s for s, _ in points] == want


class Terminal(io.StringIO):
  def isatty(self):
    return True


def report_all(out):
  """Steps 10, 20 and 30 of 30, at two seconds a step."""
  progress = Progress(0, 30, out)
  progress.report(10, 2.5, 1e-4, 1234.5, 20.0)
  progress.held_out(10, 2.6)
  progress.report(20, 2.25, 5e-5, 1000.0, 20.0)
  progress.report(30, 2.0, 0.0, 1000.0, 20.0)
  return out.getvalue()


def test_progress_is_a_plain_line_each_where_there_is_no_terminal():
  text = report_all(io.StringIO())
  assert text.splitlines() == [
    'step 10/30  loss 2.5000  lr 1.00e-04  1,234 tokens/s  left 0:40',
    'step 10/30  held-out loss 2.6000',
    'step 20/30  loss 2.2500  lr 5.00e-05  1,000 tokens/s  left 0:20',
    'step 30/30  loss 2.0000  lr 0.00e+00  1,000 tokens/s  left 0:00',
  ]
  assert '\r' not in text
  assert text.endswith('\n')


def test_progress_overwrites_its_line_on_a_terminal():
  text = report_all(Terminal())
  assert text.count('\r') == 2  # steps 10 and 20; 30 stays on the screen
  assert text.endswith('\n')
  for part in text.replace('\r', '\n').splitlines():
    assert len(part) == 79  # so that a shorter line covers a longer one


def test_the_time_left_counts_the_steps_of_this_start_alone():
  out = io.StringIO()
  Progress(990, 1000, out).report(995, 1.0, 0.0, math.pi, 10.0)
  assert 'left 0:10' in out.getvalue()


@pytest.mark.parametrize(
  ('data_wait', 'told'), [(0.0, ''), (0.05, ''), (0.124, '  data 12%')]
)
def test_waiting_for_data_is_told_where_it_matters(data_wait, told):
  out = io.StringIO()
  Progress(0, 30, out).report(10, 2.5, 1e-4, 1234.5, 20.0, data_wait)
  assert f'1,234 tokens/s{told}  left 0:40' in out.getvalue()
