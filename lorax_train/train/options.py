"""The options --model, --data, --template ... of a verb as a configuration."""

import contextlib
import re
from collections.abc import Iterator

from lorax_train import config as config_lib
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError, DataError


def config_of(
  model: str,
  data: str,
  template: str,
  max_length: int = 512,
  truncation: str = 'drop',
  on_bad_row: str = 'error',
  *,
  adapter: str = '',
  batch_size: int = 8,
  dtype: str = 'float32',
  quant: str = 'none',
) -> TrainConfig:
  """A configuration of one file's rows, none of which is held out.

  Raises:
    ConfigError: in the words of the options.
  """
  mapping = config_lib.defaults()
  mapping['model'].update(
    path=model, dtype=dtype, param_dtype=dtype, remat='none', quant=quant
  )
  mapping['lora'].update(init_from=adapter)
  mapping['data'].update(
    path=data,
    template=template,
    max_length=max_length,
    truncation=truncation,
    on_bad_row=on_bad_row,
  )
  mapping['train'].update(batch_size=batch_size)
  mapping['eval'].update(rows=0)
  with reworded():
    return config_lib.from_mapping(mapping)


@contextlib.contextmanager
def reworded(left_to: str = 'evaluate') -> Iterator[None]:
  """Errors about configuration keys become errors about the options."""
  try:
    yield
  except (ConfigError, DataError) as error:
    raise type(error)(_reworded(str(error), left_to)) from None


def _reworded(message: str, left_to: str) -> str:
  def option(found: re.Match) -> str:
    return '--' + {'path': 'data'}.get(found[1], found[1].replace('_', '-'))

  message = re.sub(r'--config\.data\.(\w+)', option, message)
  message = re.sub(r'(?:data|train)\.(max_length|batch_size)', option, message)
  return message.replace('left to train on', f'left to {left_to}')
