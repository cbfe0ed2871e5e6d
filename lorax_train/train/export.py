"""What was trained on disk, complete and checked, or not there at all."""

import shutil
from pathlib import Path
from typing import Any

from lorax_train import config as config_lib
from lorax_train import lora, parallel
from lorax_train.config import TrainConfig
from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.data.tokenize import Tokenizer
from lorax_train.formats import hf_save, peft
from lorax_train.formats.whole import whole
from lorax_train.together import first, together
from lorax_train.train import report
from lorax_train.train.setup import Adapters

Tree = Any


def directory_of(cfg: TrainConfig, run_dir: Path) -> Path:
  """Where a run puts what it has trained."""
  return run_dir / ('model' if config_lib.trains_all(cfg) else 'adapter')


def write(
  directory: Path,
  frozen: Tree,
  trainable: Tree,
  adapters: Adapters,
  cfg: TrainConfig,
  model_dir: Path,
  tokenizer: Tokenizer | None,
  held_out: str,
) -> None:
  """Writes what was trained, a PEFT adapter or a model, in one move.

  Args:
    directory: replaced where it exists.
    frozen: from `base.halves`.
    trainable: what is trained.
    adapters: names and spec of what is adapted.
    cfg: the run.
    model_dir: its base, as files.
    tokenizer: its files go beside an adapter, and the tokenizer.json that a
      lone tokenizer.model lacks.
    held_out: the result, in words, for the model card.

  Of several processes one alone writes, and all return when it has.

  Raises:
    ModelError: numbers that are not finite.
    OSError: disk full, no rights; what was there before is untouched.
  """
  if config_lib.trains_all(cfg):
    write_model(
      directory, frozen, trainable, model_dir, cfg, tokenizer, held_out
    )
    return
  # Who loads the adapter can do nothing with a GGUF file.
  is_file = Path(cfg.model.path).expanduser().is_file()
  base = str(model_dir) if is_file else cfg.model.path
  write_adapter(
    directory, frozen, trainable, adapters, cfg, base, tokenizer, held_out
  )


def write_model(
  directory: Path,
  frozen: Tree,
  trainable: Tree,
  model_dir: Path,
  cfg: TrainConfig,
  tokenizer: Tokenizer | None,
  held_out: str,
) -> None:
  """Writes a model of which every weight was trained, in one move.

  Its numbers are those that the model saw, in model.param_dtype: the held-out
  loss of the run is that of the files. They are read back before that. Arguments
  and errors are those of `write`.
  """
  params = parallel.fetch(lora.merge(frozen, trainable))
  with together():
    if first():
      card = report.full_model_card(cfg, held_out).encode()
      files = {**_lacking(tokenizer), 'README.md': card}
      lost = 'model not written, checkpoints are untouched'
      dtype = cfg.model.param_dtype
      with whole(directory, lost) as building:
        hf_save.write(building, model_dir, params, dtype, files=files)
        if not hf_save.equals(building, model_dir, params, dtype):
          raise OSError(f'{directory}: the model does not read back as written')


def _lacking(tokenizer: Tokenizer | None) -> dict[str, bytes]:
  """The tokenizer.json that a lone tokenizer.model lacks, by name."""
  if tokenizer is None:
    return {}
  files, lacking = missing_files(tokenizer.files[0].parent)
  if lacking:
    print(f'tokenizer  {lacking}', flush=True)
  return files


def write_adapter(
  directory: Path,
  frozen: Tree,
  trainable: Tree,
  adapters: Adapters,
  cfg: TrainConfig,
  base: str,
  tokenizer: Tokenizer | None,
  held_out: str,
) -> None:
  """Writes a PEFT adapter directory in one move, after reading it back.

  `base` is what the adapter says it was trained on; the rest is as in `write`.
  """
  trainable = parallel.fetch(trainable)
  factors = parallel.fetch(lora.fixed_factors(frozen))
  frozen = lora.with_fixed_factors(frozen, factors)
  with together():
    if not first():
      return
    with whole(
      directory, 'adapter not written, checkpoints are untouched'
    ) as building:
      peft.save_adapter(
        building,
        frozen,
        trainable,
        adapters.names,
        adapters.spec,
        base,
        adapters.norms,
        tied='lm_head' not in adapters.names,
      )
      _check(building, frozen, trainable, adapters)
      for file in tokenizer.files if tokenizer else ():
        shutil.copyfile(file, building / file.name)
      for name, content in _lacking(tokenizer).items():
        (building / name).write_bytes(content)
      card = report.model_card(cfg, adapters.spec, held_out)
      (building / 'README.md').write_text(card, 'utf-8')


def _check(
  directory: Path, frozen: Tree, trainable: Tree, adapters: Adapters
) -> None:
  """What was written reads back as what was trained, bit for bit.

  Raises:
    OSError: it does not.
    ModelError: it is not finite.
  """
  written = peft.to_tensors(frozen, trainable, adapters.all_names)
  loaded = peft.on_tied(peft.load_adapter(directory))
  if not peft.equals(loaded, written):
    raise OSError(f'{directory}: the adapter does not read back as written')
