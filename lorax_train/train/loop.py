"""The run, top to bottom: data, model, adapters, resume, steps, export."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_train import config as config_lib
from lorax_train import lora, together
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError, DivergedError, StoppedError
from lorax_train.formats import find, hf_config
from lorax_train.lora.init import FROM_INPUTS
from lorax_train.train import (
  base,
  checkpoint,
  export,
  metrics,
  moments,
  optim,
  plot,
  reading,
  report,
  rundir,
  samples,
  setup,
)
from lorax_train.train import state as state_lib
from lorax_train.train.ahead import Ahead, made_ahead
from lorax_train.train.evaluate import make_evaluate
from lorax_train.train.metrics import MetricsLog, Progress
from lorax_train.train.replay import ScalarLog
from lorax_train.train.rows import banner_lines
from lorax_train.train.step import TrainState
from lorax_train.train.stopping import StopRequests, stop_requests

Tree = Any


def run(cfg: TrainConfig) -> Path:
  """Trains, and returns the directory of the adapter, or of the model.

  The same configuration again continues where the last run stopped; when it
  is already done, nothing is computed. Of several processes all are called
  alike, and process 0 alone writes into the run directory.

  Raises:
    UserError: see `errors`; its exit_code is the process's.
    OSError: the run directory can't be written.
    FailedError: of several processes, in place of these, on all of them.
  """
  run_dir = Path(cfg.run_dir).expanduser().absolute()
  together.check_same(
    rundir.versions() | rundir.flat(config_lib.to_mapping(cfg))
  )
  with rundir.held(run_dir):
    return _run_locked(cfg, run_dir)


def _run_locked(cfg: TrainConfig, run_dir: Path) -> Path:
  say = functools.partial(print, flush=True)
  mapping = config_lib.to_mapping(cfg)
  steps, out_dir = cfg.train.steps, export.directory_of(cfg, run_dir)

  # --- configuration and rows before weights: cheap mistakes show first
  with together.together():
    drawn = cfg.model.init == 'random'
    model_dir = find.find_model(cfg.model.path, find.WITHOUT_HUB, not drawn)
    model_cfg = hf_config.read_config(model_dir)
    weights = base.fingerprint(cfg, model_dir, model_cfg)
    adapters = setup.plan_adapters(cfg, model_cfg)
    mesh = setup.make_mesh(cfg)
    kernel = setup.attention_kernel(
      cfg, model_cfg, mesh.devices.flat[0].platform
    )
    rows = reading.read_rows(cfg, model_dir, model_cfg)
    inputs = {'data': rows.fingerprint, 'weights': weights}
    shapes, _ = setup.abstract(cfg, adapters)
  together.check_same(inputs)
  with together.together():
    if together.first():
      rundir.check_same_run(run_dir, mapping, inputs)
  model_cfg = adapters.model_cfg
  say(report.banner(cfg, shapes, adapters.all_names, mesh,
                    banner_lines(cfg, rows), run_dir))  # fmt: skip
  if together.several():
    say(
      f'processes  {jax.process_count()}, of {jax.local_device_count()}'
      ' device(s) each'
    )
  chosen = samples.choose(rows, cfg.eval.samples)
  done, exported = together.of_first(
    [
      checkpoint.latest_step(run_dir / 'checkpoints') or 0,
      out_dir.is_dir(),
    ]
  )
  with together.together():
    if done > steps:
      raise ConfigError(f'train.steps={steps}: {run_dir} is at step {done}')
  if done == steps and exported:
    say(f'already done: {steps} steps')
    if together.first():
      say(report.end_card(cfg, run_dir, model_dir, metrics.read(run_dir, done)))
    return out_dir
  with together.together():
    if together.first():
      rundir.write_config(run_dir, mapping, inputs)

  with jax.set_mesh(mesh), stop_requests() as stop:
    # --- weights onto the mesh, factors beside them
    began = time.monotonic()
    with together.together():
      if done and config_lib.trains_all(cfg):  # the checkpoint has all of it
        frozen, trainable = setup.abstract(cfg, adapters, mesh)
      else:
        if adapters.spec.init in FROM_INPUTS:
          say(
            f'inputs     of up to {moments.ROWS} rows: A and B begin from them'
          )
        frozen, trainable = base.halves(cfg, model_dir, adapters, mesh, rows)
    say(f'loaded     {time.monotonic() - began:.1f} s')

    # --- the state: fresh, or that of the newest valid checkpoint
    tx = setup.optimizer(cfg)
    like = state_lib.abstract_state(tx, frozen, trainable, mesh)
    factors = state_lib.shapes_of(lora.fixed_factors(frozen))
    found = checkpoint.restore_latest(
      run_dir / 'checkpoints', like._replace(fixed_factors=factors), say
    )
    if found is None:
      alone = config_lib.trains_all(cfg)  # there is no base to keep beside it
      state = state_lib.init_state(tx, trainable, like, alone)
    else:
      frozen = lora.with_fixed_factors(frozen, found.fixed_factors)
      state = found._replace(fixed_factors=None)
      say(f'resumed    at step {int(state.step)}')
    del trainable  # the state has its own

    # --- the step: compiled ahead of the loop, for each length of a batch
    began = time.monotonic()
    apply = setup.make_apply(cfg, model_cfg, kernel)
    step = setup.make_step(cfg, model_cfg, tx, frozen, like, mesh, kernel)
    compiled = {}
    for length, shapes in rows.shapes(cfg, mesh).items():
      compiled[length] = step.lower(state, frozen, shapes).compile()
    evaluate = make_evaluate(
      apply, frozen, rows, cfg.train.batch_size, mesh, cfg.train.loss_chunk
    )
    answer = samples.make_answer(
      cfg, model_cfg, model_dir, frozen, rows, chosen
    )
    took = f'compiled   {time.monotonic() - began:.1f} s'
    lengths = ', '.join(map(str, compiled))
    say(f'{took} (for {lengths} tokens)' if len(compiled) > 1 else took)

    start = int(state.step)
    progress = Progress(start, steps)
    make = functools.partial(rows.batch, cfg, mesh)
    with (
      contextlib.closing(_log(run_dir, start)) as log,
      contextlib.closing(_scalars(cfg, run_dir, start)) as scalars,
      made_ahead(make, range(start, steps)) as batches,
    ):
      look = _make_look(run_dir, evaluate, answer, chosen, log, progress)
      state = _train(
        cfg, run_dir, compiled, look, state, frozen, batches, stop, log,
        scalars, progress,
      )  # fmt: skip

    # --- what was trained, read back before anything is called done
    export.write(
      out_dir,
      frozen,
      state.trainable,
      adapters,
      cfg,
      model_dir,
      rows.tokenizer,
      report.held_out(log.lines),
    )
  with together.together():
    if together.first():
      if chosen:
        say('\n' + samples.before_and_after(chosen, log.lines))
      say(report.end_card(cfg, run_dir, model_dir, log.lines))
  return out_dir


def _log(run_dir: Path, start: int) -> MetricsLog:
  with together.together():
    return MetricsLog(run_dir, start, writes=together.first())


def _scalars(cfg: TrainConfig, run_dir: Path, start: int) -> ScalarLog:
  with together.together():
    return ScalarLog(
      run_dir, start, writes=together.first() and cfg.method == 'mezo'
    )


def _make_look(
  run_dir: Path,
  evaluate: Callable[[Tree], dict[str, float]],
  answer: Callable[[Tree], samples.Texts],
  chosen: Sequence[samples.Sample],
  log: MetricsLog,
  progress: Progress,
) -> Callable[[int, Tree], None]:
  """(step, trainable) -> held-out rows and samples, logged and drawn."""

  def look(at: int, trainable: Tree) -> None:
    found = evaluate(trainable)
    texts = answer(trainable)
    with together.together():
      if found:
        log.write(at, **{f'eval_{name}': v for name, v in found.items()})
        progress.held_out(at, **found)
      if texts:
        log.write(at, samples=texts)
      if together.first():
        draw()

  def draw() -> None:
    if samples.by_step(log.lines):
      text = samples.to_markdown(chosen, log.lines)
      (run_dir / samples.FILE).write_text(text, 'utf-8')
    plot.loss_curve(log.lines, run_dir / plot.FILE)

  return look


def _train(
  cfg: TrainConfig,
  run_dir: Path,
  compiled: Mapping[int, Callable[..., Any]],
  look: Callable[[int, Tree], None],
  state: TrainState,
  frozen: Tree,
  batches: Ahead[tuple[dict[str, jax.Array], int]],
  stop: StopRequests,
  log: MetricsLog,
  scalars: ScalarLog,
  progress: Progress,
) -> TrainState:
  """Steps until the last one, or until asked to stop.

  Raises:
    StoppedError: on SIGTERM or ctrl-C, with a checkpoint of where it was.
    DivergedError: the loss is not finite.
  """
  steps, start = cfg.train.steps, int(state.step)
  schedule = optim.make_schedule(setup.optim_config(cfg))
  pending: list[tuple[dict[str, jax.Array], int]] = []
  saved = start

  if start == 0:
    look(0, state.trainable)
  waited, began = 0.0, time.monotonic()
  for at in range(start + 1, steps + 1):
    # A stop asked for after the last step's own look at it takes one more
    # step, which is then saved.
    if stop.name and saved == at - 1:
      break
    # One step is computed and one waits, or batches would pile up. Where the
    # next batch is late, waiting counts from when the devices have no more to
    # do.
    behind = pending[-2:-1] if batches.ready else pending[-1:]
    jax.block_until_ready([values for values, _ in behind])
    asked = time.monotonic()
    batch, tokens = batches.take()
    waited += time.monotonic() - asked
    length = batch['ids'].shape[-1]
    state, measured = compiled[length](state, frozen, batch)
    pending.append((measured, tokens))
    stop.vote()
    last = at == steps or bool(stop.name)
    save = last or at % cfg.checkpoint.every == 0
    held_out = at == steps or at % cfg.eval.every == 0
    if save or held_out or at % cfg.train.log_every == 0:
      with together.together():
        _flush(pending, at, began, waited, schedule, log, scalars, progress)
      if held_out:
        look(at, state.trainable)
      if save:
        with together.together():
          log.sync()
          scalars.sync()
        kept = state._replace(fixed_factors=lora.fixed_factors(frozen))
        checkpoint.save(run_dir / 'checkpoints', at, kept, cfg.checkpoint.keep)
        saved = at
      pending, waited, began = [], 0.0, time.monotonic()
  with together.together():
    if int(state.step) < steps:
      raise StoppedError(
        f'stopped by {stop.name} at step {int(state.step)} of {steps}, nothing'
        ' lost: run the same command again to continue'
      )
  return state


def _flush(
  pending: list[tuple[dict[str, jax.Array], int]],
  at: int,
  began: float,
  waited: float,
  schedule: Callable[[int], Any],
  log: MetricsLog,
  scalars: ScalarLog,
  progress: Progress,
) -> None:
  """Fetches and logs the metrics of the steps since the last time."""
  values = jax.device_get([metrics for metrics, _ in pending])
  seconds = time.monotonic() - began
  tps = sum(tokens for _, tokens in pending) / seconds
  for i, v in enumerate(values, at - len(values)):
    loss, what = float(v['loss']), 'grad_norm'
    if 'slopes' in v:
      what = 'projected_grad'
      v[what] = np.sqrt(np.mean(np.square(v['slopes'])))
      scalars.write(i + 1, v['learning_rate'], v['slopes'])
    norm = float(v[what])
    if not (np.isfinite(loss) and np.isfinite(norm)):
      raise DivergedError(
        f'step {i + 1}: loss {loss}, {what} {norm}: not finite; lower'
        ' train.learning_rate, or look at the rows of this step; earlier'
        ' checkpoints are untouched'
      )
    log.write(
      i + 1,
      loss=loss,
      learning_rate=float(schedule(i)),
      tokens_per_second=tps,
      data_wait=waited / seconds,
      **{what: norm},
    )
  progress.report(
    at, loss, float(schedule(at - 1)), tps, seconds, waited / seconds
  )
