"""Checkpoints in bitsandbytes' formats, written here by plain numpy.

The tensors are those that transformers 5.23 writes of a `Linear4bit` and a
`Linear8bitLt`; the numbers behind them are random bytes, spelled out beside.
"""

import json

import numpy as np
from safetensors.numpy import save_file

from lorax_train.models import params as params_lib
from lorax_train.quant import blockwise
from tests.toys import CONFIG, random_tensors, write_model

# down_proj, of 172 inputs, has blocks that go on in the next output; with as
# many as o_proj's there are several blocks of the second level.
SIZES = {
  'hidden_size': 128,
  'intermediate_size': 172,
  'head_dim': 48,
  'num_hidden_layers': 2,
  'num_key_value_heads': 4,
}
KINDS = ('nf4', 'nf4, absmax in float32', 'int8')
FOUR_BIT = {
  'quant_method': 'bitsandbytes',
  'load_in_4bit': True,
  'load_in_8bit': False,
  'bnb_4bit_quant_type': 'nf4',
  'bnb_4bit_quant_storage': 'uint8',
  'bnb_4bit_use_double_quant': True,
  'bnb_4bit_compute_dtype': 'bfloat16',
  'llm_int8_skip_modules': None,
  'llm_int8_has_fp16_weight': False,
}
EIGHT_BIT = {
  **FOUR_BIT, 'load_in_4bit': False, 'load_in_8bit': True,
  'bnb_4bit_use_double_quant': False,
}  # fmt: skip


def settings(kind):
  """quantization_config of a kind."""
  if kind == 'int8':
    return EIGHT_BIT
  return {**FOUR_BIT, 'bnb_4bit_use_double_quant': kind == 'nf4'}


def write(directory, kind='nf4', kept=(), changed=None, **overrides):
  """A model directory whose linears are stored so.

  Args:
    directory: made here.
    kind: of KINDS.
    kept: ends of the names of linears that stay floats.
    changed: called with the tensors before they are written.
    **overrides: into config.json.

  Returns:
    {name: float32 array} of what the files stand for.
  """
  config = {'quantization_config': settings(kind), **SIZES, **overrides}
  write_model(directory, tokenizer=False, **config)
  plain = random_tensors({**CONFIG, **SIZES})
  cfg_of = params_lib.MISTRAL_PARAMS
  linear = [p.hf for p in cfg_of if p.linear and p.stacked]
  rng, stored, values = np.random.default_rng(1), {}, {}
  for name, x in plain.items():
    of_layer = any(name.endswith(hf.partition('{}')[2]) for hf in linear)
    if not of_layer or name.removesuffix('.weight').endswith(tuple(kept)):
      stored[name] = values[name] = x
    elif kind == 'int8':
      values[name] = _eight_bit(name, x.shape, rng, stored)
    else:
      values[name] = _four_bit(name, x.shape, kind == 'nf4', rng, stored)
  if changed is not None:
    changed(stored)
  save_file(stored, directory / 'model.safetensors')
  return values


def _four_bit(name, shape, double, rng, stored):
  n = int(np.prod(shape))
  packed = rng.integers(0, 256, -(-n // 2), np.uint8)
  n_blocks = -(-n // 64)
  state = {
    'quant_type': 'nf4', 'blocksize': 64, 'dtype': 'bfloat16',
    'shape': list(shape),
  }  # fmt: skip
  if double:
    codes = rng.integers(0, 256, n_blocks, np.uint8)
    absmax2 = rng.random(-(-n_blocks // 256), np.float32)
    offset = np.float32(1.5 + rng.random())
    state |= {
      'nested_blocksize': 256, 'nested_dtype': 'float32',
      'nested_offset': float(offset),
    }  # fmt: skip
    stored[f'{name}.absmax'] = codes
    stored[f'{name}.nested_absmax'] = absmax2
    stored[f'{name}.nested_quant_map'] = blockwise.DYNAMIC
    absmax = blockwise.DYNAMIC[codes] * np.repeat(absmax2, 256)[:n_blocks]
    absmax = absmax + offset
  else:
    absmax = rng.random(n_blocks, np.float32)
    stored[f'{name}.absmax'] = absmax
  stored[name] = packed[:, None]
  stored[f'{name}.quant_map'] = blockwise.NF4
  text = json.dumps(state).encode()
  stored[f'{name}.quant_state.bitsandbytes__nf4'] = np.frombuffer(
    text, np.uint8
  )
  nibbles = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
  values = blockwise.NF4[nibbles] * np.repeat(absmax, 64)[:n]
  return values.reshape(shape)


def _eight_bit(name, shape, rng, stored):
  q = rng.integers(-127, 128, shape, np.int8)
  scale = rng.random(shape[0], np.float32)
  stored[name] = q
  stored[f'{name.removesuffix(".weight")}.SCB'] = scale
  stored[f'{name.removesuffix(".weight")}.weight_format'] = np.array(
    0, np.uint8
  )
  return q.astype(np.float32) * scale[:, None] * np.float32(1 / 127)
