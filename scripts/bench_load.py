"""How fast a model directory loads, and the most memory that it takes.

Writes a Mistral of 7B's widths (hidden 4096, mlp 14336, 32 heads, 8 of keys,
vocabulary 32000) and few layers as bfloat16 safetensors shards of random
numbers, then loads it by `formats.hf.load_params` onto simulated CPU devices,
each mesh in a fresh process:

  python scripts/bench_load.py [--layers 8] [--repeats 3] [--dir DIR] [--keep]
    [--quant nf4]

Beside it, a plain read of the same files in order: once into one buffer, and
once into memory of the files' size, which has to be had for weights as well.
The page cache holds all of them by then: no disk is measured. Every row is the
best of several processes:

  wall s, MB/s    seconds of the clock; bytes of the files over them
  cpu s, MB/s     seconds of all the process's threads; likewise
  start, peak MB  peak resident memory before, which is Python and jax, and
                  after; of several processes the highest

The weights of simulated devices are in the host's memory and so in the peak.
Exits with 1 where a peak is not below 1.25 times the files' size plus 2 GB.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import pathlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lorax_train import parallel
from lorax_train.formats import hf, hf_config, quant_config
from lorax_train.models import params as params_lib

DEVICES = 8
# (data, fsdp, tensor)
MESHES = ((1, 1, 1), (1, 8, 1), (2, 2, 2))
CONFIG = {
  'architectures': ['MistralForCausalLM'],
  'model_type': 'mistral',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'vocab_size': 32000,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
}
SHARD_BYTES = 10**9
BUFFER_BYTES = 16 * 2**20
INDEX = 'model.safetensors.index.json'


class Row(NamedTuple):
  """What one process measured; memory in bytes."""

  wall: float
  cpu: float
  start: int
  peak: int


def limit(size: int) -> float:
  """The bytes that loading `size` bytes may take."""
  return 1.25 * size + 2e9


def files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a directory."""
  return sorted(directory.glob('*.safetensors'))


def make_model(directory: pathlib.Path, layers: int) -> None:
  """Writes the model directory, one shard in memory at a time."""
  config = {**CONFIG, 'num_hidden_layers': layers}
  (directory / 'config.json').write_text(json.dumps(config, indent=2))
  weight_map: dict[str, str] = {}
  shard: dict[str, np.ndarray] = {}

  def write_shard() -> None:
    file = f'model-{len(files(directory)) + 1:05}.safetensors'
    save_file(shard, directory / file, metadata={'format': 'pt'})
    weight_map.update(dict.fromkeys(shard, file))
    shard.clear()

  for name, x in random_tensors(hf_config.config_from_hf(config)):
    if shard and sum(y.nbytes for y in shard.values()) + x.nbytes > SHARD_BYTES:
      write_shard()
    shard[name] = x
  write_shard()
  index = {'metadata': {}, 'weight_map': weight_map}
  (directory / INDEX).write_text(json.dumps(index))


def random_tensors(
  cfg: params_lib.DecoderConfig,
) -> Iterator[tuple[str, np.ndarray]]:
  """Hugging Face names with bfloat16 numbers, layer by layer."""
  rng = np.random.default_rng(0)
  rows = [
    (layer, name, param)
    for param in params_lib.table(cfg)
    for layer, name in enumerate(params_lib.hf_names(cfg, param))
  ]
  for _, name, param in sorted(rows, key=lambda row: row[0]):
    shape = params_lib.shape(cfg, param)[1 if param.stacked else 0 :]
    shape = shape[::-1] if param.linear else shape
    # Any sign and mantissa, exponents of -7 to -4: nothing is not finite.
    bits = rng.integers(0, 2**16, shape, np.uint16)
    bits = bits & 0b1_00000011_1111111 | 0b0_01111000_0000000
    yield name, bits.view(ml_dtypes.bfloat16)


def read(directory: pathlib.Path, keep: bool) -> None:
  """Reads all the files in order; `keep`: into memory of their size."""
  paths = files(directory)
  size = sum(path.stat().st_size for path in paths) if keep else BUFFER_BYTES
  buffer = np.empty(size, np.uint8).data
  begin = 0
  for path in paths:
    with open(path, 'rb', buffering=0) as file:
      while count := file.readinto(buffer[begin : begin + BUFFER_BYTES]):
        begin += count if keep else 0


def measure(work: Callable[[], Any]) -> Row:
  """Does the work, in a process that has done none before."""
  start = peak()
  wall, cpu = time.perf_counter(), time.process_time()
  work()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return Row(wall, cpu, start, peak())


def peak() -> int:
  """The most bytes that this process ever had resident."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_read(directory: pathlib.Path, keep: bool) -> Row:
  """A plain read."""
  return measure(lambda: read(directory, keep))


def measure_load(
  directory: pathlib.Path, sizes: tuple[int, int, int], quant: str = 'none'
) -> Row:
  """A load onto a mesh, jax and its devices being up."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES)
  data, fsdp, tensor = sizes
  devices = jax.devices()[: data * fsdp * tensor]
  mesh = parallel.make_mesh(data, fsdp, tensor, devices)
  cfg = quant_config.as_asked(hf_config.read_config(directory), quant)
  return measure(
    lambda: jax.block_until_ready(
      hf.load_params(directory, cfg, 'bfloat16', mesh)
    )
  )


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
  """What `work(*args)` returns: peaks are those of a whole process."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(work, *args).result()


def best(
  repeats: int, work: Callable[..., Row], directory: pathlib.Path, how: Any
) -> Row:
  """The least seconds and the highest peak of several fresh processes."""
  rows = [in_fresh_process(work, directory, how) for _ in range(repeats)]
  wall, cpu, start, high = zip(*rows, strict=True)
  return Row(min(wall), min(cpu), max(start), max(high))


def run(directory: pathlib.Path, repeats: int, quant: str = 'none') -> bool:
  """Measures everything and prints it; whether every peak is in its limit."""
  size = sum(path.stat().st_size for path in files(directory))
  in_fresh_process(measure_read, directory, False)  # into the page cache
  rows = {
    'read': best(repeats, measure_read, directory, False),
    'read and keep': best(repeats, measure_read, directory, True),
  }
  for sizes in MESHES:
    load = functools.partial(measure_load, quant=quant)
    rows[f'load {sizes}'] = best(repeats, load, directory, sizes)
  print(
    f'{len(files(directory))} files of {size / 1e6:.0f} MB together, jax'
    f' {jax.__version__}, {DEVICES} simulated devices, best of {repeats}\n\n'
    '(data, fsdp, tensor)  wall s   MB/s   cpu s   MB/s  start MB  peak MB'
  )
  for name, row in rows.items():
    print(
      f'{name:20}{row.wall:8.2f}{size / 1e6 / row.wall:7.0f}'
      f'{row.cpu:8.2f}{size / 1e6 / row.cpu:7.0f}'
      f'{row.start / 1e6:10.0f}{row.peak / 1e6:9.0f}'
    )
  most = max(row.peak for row in rows.values())
  fits = most < limit(size)
  print(
    f'\nhighest peak {most / 1e6:.0f} MB, {"below" if fits else "NOT below"}'
    f' 1.25 times the size plus 2 GB: {limit(size) / 1e6:.0f} MB'
  )
  return fits


def main() -> None:
  """Makes the model where it isn't yet, measures, and takes it away again."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument(
    '--dir', help='the model is made in a new directory in this one'
  )
  parser.add_argument(
    '--keep', action='store_true', help='leave the model for a next run'
  )
  parser.add_argument(
    '--quant', default='none', help='quantise while loading: nf4 or int8'
  )
  args = parser.parse_args()
  where = pathlib.Path(args.dir or tempfile.gettempdir())
  directory = where / f'bench_load-{args.layers}-layers'
  try:
    if not (directory / INDEX).is_file():
      shutil.rmtree(directory, ignore_errors=True)  # of a run that was ended
      directory.mkdir(parents=True)
      in_fresh_process(make_model, directory, args.layers)
    fits = run(directory, args.repeats, args.quant)
  finally:
    if not args.keep:
      shutil.rmtree(directory, ignore_errors=True)
  sys.exit(not fits)


if __name__ == '__main__':
  main()
