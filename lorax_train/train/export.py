"""The trained adapter on disk, complete and checked, or not there at all."""

import shutil
from pathlib import Path
from typing import Any

from lorax_train import lora, parallel
from lorax_train.config import TrainConfig
from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.data.tokenize import Tokenizer
from lorax_train.formats import peft
from lorax_train.formats.whole import whole
from lorax_train.together import first, together
from lorax_train.train import report
from lorax_train.train.setup import Adapters

Tree = Any


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

  Args:
    directory: replaced where it exists.
    frozen: from `lora.split`.
    trainable: the factors, and what is trained whole.
    adapters: names and spec of what is adapted.
    cfg: the run, for the model card.
    base: what the adapter says it was trained on.
    tokenizer: its files go beside the adapter, and the tokenizer.json that a
      lone tokenizer.model lacks.
    held_out: the result, in words, for the model card.

  Of several processes one alone writes, and all return when it has.

  Raises:
    OSError: disk full, no rights; what was there before is untouched.
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
      if tokenizer:
        files, lacking = missing_files(tokenizer.files[0].parent)
        for name, content in files.items():
          (building / name).write_bytes(content)
        if lacking:
          print(f'tokenizer  {lacking}', flush=True)
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
