"""Runs of small models, on devices that exist or do not."""

from lorax_train import config
from lorax_train.models.params import DecoderConfig
from lorax_train.plan.chips import Topology
from lorax_train.train import setup

SMALL = DecoderConfig(2000, 256, 6, 8, 4, 32, 768)
MISTRAL_7B = DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336, window=4096)


def run(size=SMALL, length=64, rows=8, remat='full', method='lora', **more):
  """(cfg, adapters): `more` are sections; float32 unless they say otherwise."""
  mapping = config.defaults()
  mapping['model'].update(path='.', dtype='float32', param_dtype='float32')
  mapping['method'] = method
  if method == 'lora':
    mapping['lora'].update(targets='all-linear', rank=16)
  mapping['data'].update(path='.', max_length=length)
  mapping['train'].update(batch_size=rows)
  for section, values in more.items():
    mapping[section].update(values)
  mapping['model'].update(remat=remat)
  cfg = config.from_mapping(mapping)
  return cfg, setup.plan_adapters(cfg, size)


def devices(n=1, limit=None, platform='cpu'):
  """So many of which nothing is known but what a program may have."""
  return Topology(f'{n} of ours', platform, None, n, n, limit)
