"""Whether `train` would start, and whether what it would learn is sound.

Every check is made, whatever the others say; one that needs what another has
found wrong is skipped. No weights are loaded, no device is touched, and nothing
but the cache of rows is written. Whether the mesh and the step fit the devices is
left to `train`, which asks that before it loads anything, and to `plan`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorax_train import config as config_lib
from lorax_train.config import TrainConfig
from lorax_train.data import preview, tokenize
from lorax_train.data.problems import one_line
from lorax_train.data.template import TOKENS
from lorax_train.errors import (
  IO_EXIT_CODE,
  ConfigError,
  ModelError,
  UserError,
)
from lorax_train.errors import (
  one_line as message_of,
)
from lorax_train.formats import find, hf, hf_config
from lorax_train.lora.matching import flat
from lorax_train.models.params import DecoderConfig
from lorax_train.train import (
  base,
  checkpoint,
  reading,
  rowchecks,
  rundir,
  setup,
)
from lorax_train.train.rowchecks import FAIL, OK, SKIPPED, WARN, Check, skipped
from lorax_train.train.rows import Rows

# An id that no embedding has a row for is a check of its own here.
_ANY_ID = 2**31 - 1


def validate(cfg: TrainConfig) -> list[Check]:
  """Makes every check of a run's inputs, in the order of the run."""
  checks: list[Check] = []
  model_dir, model_cfg = _model(cfg, checks)
  rows = None
  if model_dir is None or model_cfg is None:
    needing = ('lora', 'weights', 'tokenizer', 'rows')
    checks += [skipped(name, 'model') for name in needing]
  else:
    adapted = _adapted(cfg, model_cfg, checks)
    if cfg.model.init == 'random':
      checks.append(Check('weights', OK, 'drawn, by train.seed: none are read'))
    else:
      _weights(model_dir, adapted, checks)
    if _tokenizer(cfg, model_dir, model_cfg, checks):
      rows = _rows(cfg, model_dir, model_cfg, checks)
    else:
      checks.append(skipped('rows', 'tokenizer'))
  _run_dir(cfg, model_dir, rows, checks)
  return checks


def report(checks: Sequence[Check]) -> dict[str, Any]:
  """{'exit_code', 'checks': [{'name', 'status', 'message', 'code'}]}.

  The exit code is that of the first failure, 0 where there is none.
  """
  failed = [c.code for c in checks if c.status == FAIL]
  return {
    'exit_code': failed[0] if failed else 0,
    'checks': [check._asdict() for check in checks],
  }


def text(checks: Sequence[Check]) -> str:
  """A line a check, and how many there are of each kind."""
  lines = [
    f'{c.status:<7} {c.name:<10} {preview.visible(one_line(c.message), keep="")}'
    for c in checks
  ]
  words = {OK: 'ok', WARN: 'to look at', FAIL: 'failed', SKIPPED: 'skipped'}
  counts = Counter(check.status for check in checks)
  told = ', '.join(f'{counts[s]} {words[s]}' for s in words if counts[s])
  return '\n'.join([*lines, f'{len(checks)} checks: {told}'])


def _caught(name: str, function: Callable[[], Any], checks: list[Check]) -> Any:
  """What a function gives; None where it fails, and that is a check."""
  try:
    return function()
  except UserError as error:
    checks.append(Check(name, FAIL, str(error), error.exit_code))
  except OSError as error:
    checks.append(Check(name, FAIL, message_of(error), IO_EXIT_CODE))
  return None


def _model(
  cfg: TrainConfig, checks: list[Check]
) -> tuple[Path | None, DecoderConfig | None]:
  drawn = cfg.model.init == 'random'
  model_dir = _caught(
    'model', lambda: find.find_model(cfg.model.path, weights=not drawn), checks
  )
  if model_dir is None:
    return None, None
  model_cfg = _caught('model', lambda: hf_config.read_config(model_dir), checks)
  if model_cfg is not None:
    told = (
      f'{model_dir}: {model_cfg.layers} layers, vocabulary of'
      f' {model_cfg.vocab:,}'
    )
    checks.append(Check('model', OK, told))
  return model_dir, model_cfg


def _adapted(
  cfg: TrainConfig, model_cfg: DecoderConfig, checks: list[Check]
) -> DecoderConfig:
  """Plans the adapters; gives the model as they want it."""
  adapters = _caught(
    'lora', lambda: setup.plan_adapters(cfg, model_cfg), checks
  )
  if adapters is None:
    return model_cfg
  shapes = _caught('lora', lambda: setup.abstract(cfg, adapters), checks)
  if shapes is not None:
    told = f'{len(adapters.placed)} modules of the model match'
    if config_lib.trains_all(cfg):
      told = (
        f'none: all {len(flat(adapters.all_names))} modules are trained whole'
      )
    checks.append(Check('lora', OK, told))
  return adapters.model_cfg


def _weights(
  model_dir: Path, model_cfg: DecoderConfig, checks: list[Check]
) -> None:
  n = _caught('weights', lambda: hf.check_headers(model_dir, model_cfg), checks)
  if n is not None:
    told = f'{n} tensors of the shapes that config.json has'
    checks.append(Check('weights', OK, told))


def _tokenizer(
  cfg: TrainConfig,
  model_dir: Path,
  model_cfg: DecoderConfig,
  checks: list[Check],
) -> bool:
  """Whether rows can be read with the tokenizer, or without one."""
  try:
    tokenizer = tokenize.load_tokenizer(model_dir)
  except ModelError as error:
    if cfg.data.template != TOKENS:
      checks.append(Check('tokenizer', FAIL, str(error), error.exit_code))
      return False
    told = f'none that can be read, and token ids need none ({error})'
    checks.append(Check('tokenizer', WARN, told))
    return True
  try:
    tokenize.check_vocabulary(tokenizer, model_cfg.vocab)
  except ModelError as error:
    checks.append(Check('tokenizer', FAIL, str(error), error.exit_code))
    return True
  bos = 'none' if tokenizer.bos_id is None else tokenizer.bos_id
  told = (
    f'{tokenizer.files[0].name}: {tokenizer.size:,} ids, BOS {bos}, EOS'
    f' {tokenizer.eos_id}, padding {tokenizer.pad_id}'
  )
  if tokenizer.pad_id == tokenizer.eos_id:
    told += (
      '; padding with EOS is fine here: which EOS is learned is said by labels,'
      ' not by its id'
    )
  checks.append(Check('tokenizer', OK, told))
  return True


def _rows(
  cfg: TrainConfig,
  model_dir: Path,
  model_cfg: DecoderConfig,
  checks: list[Check],
) -> Rows | None:
  """Reads the rows and looks at them."""
  any_id = dataclasses.replace(model_cfg, vocab=_ANY_ID)

  def read(cfg: TrainConfig) -> Rows:
    return reading.read_rows(cfg, model_dir, any_id)

  problems: list[Check] = []
  rows = _caught('rows', lambda: read(cfg), problems)
  # What a model says while its rows are read, its tokenizer says.
  checks += [
    c._replace(name='tokenizer') if c.code == ModelError.exit_code else c
    for c in problems
  ]
  lenient = rows is None
  if lenient:
    # What is wrong is told; the rest may have more to tell.
    cut = 'drop' if cfg.data.truncation == 'error' else cfg.data.truncation
    data = dataclasses.replace(cfg.data, on_bad_row='skip', truncation=cut)
    if data != cfg.data:
      again = dataclasses.replace(cfg, data=data)
      rows = _caught('rows', lambda: read(again), [])
  if rows is None:
    checks += [skipped(n, 'set of rows') for n in rowchecks.NAMES]
    return None
  if not lenient:
    checks += rowchecks.dropped(rows)
  cut_at = cfg.data.max_length if cfg.data.truncation == 'right' else None
  checks += rowchecks.checks(rows, model_dir, model_cfg, cut_at)
  return None if lenient else rows


def _fingerprint(cfg: TrainConfig, model_dir: Path) -> str:
  return base.fingerprint(cfg, model_dir, hf_config.read_config(model_dir))


def _run_dir(
  cfg: TrainConfig,
  model_dir: Path | None,
  rows: Rows | None,
  checks: list[Check],
) -> None:
  run_dir = Path(cfg.run_dir).expanduser().absolute()
  inputs = {}
  if rows is not None:
    inputs['data'] = rows.fingerprint
  if model_dir is not None:
    weights = _caught('run_dir', lambda: _fingerprint(cfg, model_dir), [])
    if weights is not None:
      inputs['weights'] = weights

  def look() -> str:
    rundir.check_usable(run_dir)
    rundir.check_same_run(run_dir, config_lib.to_mapping(cfg), inputs)
    done = checkpoint.latest_step(run_dir / 'checkpoints') or 0
    if done > cfg.train.steps:
      raise ConfigError(
        f'train.steps={cfg.train.steps}: {run_dir} is at step {done}'
      )
    return f'goes on from step {done}' if done else 'ready for a new run'

  told = _caught('run_dir', look, checks)
  if told is not None:
    checks.append(Check('run_dir', OK, f'{run_dir}: {told}'))
