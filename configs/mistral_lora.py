"""The reference run: Mistral-7B learns to guess the instruction.

LoRA of rank 64 on q_proj and v_proj, alpha 16, on Alpaca-GPT4 with the rows
reversed ("Uno reverse": given the response, predict the instruction).

  python -m lorax_train.main --config configs/mistral_lora.py

It trains 27,262,976 of 7,241,732,096 parameters. Without access to the hub,
name a local model and a local file:

  python -m lorax_train.main --config configs/mistral_lora.py \
    --config.model.path=DIR --config.data.path=FILE.json
"""

from ml_collections import ConfigDict

from lorax_train.config import defaults


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/mistral_lora'

  cfg.model.path = 'mistralai/Mistral-7B-v0.1'

  cfg.lora.targets = 'q_proj,v_proj'
  cfg.lora.rank = 64
  cfg.lora.alpha = 16.0
  cfg.lora.dropout = 0.0

  cfg.data.path = 'llm-wizard/alpaca-gpt4-data'
  cfg.data.template = 'uno_reverse'
  cfg.data.max_length = 512

  cfg.train.steps = 1000
  cfg.train.batch_size = 4
  cfg.train.grad_accum = 4
  cfg.train.learning_rate = 2e-4
  cfg.train.schedule = 'cosine'
  cfg.train.warmup_steps = 10
  return cfg
