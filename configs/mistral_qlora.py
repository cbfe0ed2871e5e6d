"""The reference run as QLoRA: the same adapters on a base of 4 bits.

As in configs/mistral_lora.py, of rank 64 on q_proj and v_proj, alpha 16, on
Alpaca-GPT4 with the rows reversed, but the linears of the layers are stored in
NF4 with double quantisation (Dettmers et al. 2023).

  python -m lorax_train.main --config configs/mistral_qlora.py

It trains 27,262,976 of 7,241,732,096 parameters, and stores 3,779,334,144
elements: 4-bit weights two to a byte, and embedding, head, norms and adapters.
Without access to the hub, name a local model and a local file:

  python -m lorax_train.main --config configs/mistral_qlora.py \
    --config.model.path=DIR --config.data.path=FILE.json
"""

from ml_collections import ConfigDict

from lorax_train.config import defaults


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/mistral_qlora'

  cfg.model.path = 'mistralai/Mistral-7B-v0.1'
  cfg.model.quant = 'nf4'

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
