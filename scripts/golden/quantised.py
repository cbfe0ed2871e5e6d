"""bitsandbytes' NF4 and int8 of random matrices, for tests/golden.

  python scripts/golden/quantised.py tests/golden/quantised.safetensors

Needs bitsandbytes 0.50.2 and torch, on a CPU. tests/parity compares live.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file


def matrices() -> dict[str, torch.Tensor]:
  """[out, in]: two second-level blocks and zeros; a short last block, odd."""
  random = torch.Generator().manual_seed(0)
  whole = torch.randn(160, 128, generator=random) * 0.02
  whole[7] = 0
  return {
    'whole': whole.to(torch.bfloat16),
    'short': torch.randn(5, 33, generator=random),
  }


def nf4(w: torch.Tensor) -> dict[str, torch.Tensor]:
  """Both kinds of absmax, and what the double one stands for."""
  options = {'blocksize': 64, 'quant_type': 'nf4'}
  _, plain = functional.quantize_4bit(w, **options)
  packed, double = functional.quantize_4bit(
    w, compress_statistics=True, **options
  )
  return {
    'w': w,
    'packed': packed.reshape(-1),
    'plain_absmax': plain.absmax,
    'absmax': double.absmax,
    'absmax2': double.state2.absmax,
    'offset': double.offset.reshape(()),
    'dequantised': functional.dequantize_4bit(packed, double),
    'code': double.code.clone(),
    'code2': double.state2.code.clone(),
  }


def int8(w: torch.Tensor) -> dict[str, torch.Tensor]:
  """Rows by their largest magnitude."""
  q, scale, _ = functional.int8_vectorwise_quant(w)
  return {'int8': q, 'int8_scale': scale}


def main() -> None:
  """Writes everything."""
  tensors = {
    f'{name}.{part}': x.contiguous()
    for name, w in matrices().items()
    for part, x in (nf4(w) | int8(w)).items()
  }
  save_file(tensors, sys.argv[1], {'bitsandbytes': bitsandbytes.__version__})


if __name__ == '__main__':
  main()
