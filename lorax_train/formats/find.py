"""What a user calls a model, as a directory in Hugging Face's format."""

import os
from pathlib import Path

from lorax_train.errors import ModelError
from lorax_train.formats import gguf

_SUFFIX = '.gguf'

WITHOUT_HUB = (
  'without the hub give local ones: --config.model.path=DIR'
  ' --config.data.path=FILE.json'
)


def find_model(
  path: str, remedy: str = 'give a local directory', weights: bool = True
) -> Path:
  """A model directory: `path` itself, or one made or fetched from it.

  A GGUF file is converted once, into the user's cache. Local paths touch no
  network. Of a repo id on the hub only the files that we read are fetched:
  configs, tokenizer and safetensors.

  Args:
    path: as the user gave it.
    remedy: what to do where the hub can't be reached.
    weights: whether those of a repo on the hub are wanted as well.

  Raises:
    ModelError: no such directory or file, a GGUF file that we can't read, or
      the hub can't be reached or refuses.
  """
  local = Path(os.path.expanduser(path))
  if local.is_dir():
    return local
  is_gguf = local.suffix.lower() == _SUFFIX
  if is_gguf and local.is_file():
    return gguf.convert(local)
  is_local = path.startswith(('.', '/', '~')) or path.count('/') != 1 or is_gguf
  if not (local.exists() or is_local):
    return _download(path, remedy, weights)
  if is_gguf:
    raise ModelError(
      f'model {path}: no such file; give a GGUF file or a model directory'
      ' (scripts/quickstart.sh fetches the model of the quickstart)'
    )
  what = 'is a file' if local.exists() else 'no such directory'
  raise ModelError(
    f'model {path}: {what}; give a directory with config.json and safetensors,'
    ' a .gguf file, or a hub id such as mistralai/Mistral-7B-v0.1'
  )


def _download(repo_id: str, remedy: str, weights: bool) -> Path:
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repo_id,
        allow_patterns=[
          '*.json',
          'tokenizer.model',
          '*.jinja',
          *(['model*.safetensors'] if weights else []),
        ],
        etag_timeout=5,
      )
    )
  except Exception as error:  # the hub's clients raise kinds of their own
    kind = type(error).__name__
    if 'Gated' in kind:
      remedy = f'accept its terms at the hub page of {repo_id} and set HF_TOKEN'
    raise ModelError(
      f'model {repo_id}: cannot be had from the hub ({kind}); {remedy}'
    ) from None
