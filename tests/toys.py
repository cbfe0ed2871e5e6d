"""Models of a few kilobytes and a full disk, made here: no file from outside."""

import contextlib
import json
import resource

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers

from lorax_train.formats import hf_config
from lorax_train.models import params as params_lib

CONFIG = {
  'architectures': ['MistralForCausalLM'],
  'model_type': 'mistral',
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 10,
  'vocab_size': 260,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'sliding_window': 16,
  'tie_word_embeddings': False,
  'hidden_act': 'silu',
  'bos_token_id': 256,
  'eos_token_id': 257,
}


def write_model(directory, seed=0, tokenizer=True, **overrides):
  """A model directory of random weights; `overrides` go into config.json."""
  directory.mkdir(parents=True, exist_ok=True)
  config = {**CONFIG, **overrides}
  (directory / 'config.json').write_text(json.dumps(config))
  save_file(random_tensors(config, seed), directory / 'model.safetensors')
  if tokenizer:
    write_tokenizer(directory)
  return directory


def random_tensors(config, seed=0):
  """{Hugging Face name: float32 array} of a model of that config.json."""
  rng = np.random.default_rng(seed)
  cfg = hf_config.config_from_hf(config)
  tensors = {}
  for param in params_lib.table(cfg):
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    for name in params_lib.hf_names(cfg, param):
      noise = rng.standard_normal(shape).astype(np.float32)
      norm = param.axes[-1] == 'norm'
      tensors[name] = 1 + 0.1 * noise if norm else 0.2 * noise
  return tensors


def write_tokenizer(directory):
  """A tokenizer.json of single bytes: 256 of them, <s>, </s>, <unk>, <pad>."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, [])
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<s>', '</s>', '<unk>', '<pad>'])
  tokenizer.save(str(directory / 'tokenizer.json'))
  config = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<pad>',
    'add_bos_token': True,
  }
  (directory / 'tokenizer_config.json').write_text(json.dumps(config))


def random_ids(seed=0, shape=(2, 24), vocab=260):
  """int32 token ids."""
  return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


@contextlib.contextmanager
def full_disk(room):
  """No file may grow past `room` bytes: what a full disk is, even to root.

  Around the call under test alone: a log that pytest writes to has the same
  limit, and may have passed it.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
