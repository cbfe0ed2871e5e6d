"""The step, compiled for devices that nobody has here.

XLA compiles for a TPU where libtpu is installed, and for a GPU where jax's CUDA
plugin is; neither needs the device. A TPU's compiler refuses what does not fit,
a GPU's never does: there the bytes are compared with the card.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lorax_train import parallel
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError
from lorax_train.formats import quantised
from lorax_train.hardware import CHIPS
from lorax_train.plan import hlo, shapes
from lorax_train.plan.chips import Topology
from lorax_train.train import setup

# What XLA knows of a GPU that is not there; the rest follows from its kind.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""

# Compute capability, multiprocessors, GHz, bytes of L2, shared bytes of a
# multiprocessor and of a block, threads and FP32 units of a multiprocessor:
# NVIDIA's data sheets and CUDA's table of compute capabilities.
_GPUS = {
  'h100': ((9, 0), 132, 1.98, 52428800, 233472, 232448, 2048, 128),
  'h200': ((9, 0), 132, 1.98, 52428800, 233472, 232448, 2048, 128),
  'a100-40': ((8, 0), 108, 1.41, 41943040, 167936, 166912, 2048, 64),
  'a100-80': ((8, 0), 108, 1.41, 41943040, 167936, 166912, 2048, 64),
  'l40s': ((8, 9), 142, 2.52, 100663296, 102400, 101376, 1536, 128),
  'rtx4090': ((8, 9), 128, 2.52, 75497472, 102400, 101376, 1536, 128),
  'rtx3090': ((8, 6), 82, 1.7, 6291456, 102400, 101376, 1536, 128),
}


class Compiled(NamedTuple):
  """What the compiler says of a step.

  Attributes:
    fits: whether it lets the program be, or the card would hold it.
    peak: bytes of a device; None where it refused.
    refusal: in its words.
    collectives: each, of the program.
    kernels: {custom call: how often}.
    weight_gradients: shapes of frozen weights that some sum over tokens has, which
      a gradient of one would be; None where a product of rows would look so too.
  """

  fits: bool
  peak: int | None
  refusal: str
  collectives: list[hlo.Collective]
  kernels: dict[str, int]
  weight_gradients: set[tuple[int, ...]] | None


def missing(topology: Topology) -> str:
  """Why nothing can be compiled for it here; '' where it can."""
  if topology.platform == 'tpu':
    there = importlib.util.find_spec('libtpu') is not None
    return '' if there else 'libtpu is missing (pip install "jax[tpu]")'
  if topology.platform == 'gpu':
    if _gpu(topology) is None:
      return 'what XLA must be told of that card is not known here'
    plugins = (f'jax_cuda{n}_plugin' for n in (12, 13))
    there = any(map(importlib.util.find_spec, plugins))
    return (
      '' if there else 'CUDA for jax is missing (pip install "jax[cuda12]")'
    )
  return '' if topology.platform == 'cpu' else 'for such devices nobody tried'


def devices_of(topology: Topology) -> list[jax.Device]:
  """Devices to compile for. What the environment asks for must be set before."""
  chip = topology.chip
  if topology.platform == 'tpu' and chip is not None:
    # Two processes that only compile may both hold the compiler.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    options = {}
    if chip.topology == 'v4':
      options['chip_config_name'] = 'megacore'  # one device a chip
    return topologies.get_topology_desc(
      f'{chip.topology}:{topology.shape}', 'tpu', **options
    ).devices
  gpu = _gpu(topology)
  if gpu is None or chip is None:
    return jax.devices()
  hosts = -(-topology.chips // chip.per_host)
  (major, minor), cores, clock, l2, core, block, threads, fpus = gpu
  return topologies.get_topology_desc(
    '',
    'cuda',
    topology=f'1x{hosts}x{topology.chips // hosts}',
    target_config=_TARGET.format(
      shared_core=core,
      shared_block=block,
      threads=threads,
      fpus=fpus,
      cores=cores,
      bandwidth=int(chip.hbm_bandwidth),
      l2=l2,
      clock=clock,
      memory=chip.hbm,
      major=major,
      minor=minor,
      name=topology.name,
    ),
  ).devices


def _gpu(topology: Topology) -> Any:
  names = [n for n, chip in CHIPS.items() if chip is topology.chip]
  return _GPUS.get(names[0]) if names else None


def compile_step(
  cfg: TrainConfig,
  adapters: setup.Adapters,
  topology: Topology,
  length: int,
) -> tuple[Compiled, str]:
  """What the compiler makes of a run's step, and its program as text.

  Raises:
    ConfigError: the mesh does not fit the devices.
  """
  sizes = cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor
  try:
    mesh = parallel.make_mesh(*sizes, devices=devices_of(topology))
  except ValueError as error:
    raise ConfigError(str(error)) from None
  platform = {'gpu': 'cuda'}.get(topology.platform, topology.platform)
  given = shapes.shapes_of(cfg, adapters, mesh, length)
  kernel = setup.attention_kernel(cfg, given.model_cfg, topology.platform)
  step = shapes.traced(cfg, given, mesh, kernel)
  try:
    with jax.set_mesh(mesh):
      done = step.lower(lowering_platforms=(platform,)).compile()
  except jax.errors.JaxRuntimeError as error:
    words = str(error)
    if 'RESOURCE_EXHAUSTED' not in words:
      raise
    return Compiled(False, None, _refusal(words), [], {}, None), ''
  text = done.as_text() or ''
  peak = peak_of(done.memory_analysis(), topology.platform)
  return Compiled(
    topology.limit is None or peak <= topology.limit,
    peak,
    '',
    hlo.collectives(text),
    hlo.kernels(text),
    _weight_gradients(text, given, mesh),
  ), text


def peak_of(found: Any, platform: str) -> int:
  """Bytes of a device by XLA's own account.

  On TPU its peak tracks the limit. Elsewhere arguments and temporary buffers
  are what is allocated.
  """
  if platform == 'tpu':
    return found.peak_memory_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes


def _refusal(words: str) -> str:
  line = next((x for x in words.splitlines() if 'HBM' in x), words)
  return re.sub(r'^RESOURCE_EXHAUSTED: (E\d+: )?', '', line)[:300]


def _weight_gradients(
  text: str, given: shapes.Shapes, mesh: jax.sharding.Mesh
) -> set[tuple[int, ...]] | None:
  ids = given.batch['ids']
  *rows_of, length = ids.sharding.shard_shape(ids.shape)[1:]
  rows = math.prod(rows_of)
  wanted = {
    leaf.shape[-2:]
    for leaf in quantised.weights(given.frozen)
    if len(leaf.shape) in (2, 3) and min(leaf.shape[-2:]) > 64
  }
  taken = {rows * length, rows, length}
  clear = {shape for shape in wanted if not taken & {*shape}}
  if clear != wanted:
    return None
  # A gradient of a weight is a sum over tokens.
  return hlo.products_of_shape(text, clear, {rows * length, length})
