"""What a chip is: memory, peak, bandwidths; and what part of it a run takes.

Figures are the makers' own and say what is possible at best:

  v4, v5e, v5p, v6e, tpu7x   Google Cloud's documentation of each TPU version
  h100, h200, b200, a100 ... NVIDIA's data sheets, dense, without sparsity; the
                             RTX 4090's peak by the whitepaper of its generation

of each a peak in bfloat16 with sums in float32, the bandwidth of the memory, and
what a chip can receive from the others at a time: half of the bidirectional
bandwidth that the makers state. Memory of a TPU is what its compiler lets a program
have, as it says where one does not fit (libtpu 0.0.50.1); of a GPU, about what the
driver reports, of which a run takes its part (`take_memory`).
"""

import os
from typing import NamedTuple

GIB = 1 << 30

# Environment variables that say what part of a GPU's memory jax takes, the second by
# its old name; and what a run takes where they say nothing, for jax's 0.75.
SHARES = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
SHARE = 0.92


class Chip(NamedTuple):
  """One accelerator.

  Attributes:
    platform: tpu, gpu or cpu, as jax names it.
    hbm: bytes that programs of one chip may have.
    flops: peak a second in bfloat16.
    hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that a chip receives from others of its
      slice, or of its host.
    devices: devices that jax sees in a chip; each has its part of the above.
    per_host: chips of a host.
    network_bandwidth: bytes a second that a chip receives from other hosts,
      where the links end there; 0 where they don't.
    counts_cores: names of slices count cores, two a chip.
    topology: prefix of the names of its slices for the compiler.
  """

  platform: str
  hbm: int
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  devices: int = 1
  per_host: int = 8
  network_bandwidth: float = 0.0
  counts_cores: bool = False
  topology: str = ''


def _tpu(gib, tera, hbm, link, name, **more) -> Chip:
  memory = int(gib * GIB)
  return Chip('tpu', memory, tera * 1e12, hbm * 1e9, link * 1e9 / 2, topology=name, **more)  # fmt: skip


def _gpu(gib, tera, hbm, link, network=0.0) -> Chip:
  memory = int(gib * GIB)
  return Chip('gpu', memory, tera * 1e12, hbm * 1e9, link * 1e9 / 2, network_bandwidth=network * 1e9)  # fmt: skip


# GiB, TFLOP/s, GB/s of memory, GB/s of links (both directions).
CHIPS = {
  'v4': _tpu(30.75, 275, 1200, 300, 'v4', per_host=4, counts_cores=True),
  'v5e': _tpu(15.75, 197, 819, 400, 'v5e', per_host=8),
  'v5p': _tpu(95.73, 459, 2765, 1200, 'v5p', per_host=4, counts_cores=True),
  'v6e': _tpu(31.24, 918, 1638, 800, 'v6e', per_host=8),
  'tpu7x': _tpu(
    189.48, 2307, 7380, 1200, 'tpu7x', devices=2, per_host=4, counts_cores=True
  ),
  'a100-40': _gpu(39.4, 312, 1555, 600, 25),
  'a100-80': _gpu(79.2, 312, 2039, 600, 25),
  'h100': _gpu(79.1, 989.4, 3350, 900, 50),
  'h100-nvl': _gpu(93.1, 835, 3900, 600, 50),
  'h100-pcie': _gpu(79.1, 756, 2000, 600, 50),
  'h200': _gpu(139.8, 989.4, 4800, 900, 50),
  'b200': _gpu(178.4, 2250, 8000, 1800, 50),
  'l4': _gpu(22.0, 121, 300, 64),
  'l40s': _gpu(44.5, 362, 864, 64),
  'rtx3090': _gpu(23.6, 71, 936, 64),
  'rtx4090': _gpu(23.5, 165.2, 1008, 64),
}

# As jax calls the devices. A part of a card (MIG) has a name of its own, and another
# peak.
_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7x': 'tpu7x',
  'NVIDIA A100-SXM4-40GB': 'a100-40',
  'NVIDIA A100-PCIE-40GB': 'a100-40',
  'NVIDIA A100-SXM4-80GB': 'a100-80',
  'NVIDIA A100 80GB PCIe': 'a100-80',
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H100 NVL': 'h100-nvl',
  'NVIDIA H100 PCIe': 'h100-pcie',
  'NVIDIA H200': 'h200',
  'NVIDIA B200': 'b200',
  'NVIDIA L4': 'l4',
  'NVIDIA L40S': 'l40s',
  'NVIDIA GeForce RTX 3090': 'rtx3090',
  'NVIDIA GeForce RTX 4090': 'rtx4090',
}


def of_kind(device_kind: str) -> Chip | None:
  """What jax calls a device of that kind; None where nothing is known."""
  name = _KINDS.get(device_kind)
  return CHIPS[name] if name else None


def fraction() -> float:
  """What part of a GPU's memory a run takes."""
  given = (os.environ.get(name) for name in SHARES)
  try:
    return float(next(filter(None, given), SHARE))
  except ValueError:
    return SHARE


def take_memory() -> None:
  """Lets jax have nearly all of a GPU, where the user has not said how much."""
  if not any(os.environ.get(name) for name in SHARES):
    os.environ[SHARES[0]] = str(SHARE)
