"""Names of slices: how many chips and devices each has, by Google's own tables.

Reference: accelerator types and shapes in the documentation of each TPU version,
and what the compiler says that a program may have.
"""

import pytest

from lorax_train import hardware
from lorax_train.errors import ConfigError
from lorax_train.plan import chips

# name, chips, devices, shape, GiB a device.
NAMES = [
  ('v5e-1', 1, 1, '1x1', 15.75),
  ('v5e-16', 16, 16, '4x4', 15.75),
  ('v5litepod-16', 16, 16, '4x4', 15.75),
  ('v5e:4x4', 16, 16, '4x4', 15.75),
  ('V5E-256', 256, 256, '16x16', 15.75),
  ('v6e-8', 8, 8, '2x4', 31.24),
  ('v5p-8', 4, 4, '2x2x1', 95.73),
  ('v5p-64', 32, 32, '2x4x4', 95.73),
  ('v5p:2x4x4', 32, 32, '2x4x4', 95.73),
  ('v4-32', 16, 16, '2x2x4', 30.75),
  ('tpu7x-8', 4, 8, '2x2x1', 94.74),
  ('tpu7x:2x2x1', 4, 8, '2x2x1', 94.74),
  ('h100-8', 8, 8, '', 79.1 * 0.92),
  ('h100', 1, 1, '', 79.1 * 0.92),
  ('h100-pcie-2', 2, 2, '', 79.1 * 0.92),
  ('h200-1', 1, 1, '', 139.8 * 0.92),
  ('a100-8', 8, 8, '', 79.2 * 0.92),
  ('a100-80gb-8', 8, 8, '', 79.2 * 0.92),
  ('a100_40-2', 2, 2, '', 39.4 * 0.92),
  ('b200-8', 8, 8, '', 178.4 * 0.92),
  ('4090', 1, 1, '', 23.5 * 0.92),
  ('rtx4090-2', 2, 2, '', 23.5 * 0.92),
]


@pytest.fixture(autouse=True)
def no_fraction(monkeypatch):
  for name in hardware.SHARES:
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(('name', 'n', 'devices', 'shape', 'gib'), NAMES)
def test_a_name_says(name, n, devices, shape, gib):
  found = chips.topology(name)
  assert (found.chips, found.devices, found.shape) == (n, devices, shape)
  assert found.limit == pytest.approx(gib * hardware.GIB, rel=1e-6)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('', 'no such chip'),
    ('v9-8', 'no such chip; there are: v4'),
    ('v5', 'no such chip'),
    ('h1000-8', 'no such chip'),
    ('v5e-12', 'no slice of that size; there are: v5e-1, v5e-4'),
    ('v5p-7', 'no slice of that size; there are: v5p-2, v5p-8'),
    ('v5e-0', 'no slice of that size'),
    ('h100-0', 'followed by how many, as in h100-8'),
    ('h100:2x2', 'followed by how many'),
    ('h100-many', 'followed by how many'),
  ],
)
def test_what_is_no_name_is_said_in_a_line(name, words):
  with pytest.raises(ConfigError, match=words) as error:
    chips.topology(name)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('given', 'part'), [('0.95', 0.95), ('nonsense', 0.92)]
)
def test_a_gpu_gives_what_jax_is_told_to_take(monkeypatch, given, part):
  monkeypatch.setenv(hardware.SHARES[0], given)
  h100 = hardware.CHIPS['h100']
  assert chips.topology('h100-1').limit == int(h100.hbm * part)
  assert chips.topology('v5e-1').limit == hardware.CHIPS['v5e'].hbm


class Device:
  def __init__(self, platform, device_kind, limit=None):
    self.platform, self.device_kind, self.limit = platform, device_kind, limit

  def memory_stats(self):
    return self.limit and {'bytes_limit': self.limit}


@pytest.mark.parametrize(
  ('platform', 'kind', 'chip'),
  [
    ('tpu', 'TPU v5 lite', 'v5e'),
    ('tpu', 'TPU v5', 'v5p'),
    ('tpu', 'TPU v6 lite', 'v6e'),
    ('tpu', 'TPU v4', 'v4'),
    ('tpu', 'TPU7x', 'tpu7x'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'h100'),
    ('gpu', 'NVIDIA A100-SXM4-40GB', 'a100-40'),
    ('gpu', 'NVIDIA A100-SXM4-80GB', 'a100-80'),
    ('gpu', 'NVIDIA H100 PCIe', 'h100-pcie'),
    ('gpu', 'NVIDIA GeForce RTX 4090', 'rtx4090'),
    # Parts of a card, and cards that only sound alike.
    ('gpu', 'NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
    ('gpu', 'NVIDIA GH200 480GB', None),
    ('gpu', 'some other card', None),
  ],
)
def test_devices_at_hand_are_known_by_their_kind(platform, kind, chip):
  devices = [Device(platform, kind, 1000)] * 4
  found = chips.here(devices, devices[:2])
  assert found.chip is (hardware.CHIPS[chip] if chip else None)
  assert (found.devices, found.limit) == (4, 1000)


def test_the_memory_of_a_machine_is_shared_by_its_cpu_devices(monkeypatch):
  monkeypatch.setattr(chips, 'available_memory', lambda: 8000)
  devices = [Device('cpu', 'cpu')] * 8
  assert chips.here(devices, devices).limit == 1000
  monkeypatch.setattr(chips, 'available_memory', lambda: None)
  assert chips.here(devices, devices).limit is None


def test_hosts_are_joined_by_a_network():
  one, two = chips.topology('h100-8'), chips.topology('h100-16')
  assert one.link_bandwidth == 450e9
  assert two.link_bandwidth == 50e9
  slice_ = chips.topology('v5e-256')
  assert slice_.link_bandwidth == slice_.chip.link_bandwidth
