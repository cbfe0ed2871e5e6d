"""Sizes of public models, for those who have no config.json at hand.

As the `config.json` of each repository has them.
"""

from pathlib import Path

from lorax_train.errors import ModelError
from lorax_train.formats import find, hf_config
from lorax_train.formats.jsonfile import read_object
from lorax_train.models.params import DecoderConfig

# vocab, hidden, layers, heads, kv heads, head dim, mlp.
SIZES = {
  'mistral-7b': DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336, window=4096),
  'mistral-7b-v0.2': DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336),
  'mistral-7b-v0.3': DecoderConfig(32768, 4096, 32, 32, 8, 128, 14336),
  'nemo-12b': DecoderConfig(131072, 5120, 40, 32, 8, 128, 14336),
  'ministral-8b': DecoderConfig(
    131072, 4096, 36, 32, 8, 128, 12288, window=32768
  ),
  'small-24b': DecoderConfig(131072, 5120, 40, 32, 8, 128, 32768),
  'llama-2-7b': DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008),
  'llama-2-13b': DecoderConfig(32000, 5120, 40, 40, 40, 128, 13824),
  'llama-3.1-8b': DecoderConfig(128256, 4096, 32, 32, 8, 128, 14336),
  'llama-3.1-70b': DecoderConfig(128256, 8192, 80, 64, 8, 128, 28672),
  'llama-3.2-1b': DecoderConfig(128256, 2048, 16, 32, 8, 64, 8192, tied=True),
  'llama-3.2-3b': DecoderConfig(128256, 3072, 28, 24, 8, 128, 8192, tied=True),
  'tinyllama-1.1b': DecoderConfig(32000, 2048, 22, 32, 4, 64, 5632),
  'smollm2-135m': DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, tied=True),
  'smollm2-360m': DecoderConfig(49152, 960, 32, 15, 5, 64, 2560, tied=True),
  'smollm2-1.7b': DecoderConfig(49152, 2048, 24, 32, 32, 64, 8192, tied=True),
}


def model_config(given: str) -> DecoderConfig:
  """By a size's name, a config.json, a model directory, or a hub id.

  No weights are read or fetched.

  Raises:
    ModelError: none of these.
  """
  if given.lower() in SIZES:
    return SIZES[given.lower()]
  path = Path(given).expanduser()
  if path.is_file() and path.suffix == '.json':
    return hf_config.config_from_hf(read_object(path), str(path))
  try:
    remedy = f'give a directory, a config.json or a size: {", ".join(SIZES)}'
    return hf_config.read_config(find.find_model(given, remedy, weights=False))
  except ModelError:
    if path.exists() or '/' in given:
      raise
    raise ModelError(
      f'model {given}: no such directory or config.json, and no size of that'
      f' name; there are: {", ".join(SIZES)}'
    ) from None
