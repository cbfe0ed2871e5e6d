"""lorax_train: LoRA fine-tuning in JAX, from Hugging Face weights to PEFT.

Importing this package imports nothing; the functional LoRA API needs jax alone,
and `load` brings in the rest when it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lorax_train import lora
  from lorax_train.lora import LoraSpec, bind, merge, split

__version__ = '0.1.0'

__all__ = ['LoraSpec', 'bind', 'load', 'lora', 'merge', 'split']


def load(path: str, mesh: Any = None, **kwargs: Any) -> tuple:
  """A model as a library user wants it: (apply, params, tokenizer).

  See `lorax_train.infer.load.load` for the arguments.
  """
  from lorax_train.infer.load import load as load_model

  return load_model(path, mesh, **kwargs)


def __getattr__(name: str) -> Any:
  # Only now jax: `--help` and mistakes in a command line need not wait for it.
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  room = importlib.import_module('lorax_train.lora')
  return room if name == 'lora' else getattr(room, name)
