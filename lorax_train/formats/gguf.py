"""GGUF files of Llama's architecture, turned once into a model directory.

`convert` writes what the rest of the project reads: config.json, float weights
under Hugging Face's names, and the tokenizer. The file is untrusted input: its
header is read here with every length checked against the file, and a key or
tensor that changes the maths is supported or refused, by name. The package
`gguf` (the extra of that name) knows the block types and unpacks them.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from lorax_train.errors import ModelError
from lorax_train.formats import (
  gguf_config,
  gguf_header,
  gguf_tokenizer,
  hf_config,
)
from lorax_train.formats.gguf_header import Gguf, Stored
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.safetensors import few
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig

# Says what a directory was made from; where it is, all the rest is as well.
SOURCE_FILE = 'gguf_source.json'

# One more whenever the same file would give other contents.
_CONVERTER = 1

_DTYPES = {
  'float32': (np.dtype(np.float32), 'F32'),
  'float16': (np.dtype(np.float16), 'F16'),
  'bfloat16': (np.dtype(ml_dtypes.bfloat16), 'BF16'),
}

# Unpacked at a time: what bounds the memory, whatever the size of a tensor.
_CHUNK_VALUES = 2**22

# Hugging Face's module -> GGUF's, in a layer and outside of the layers.
_IN_LAYER = {
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_OUTSIDE = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
}
_LAYER = re.compile(r'model\.layers\.(\d+)\.(.+)\.weight')
_PERMUTED = ('self_attn.q_proj', 'self_attn.k_proj')


def convert(
  gguf_file: str | os.PathLike,
  directory: str | os.PathLike | None = None,
  dtype: str = 'float32',
) -> Path:
  """Turns a GGUF file into a Hugging Face model directory, once.

  The directory appears whole or not at all. Where it is already there, made
  from the same contents in the same dtype, nothing is written.

  Args:
    gguf_file: of architecture "llama", which Mistral's files are of as well.
    directory: where to; absent, empty, or from an earlier call. None for one
      of its own among the user's caches, $XDG_CACHE_HOME or ~/.cache.
    dtype: float32, float16 or bfloat16, to store the weights in.

  Returns:
    The directory.

  Raises:
    ModelError: the file is damaged or holds what we don't compute, the
      directory holds something else, or the package `gguf` is not installed.
  """
  path = Path(gguf_file)
  if dtype not in _DTYPES:
    raise ModelError(f'dtype {dtype!r} is none of {", ".join(_DTYPES)}')
  source = {**_source(path), 'dtype': dtype, 'converter': _CONVERTER}
  directory = _in_cache(source) if directory is None else Path(directory)
  if _is_made(directory, source):
    return directory
  gguf = _package()
  opened = gguf_header.read(path, gguf.GGML_QUANT_SIZES)
  config = gguf_config.to_hf(opened, dtype)
  cfg = hf_config.config_from_hf(config, str(path))
  tensors = _match(opened, cfg)
  _check_types(gguf, opened, tensors)
  files = gguf_tokenizer.files(opened, cfg.vocab)
  files['config.json'] = _json(config)

  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(
    tempfile.mkdtemp('.tmp', f'.{directory.name}-', directory.parent)
  )
  try:
    temporary.chmod(0o755)
    _write_weights(gguf, opened, cfg, tensors, temporary, dtype)
    for name, content in files.items():
      _write(temporary / name, content)
    sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
    _write(temporary / SOURCE_FILE, _json({**source, 'files': sizes}))
    try:
      temporary.replace(directory)
    except OSError:
      # Whoever converts the same file beside us may have come first.
      if not _is_made(directory, source):
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return directory


def _package() -> Any:
  try:
    import gguf
  except ImportError:
    raise ModelError(
      'reading GGUF files needs the package gguf: pip install'
      " 'lorax-train[gguf]'"
    ) from None
  return gguf


def _source(path: Path) -> dict[str, Any]:
  if not path.is_file():
    raise ModelError(f'{path}: no such file')
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return {'name': path.name, 'size': path.stat().st_size, 'sha256': digest}


def _in_cache(source: Mapping[str, Any]) -> Path:
  """A directory that only the same contents in the same dtype can have."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  kind = f'{source["sha256"][:12]}-{source["dtype"]}-{source["converter"]}'
  stem = Path(source['name']).stem
  return Path(cache) / 'lorax_train' / 'gguf' / f'{stem}-{kind}'


def _is_made(directory: Path, source: Mapping[str, Any]) -> bool:
  """Whether a directory is what `source` gives; something else is refused."""
  if not directory.exists():
    return False
  if not directory.is_dir():
    raise ModelError(f'{directory}: is a file, not a directory to convert into')
  if not any(directory.iterdir()):
    return False
  if not (directory / SOURCE_FILE).is_file():
    raise ModelError(
      f'{directory}: holds other files already; convert into a new directory'
    )
  made = read_object(directory / SOURCE_FILE)
  # The name is for people: a file that was moved has the same contents.
  differ = [k for k in source if k != 'name' and made.get(k) != source[k]]
  if differ:
    raise ModelError(
      f'{directory}: was made from {made.get("name")!r} and differs in'
      f' {", ".join(differ)}; remove it, or convert into another directory'
    )
  sizes = made.get('files')
  sizes = sizes if isinstance(sizes, dict) and sizes else {SOURCE_FILE: -1}
  broken = [
    name
    for name, size in sizes.items()
    if not (directory / name).is_file()
    or (directory / name).stat().st_size != size
  ]
  if broken:
    raise ModelError(
      f'{directory}: no longer as it was made ({few(broken)}); remove it and'
      ' convert again'
    )
  return True


def _gguf_name(name: str) -> str:
  """'blk.3.attn_q.weight' of 'model.layers.3.self_attn.q_proj.weight'."""
  found = _LAYER.fullmatch(name)
  if found is None:
    return f'{_OUTSIDE[name.removesuffix(".weight")]}.weight'
  return f'blk.{found[1]}.{_IN_LAYER[found[2]]}.weight'


def _match(opened: Gguf, cfg: DecoderConfig) -> dict[str, Stored]:
  """{Hugging Face name: its tensor}; every disagreement in one error."""
  tensors, problems = {}, []
  left = dict(opened.tensors)
  for param in params_lib.table(cfg):
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    for name in params_lib.hf_names(cfg, param):
      theirs = _gguf_name(name)
      stored = left.pop(theirs, None)
      if stored is None:
        problems.append(f'{theirs} is missing')
      elif stored.shape != shape:
        problems.append(
          f'{theirs} has shape {stored.shape}, the metadata say {shape}'
        )
      else:
        tensors[name] = stored
  if left:
    problems.append(f'tensors that such a model has not: {few([*left])}')
  if problems:
    raise ModelError(f'{opened.path}: {few(problems, 20)}')
  return tensors


def _check_types(
  gguf: Any, opened: Gguf, tensors: Mapping[str, Stored]
) -> None:
  """Tries one block of each type: before the work, not in the middle of it."""
  odd = []
  for kind in sorted({stored.kind for stored in tensors.values()}):
    quantisation = gguf.GGMLQuantizationType(kind)
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[quantisation][1]), np.uint8)
    try:
      gguf.dequantize(block, quantisation)
    except (RuntimeError, ValueError):  # "not yet implemented"
      odd.append(quantisation.name)
  if odd:
    raise ModelError(
      f'{opened.path}: tensor types that the package gguf cannot unpack:'
      f' {few(odd)}'
    )


def _write_weights(
  gguf: Any,
  opened: Gguf,
  cfg: DecoderConfig,
  tensors: Mapping[str, Stored],
  directory: Path,
  dtype: str,
) -> None:
  """model.safetensors, a few rows at a time.

  The safetensors library wants all tensors at once; the format is a header
  and then the bytes.
  """
  to, code = _DTYPES[dtype]
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, stored in tensors.items():
    begin, end = end, end + stored.values * to.itemsize
    header[name] = {
      'dtype': code,
      'shape': stored.shape,
      'data_offsets': [begin, end],
    }
  head = json.dumps(header).encode()
  head += b' ' * (-len(head) % 8)
  with (
    open(opened.path, 'rb') as source,
    open(directory / 'model.safetensors', 'wb') as target,
  ):
    target.write(struct.pack('<Q', len(head)) + head)
    for name, stored in tensors.items():
      permuted = any(module in name for module in _PERMUTED)
      for rows in _unpacked(gguf, source, stored, cfg.head_dim):
        rows = _unpermute(rows, cfg.head_dim) if permuted else rows
        with np.errstate(over='ignore'):
          rows = rows.astype(to)
        if not np.isfinite(rows.astype(np.float32)).all():
          raise ModelError(
            f'{opened.path}: {_gguf_name(name)} is not finite in {dtype}'
          )
        target.write(np.ascontiguousarray(rows).tobytes())
    target.flush()
    os.fsync(target.fileno())


def _unpacked(
  gguf: Any, source: BinaryIO, stored: Stored, multiple: int
) -> Iterator[np.ndarray]:
  """A tensor's values [rows, columns] in float32, whole heads at a time."""
  columns = stored.shape[-1]
  rows = stored.values // columns
  row_bytes = stored.nbytes // rows
  step = max(1, _CHUNK_VALUES // columns // multiple) * multiple
  kind = gguf.GGMLQuantizationType(stored.kind)
  source.seek(stored.offset)
  for begin in range(0, rows, step):
    count = min(step, rows - begin)
    data = np.frombuffer(source.read(count * row_bytes), np.uint8)
    yield gguf.dequantize(data.reshape(count, row_bytes), kind)


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows of q or k from llama.cpp's order of rotary pairs to Hugging Face's.

  llama.cpp rotates neighbours, so its files hold row i of a head's first half
  beside row i of its second half.
  """
  pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _json(content: Mapping[str, Any]) -> bytes:
  return (json.dumps(content, indent=2, sort_keys=True) + '\n').encode()


def _write(path: Path, content: bytes) -> None:
  with open(path, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
