"""Mean next-token loss per learned token: of the loop, and of the verb `eval`.

The base model is the run's own program with scales of zero, so both losses
come from one compilation.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_train import config as config_lib
from lorax_train import lora, parallel
from lorax_train.config import TrainConfig
from lorax_train.data.encoded import NO_LOSS
from lorax_train.errors import (
  ConfigError,
  DataError,
  DivergedError,
  ModelError,
  ResumeError,
)
from lorax_train.formats import find, hf, hf_config, quant_config
from lorax_train.infer.inspection import aligned
from lorax_train.lora.halves import is_half
from lorax_train.models.params import DecoderConfig
from lorax_train.train import base as base_lib
from lorax_train.train import checkpoint, export, options, reading, setup
from lorax_train.train import step as step_lib
from lorax_train.train.inspection import read_run
from lorax_train.train.rows import Rows, paths, templates

Tree = Any
Report = dict[str, Any]


def make_evaluate(
  apply: step_lib.Apply,
  frozen: Tree,
  rows: Rows,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  loss_chunk: int,
) -> Callable[..., dict[str, float]]:
  """(trainable, frozen) -> what the held-out rows show, by name.

  `loss`, a mean over learned tokens, and of rows of choices `accuracy`, with the
  loss that the run has: over rows, or over the right choices' tokens.

  Args:
    apply: (params, ids) -> logits, or what stands before the head.
    frozen: from `lora.split`; what is taken where none is given.
    rows: its held-out rows are evaluated; of none, there is no name.
    batch_size: rows of a batch, over all devices.
    mesh: devices.
    loss_chunk: see `losses.next_token_loss_of_states`.
  """
  eval_step = jax.jit(step_lib.make_eval_step(apply, loss_chunk, rows.compared))
  sharding = parallel.batch_sharding(mesh, axis=0)

  def evaluate(trainable: Tree, frozen: Tree = frozen) -> dict[str, float]:
    totals: dict[str, float] = collections.defaultdict(float)
    counts: collections.Counter[str] = collections.Counter()
    for micro in rows.held_out(batch_size):
      found = eval_step(trainable, frozen, parallel.put(micro, sharding))
      for name, (total, n) in found.items():
        totals[name] += float(total)
        counts[name] += int(n)
    return {name: totals[name] / n for name, n in counts.items() if n}

  return evaluate


def evaluate_run(run_dir: str) -> Report:
  """The losses of a finished run on the rows that it held out.

  In the run's dtypes and batches, and on its mesh where the devices at hand
  make one; otherwise on one device.

  Raises:
    ResumeError: no run, or its rows or weights are no longer what they were.
    ModelError: no adapter yet.
    UserError: see `setup` and `hf`.
  """
  directory = Path(run_dir).expanduser()
  cfg, inputs = read_run(directory)
  trained = export.directory_of(cfg, directory)
  if not trained.is_dir():
    done = checkpoint.latest_step(directory / 'checkpoints') or 0
    raise ModelError(
      f'{trained}: no {trained.name} yet, the run is at step {done} of'
      f' {cfg.train.steps}: give its command again to finish it'
    )
  try:
    drawn = cfg.model.init == 'random'
    model_dir = find.find_model(cfg.model.path, weights=not drawn)
    model_cfg = hf_config.read_config(model_dir)
    rows = reading.read_rows(cfg, model_dir, model_cfg)
  except (DataError, ModelError) as error:
    raise type(error)(
      f'run {run_dir}, whose relative paths count from here: {error}'
    ) from None
  now = {
    'data': rows.fingerprint,
    'weights': base_lib.fingerprint(cfg, model_dir, model_cfg),
  }
  for name, path in (('data', paths(cfg)), ('weights', cfg.model.path)):
    if now[name] != inputs.get(name):
      raise ResumeError(
        f'run {run_dir}: the {name} of {path} are not those that it read: put'
        ' them back, or give others with --model, --adapter and --data'
      )
  if not len(rows.eval_rows):
    raise DataError(
      f'run {run_dir}: it held no rows out (eval.rows={cfg.eval.rows}, of'
      f' {len(rows.train_rows)} rows a tenth at most): give rows with --model,'
      ' --adapter and --data'
    )
  try:
    mesh = setup.make_mesh(cfg)
  except ConfigError:  # it was made for other devices
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
  if config_lib.trains_all(cfg):
    report = _evaluate_whole(cfg, rows, model_dir, model_cfg, mesh, trained)
  else:
    cfg = dataclasses.replace(
      cfg, lora=dataclasses.replace(cfg.lora, init_from=str(trained))
    )
    report = _evaluate(cfg, rows, model_dir, model_cfg, mesh)
  return {'run': str(directory), **report}


def evaluate_file(
  model: str,
  data: str,
  template: str,
  adapter: str = '',
  max_length: int = 512,
  truncation: str = 'drop',
  on_bad_row: str = 'error',
  batch_size: int = 8,
  dtype: str = 'float32',
  quant: str = 'none',
  rows: int = 0,
) -> Report:
  """The losses of a model, and of an adapter on it, on the rows of a file.

  Args:
    model: directory in Hugging Face format, or a hub id.
    data: see `data.path` of the configuration, as for the next four.
    template: how a row becomes a prompt and what is learned.
    adapter: PEFT adapter directory; '' for the base alone.
    max_length: longest row in tokens.
    truncation: what becomes of a longer row.
    on_bad_row: what becomes of a row that does not fit the template.
    batch_size: rows computed at once.
    dtype: compute and storage dtype.
    quant: see `model.quant`.
    rows: take the first so many of the rows that are left; 0 for all.

  Raises:
    UserError: what is wrong with the model, the adapter or the rows.
  """
  if rows < 0:
    raise ConfigError(f'--rows {rows}: give 0 for all of them, or a number')
  cfg = options.config_of(
    model,
    data,
    template,
    max_length,
    truncation,
    on_bad_row,
    adapter=adapter,
    batch_size=batch_size,
    dtype=dtype,
    quant=quant,
  )
  with options.reworded():
    model_dir = find.find_model(model)
    model_cfg = hf_config.read_config(model_dir)
    every = reading.read_rows(cfg, model_dir, model_cfg)
  chosen = every._replace(eval_rows=every.train_rows[: rows or None])
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  return _evaluate(cfg, chosen, model_dir, model_cfg, mesh)


def text(report: Report) -> str:
  """A report in words."""
  base, adapted = report['base'], report['adapted']
  lines = {
    key: report[key]
    for key in ('run', 'model', 'adapter', 'trained')
    if report.get(key)
  }
  lines |= {
    'data': f'{report["data"]}, template {report["template"]}',
    'rows': (
      f'{report["rows"]:,}, {report["learned_tokens"]:,} learned tokens'
    ),
    'compute': f'{report["dtype"]} on {report["devices"]}',
    'base': _words(base),
  }
  if adapted:
    lines['adapted'] = _words(adapted)
    change = report['change_percent']
    lines['change'] = ', '.join(
      f'{key} {change[key]:+.2f} %' for key in change if change[key] is not None
    )
  return aligned(lines)


def _evaluate(
  cfg: TrainConfig,
  rows: Rows,
  model_dir: Path,
  model_cfg: DecoderConfig,
  mesh: jax.sharding.Mesh,
) -> Report:
  """Losses of the base, and of lora.init_from on it, on rows.eval_rows."""
  if cfg.lora.init_from:
    adapters = setup.plan_adapters(cfg, model_cfg)
  else:
    adapters = setup.no_adapters(
      quant_config.as_asked(model_cfg, cfg.model.quant)
    )
  model_cfg = adapters.model_cfg
  with jax.set_mesh(mesh):
    params = hf.load_params(
      model_dir, model_cfg, jnp.dtype(cfg.model.param_dtype), mesh
    )
    frozen, trainable = setup.split(cfg, params, adapters)
    evaluate = _evaluator(cfg, model_cfg, frozen, rows, mesh)
    base = evaluate(*_switched_off(frozen, trainable, params))
    adapted = evaluate(trainable) if adapters.loaded else None
  return {
    **_facts(cfg, rows, mesh, base, adapted),
    'adapter': cfg.lora.init_from or None,
  }


def _evaluate_whole(
  cfg: TrainConfig,
  rows: Rows,
  model_dir: Path,
  model_cfg: DecoderConfig,
  mesh: jax.sharding.Mesh,
  trained: Path,
) -> Report:
  """Losses of what a run of all weights started from, and of what it wrote."""
  adapters = setup.plan_adapters(cfg, model_cfg)
  model_cfg = adapters.model_cfg
  with jax.set_mesh(mesh):
    frozen, weights = base_lib.halves(cfg, model_dir, adapters, mesh)
    evaluate = _evaluator(cfg, model_cfg, frozen, rows, mesh)
    before = evaluate(weights)
    del weights
    own = jnp.dtype(cfg.model.param_dtype) if adapters.whole else jnp.float32
    after = evaluate(hf.load_params(trained, model_cfg, own, mesh))
  return {
    **_facts(cfg, rows, mesh, before, after),
    'adapter': None,
    'trained': str(trained),
  }


def _evaluator(
  cfg: TrainConfig,
  model_cfg: DecoderConfig,
  frozen: Tree,
  rows: Rows,
  mesh: jax.sharding.Mesh,
) -> Callable[..., dict[str, float]]:
  """`make_evaluate` of a run's model, on its held-out rows."""
  kernel = setup.attention_kernel(cfg, model_cfg, mesh.devices.flat[0].platform)
  return make_evaluate(
    setup.make_apply(cfg, model_cfg, kernel),
    frozen,
    rows,
    cfg.train.batch_size,
    mesh,
    cfg.train.loss_chunk,
  )


def _facts(
  cfg: TrainConfig,
  rows: Rows,
  mesh: jax.sharding.Mesh,
  base: dict[str, float],
  adapted: dict[str, float] | None,
) -> Report:
  """What was evaluated, and the losses of the base and of what was trained."""
  of_base = _report('base', base, rows, cfg.model.dtype)
  of_adapted = None
  if adapted is not None:
    what = 'model' if config_lib.trains_all(cfg) else 'adapter'
    of_adapted = _report(what, adapted, rows, cfg.model.dtype)
  return {
    'model': cfg.model.path,
    'data': cfg.data.eval_path or paths(cfg),
    'template': cfg.data.template if cfg.data.eval_path else templates(cfg),
    'rows': len(rows.eval_rows),
    'learned_tokens': sum(
      int((rows.eval_set.labels[i][1:] != NO_LOSS).sum())
      for i in rows.eval_rows
    ),
    'dtype': cfg.model.dtype,
    'devices': f'{mesh.size} {mesh.devices.flat[0].device_kind}',
    'base': of_base,
    'adapted': of_adapted,
    'change_percent': of_adapted and _change(of_base, of_adapted),
  }


def _switched_off(
  frozen: Tree, trainable: Tree, params: Tree
) -> tuple[Tree, Tree]:
  """(trainable, frozen) of the base alone.

  Every adapter's scale is 0, and what is trained whole is as it was.
  """

  def off(x):
    if not isinstance(x, lora.Fixed):
      return x
    return dataclasses.replace(x, scale=jnp.zeros_like(x.scale))

  def as_it_was(half, own, w):
    return half.taken(w) if isinstance(half, lora.Original) else own

  return (
    jax.tree.map(as_it_was, frozen, trainable, params, is_leaf=is_half),
    jax.tree.map(off, frozen, is_leaf=is_half),
  )


def _report(
  what: str, found: dict[str, float], rows: Rows, dtype: str
) -> Report:
  """{'loss', 'perplexity'}; the latter is None past what a float holds.

  Of choices {'loss', 'accuracy'}, and the former as well if it is a token's.
  """
  loss = found.get('loss')
  if loss is None or not math.isfinite(loss):
    raise DivergedError(
      f'the loss of the {what} is {loss} in {dtype}: its weights are damaged, or'
      ' too large for that dtype'
    )
  if rows.compared:
    return found
  try:
    return {**found, 'perplexity': math.exp(loss)}
  except OverflowError:
    return {**found, 'perplexity': None}


def _change(before: Report, after: Report) -> Report:
  """Change of each value in per cent, None where there is none."""
  return {
    key: 100 * (after[key] / before[key] - 1)
    if before[key] and after[key] is not None
    else None
    for key in before
  }


def _words(values: Report) -> str:
  text = f'loss {values["loss"]:.6f}'
  if 'accuracy' in values:
    text += f', accuracy {values["accuracy"]:.4f}'
  if 'perplexity' in values:
    perplexity = values['perplexity']
    known = 'too large' if perplexity is None else f'{perplexity:,.3f}'
    text += f', perplexity {known}'
  return text
