"""A tiny Mistral from random weights, on plain text, on the CPU of a laptop.

The text is a file of documents with <|endoftext|> between two, as TinyStories has
them. A tokenizer is made of it first, and the sizes are chosen:

  python scripts/new_model.py --text FILE.txt --vocab 512 --hidden 128 \
    --layers 4 --heads 4 --out models/tiny

  python -m lorax_train.main --config configs/tiny_pretrain.py \
    --config.model.path=models/tiny --config.data.path=FILE.txt
"""

from ml_collections import ConfigDict

from lorax_train.config import defaults


def get_config() -> ConfigDict:
  """The configuration; every key may be overridden on the command line."""
  cfg = ConfigDict(defaults())
  cfg.run_dir = 'runs/tiny_pretrain'
  cfg.method = 'full'

  cfg.model.path = 'models/tiny'
  cfg.model.init = 'random'
  cfg.model.dtype = 'float32'  # on CPU bfloat16 is slower
  cfg.model.param_dtype = 'float32'
  cfg.model.remat = 'none'  # such a small model fits with all its activations

  cfg.data.path = 'tinystories.txt'
  cfg.data.template = 'text'
  cfg.data.max_length = 1024
  cfg.data.truncation = 'right'
  cfg.data.packing = True

  cfg.train.steps = 600
  cfg.train.batch_size = 4
  cfg.train.optimizer = 'muon'
  cfg.train.learning_rate = 5e-3
  cfg.train.weight_decay = 0.1
  cfg.train.beta2 = 0.95
  cfg.train.schedule = 'cosine'
  cfg.train.warmup_steps = 50

  cfg.eval.every = 100
  cfg.eval.samples = 1  # text has no prompt: they would all be alike
  return cfg
