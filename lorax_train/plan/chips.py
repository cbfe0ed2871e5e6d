"""Slices and cards by their names, and the devices at hand."""

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax_train.errors import ConfigError
from lorax_train.hardware import CHIPS, Chip, fraction, of_kind

_ALIASES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'trillium': 'v6e', 'v7x': 'tpu7x', 'ironwood': 'tpu7x', 'a100': 'a100-80', '3090': 'rtx3090', '4090': 'rtx4090'}  # fmt: skip
# Shapes that a slice of so many chips is had in.
_TORUS_2D = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}  # fmt: skip
_TORUS_3D = {1: '1x1x1', 4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8', 1024: '8x8x16'}  # fmt: skip


class Topology(NamedTuple):
  """Devices that a run would have.

  Attributes:
    name: as the user, or jax, calls it.
    platform: tpu, gpu or cpu.
    chip: what is known of a chip; None of a CPU, or where we know nothing.
    chips: how many.
    devices: how many jax sees.
    limit: bytes that a program may have on a device; None where nobody knows.
    shape: of a TPU slice, '4x4'.
  """

  name: str
  platform: str
  chip: Chip | None
  chips: int
  devices: int
  limit: int | None
  shape: str = ''

  @property
  def link_bandwidth(self) -> float:
    """Bytes a second that a chip receives from others: the slowest way."""
    assert self.chip is not None
    beyond = self.chips > self.chip.per_host and self.chip.network_bandwidth
    return beyond or self.chip.link_bandwidth


def topology(name: str) -> Topology:
  """'v5e-16', 'v5litepod-16', 'v5e:4x4', 'v5p-64', 'h100-8', 'a100-40' ...

  Names of v4, v5p and tpu7x count cores, two a chip, as those who rent them
  out do: v5p-64 has 32 chips. A shape counts chips: v5p:2x4x4 is the same.

  Raises:
    ConfigError: no such chip, or no slice of that size.

  >>> topology('v5p-64').chips, topology('a100-40-8').chips
  (32, 8)
  """
  given = name.strip().lower().replace('_', '-')
  kind = _chip_name(given)
  if kind is None:
    raise ConfigError(
      f'topology {name!r}: no such chip; there are: {", ".join(CHIPS)}, as in'
      ' v5e-16, v5e:4x4, h100-8'
    )
  used, chip_name = kind
  chip, rest = CHIPS[chip_name], given[len(used) :]
  shape = ''
  if match := re.fullmatch(r'[-:](\d+(?:x\d+)+)', rest):
    shape = match[1]
    chips = math.prod(map(int, shape.split('x')))
  elif match := re.fullmatch(r'(?:gb)?(?:-(\d+))?', rest):
    chips = int(match[1] or (2 if chip.counts_cores else 1))
    if chip.counts_cores:
      chips, odd = divmod(chips, 2)
      chips = 0 if odd else chips
  else:
    chips = 0
  if chip.platform == 'tpu' and not shape:
    shapes = _TORUS_3D if chip.counts_cores else _TORUS_2D
    shape = shapes.get(chips, '')
    if not shape:
      cores = 2 if chip.counts_cores else 1
      names = ', '.join(f'{chip_name}-{cores * n}' for n in shapes)
      raise ConfigError(
        f'topology {name!r}: no slice of that size; there are: {names}, or'
        f' give its shape, as in {chip_name}:{shapes[4]}'
      )
  if chips < 1 or (chip.platform == 'gpu' and shape):
    raise ConfigError(
      f'topology {name!r}: {chip_name} is followed by how many, as in'
      f' {chip_name}-8'
    )
  limit = int(chip.hbm * fraction()) if chip.platform == 'gpu' else chip.hbm
  return Topology(
    name,
    chip.platform,
    chip,
    chips,
    chips * chip.devices,
    limit // chip.devices,
    shape,
  )


def _chip_name(given: str) -> tuple[str, str] | None:
  """The longest name of a chip that it begins with, and what we call it."""
  names = {**{n: n for n in CHIPS}, **_ALIASES}
  found = [n for n in names if re.match(rf'{re.escape(n)}(?!\d)', given)]
  return (best := max(found, key=len), names[best]) if found else None


def here(devices: Sequence[Any], own: Sequence[Any]) -> Topology:
  """The devices at hand, of which jax says what a program may have.

  Args:
    devices: all.
    own: those of this process.
  """
  first = own[0]
  chip = of_kind(first.device_kind)
  limit = (first.memory_stats() or {}).get('bytes_limit')
  if first.platform == 'cpu':
    available = available_memory()
    limit = available and available // len(own)
  elif limit is None and chip is not None:
    limit = chip.hbm // chip.devices
  chips = len(devices) // (chip.devices if chip else 1)
  return Topology(
    f'{len(devices)} x {first.device_kind}',
    first.platform,
    chip,
    chips,
    len(devices),
    limit,
  )


def available_memory() -> int | None:
  """Bytes that this machine, or our share of it, has left; None: unknown."""
  found = []
  with contextlib.suppress(OSError, ValueError):
    with open('/proc/meminfo', encoding='ascii') as file:
      lines = dict(line.split(':', 1) for line in file)
    found.append(int(lines['MemAvailable'].split()[0]) * 1024)
  with contextlib.suppress(OSError, ValueError):
    own = Path('/sys/fs/cgroup')
    most = int((own / 'memory.max').read_text())
    # What is but a copy of a file is given back when asked for.
    rows = (own / 'memory.stat').read_text().splitlines()
    of_files = next(int(r.split()[1]) for r in rows if r.startswith('inactive_file '))  # fmt: skip
    used = int((own / 'memory.current').read_text()) - of_files
    found.append(most - used)
  return min(found, default=None)
