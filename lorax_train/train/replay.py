"""A MeZO run again, from its base and a number a step: no passes.

mezo.jsonl has a line a step: `step`, `learning_rate` and `slopes`, g of each
probe, written so that they read back to the bit. The directions follow from the
seed, so this is all there is of a run: some 90 bytes a step.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train import parallel
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError, ResumeError
from lorax_train.formats import find, hf_config, hf_save
from lorax_train.lora.init import FROM_INPUTS
from lorax_train.train import base, export, metrics, mezo, reading, setup
from lorax_train.train import state as state_lib
from lorax_train.train.checkpoint import write_atomically
from lorax_train.train.inspection import read_run

FILE = 'mezo.jsonl'

Tree = Any


class ScalarLog:
  """Appends to mezo.jsonl; a resumed run continues it without overlap."""

  def __init__(self, run_dir: Path, resumed_at: int, writes: bool = True):
    """Opens the file and keeps the lines of steps up to `resumed_at`.

    Of several processes one alone writes.
    """
    self._file = None
    if writes:
      lines = metrics.read(run_dir, resumed_at, FILE)
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      write_atomically(run_dir / FILE, text)
      self._file = open(run_dir / FILE, 'a', encoding='utf-8')  # noqa: SIM115

  def write(self, step: int, rate: np.ndarray, slopes: np.ndarray) -> None:
    """The line of a step."""
    if self._file:
      line = {
        'step': step,
        'learning_rate': float(rate),
        'slopes': list(map(float, slopes)),
      }
      self._file.write(json.dumps(line) + '\n')
      self._file.flush()

  def sync(self) -> None:
    """Brings what was written to the disk."""
    if self._file:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      self._file.close()


def read(run_dir: Path) -> list[tuple[np.float32, np.ndarray]]:
  """(learning rate, slopes [P]) of step 0, 1, ...

  A line that has no end is of a step that was cut off, and does not count.

  Raises:
    ResumeError: a step is missing, or a line is damaged.
  """
  path = run_dir / FILE
  try:
    texts = path.read_text('utf-8').split('\n')[:-1]
    lines = list(map(json.loads, texts))
    steps = [line['step'] for line in lines]
    found = [
      (np.float32(x['learning_rate']), np.array(x['slopes'], np.float32))
      for x in lines
    ]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ResumeError(
      f'{path}: no log of a MeZO run, or damaged: {error}: train again'
    ) from None
  if steps != list(range(1, len(steps) + 1)):
    raise ResumeError(
      f'{path}: its {len(steps)} lines are not of steps 1 to'
      f' {max(steps, default=0)}: it cannot be replayed; train again'
    )
  return found


def replay(run_dir: str, out: str) -> dict[str, Any]:
  """Writes what a MeZO run made, its adapter or its model, to `out`.

  Args:
    run_dir: of the run; its model must be where it was. Of an unfinished run
      the steps that it has made.
    out: directory, which must not exist.

  Returns:
    {'run', 'out', 'steps', 'log_bytes'}.

  Raises:
    ConfigError: no MeZO run, or `out` exists.
    ResumeError: no run; the log is not whole; the base has changed.
  """
  directory = Path(run_dir).expanduser()
  hf_save.check_absent(out)
  cfg, inputs = read_run(directory)
  if cfg.method != 'mezo':
    raise ConfigError(
      f'run {run_dir}: of method={cfg.method}, which leaves no log to replay:'
      ' give a run of method=mezo'
    )
  log = read(directory)
  model_dir = find.find_model(cfg.model.path)
  model_cfg = hf_config.read_config(model_dir)

  def check(name: str, now: str, what: str) -> None:
    if now != inputs.get(name):
      raise ResumeError(
        f'run {run_dir}: the {what} are not those that it started from: put them'
        ' back'
      )

  now = base.fingerprint(cfg, model_dir, model_cfg)
  check('weights', now, f'weights of {cfg.model.path}')
  adapters = setup.plan_adapters(cfg, model_cfg)
  try:
    mesh = setup.make_mesh(cfg)
  except ConfigError:  # it was made for other devices, which is all one here
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    rows = None
    if adapters.spec.init in FROM_INPUTS:
      rows = reading.read_rows(cfg, model_dir, adapters.model_cfg)
      check('data', rows.fingerprint, 'rows')
    frozen, trainable = base.halves(cfg, model_dir, adapters, mesh, rows)
    if not adapters.whole:  # PiSSA's and OLoRA's frozen pair is the same arrays
      trainable = jax.tree.map(jnp.copy, trainable)
    trainable = replayed(cfg, frozen, trainable, log)
    export.write(
      Path(out),
      frozen,
      trainable,
      adapters,
      cfg,
      model_dir,
      reading.read_tokenizer(cfg, model_dir, adapters.model_cfg),
      f'replayed from the {len(log)} steps of a log',
    )
  size = (directory / FILE).stat().st_size
  return {'run': run_dir, 'out': out, 'steps': len(log), 'log_bytes': size}


def replayed(
  cfg: TrainConfig,
  frozen: Tree,
  trainable: Tree,
  log: list[tuple[np.float32, np.ndarray]],
) -> Tree:
  """`trainable` after the steps of a log; it is written over."""
  update = jax.jit(
    mezo.make_update(mezo.root_key(cfg.train.seed)),
    donate_argnums=0,
    out_shardings=state_lib.shardings_of(trainable),
  )
  for step, (rate, slopes) in enumerate(log):
    trainable = update(trainable, frozen, np.int32(step), slopes, rate)
  return trainable


def text(report: dict[str, Any]) -> str:
  """The report in words."""
  return (
    f'{report["out"]}: {report["steps"]} steps, from'
    f' {report["log_bytes"]:,} bytes of {report["run"]}/{FILE}'
  )
