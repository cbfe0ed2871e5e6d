"""What scripts/bench.py measures: models and cases.

A case is a row of CASES and nothing else: bench.py reads its fields, so a new
kind of run is a new row. Within a platform the first rows are worth most.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lorax_train.models import remat as remat_lib
from lorax_train.models.params import DecoderConfig, RopeScaling

MODELS = {
  'tiny': DecoderConfig(256, 64, 2, 4, 2, 16, 160),
  '175m': DecoderConfig(32000, 1024, 8, 16, 4, 64, 3584),
  'tinyllama-1.1b': DecoderConfig(32000, 2048, 22, 32, 4, 64, 5632),
  'mistral-7b': DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336, window=4096),
  'llama-3.1-8b': DecoderConfig(
    128256, 4096, 32, 32, 8, 128, 14336,
    rope_theta=500000.0, rope_scaling=RopeScaling('llama3', 8.0),
  ),
}  # fmt: skip


class Case(NamedTuple):
  """A train step to be timed.

  Attributes:
    name: what --case takes.
    platform: 'cpu', 'gpu' or 'tpu'.
    model: of MODELS.
    batch: rows of a micro-batch, over all devices.
    length: tokens of a row.
    packed: a row is several, side by side, none of which sees another.
    grad_accum: micro-batches of a step.
    rank: r.
    targets: as `lora.targets`.
    dtype: of the frozen weights and of the layers' arithmetic; factors are
      float32.
    remat: as `model.remat`.
    attention: as `model.attention`.
    loss_chunk: as `train.loss_chunk`.
    devices: how many it runs on.
    mesh: data, fsdp, tensor.
    pieces: forward, backward and optimizer are timed apart as well.
  """

  name: str
  platform: str
  model: str
  batch: int
  length: int
  packed: bool = True
  grad_accum: int = 1
  rank: int = 16
  targets: str = 'all-linear'
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'
  loss_chunk: int = 0
  devices: int = 1
  mesh: tuple[int, int, int] = (1, -1, 1)
  pieces: bool = False


def _cpu() -> Iterable[Case]:
  """The fixed workload that trainers were compared by on a CPU; a toy."""
  for dtype, short in (('float32', 'f32'), ('bfloat16', 'bf16')):
    base = Case(
      f'cpu-175m-{short}', 'cpu', '175m', 1, 512,
      packed=False, grad_accum=4, dtype=dtype,
    )  # fmt: skip
    yield base
    yield base._replace(name=f'{base.name}-whole', batch=4, grad_accum=1)
  tiny = Case('cpu-tiny', 'cpu', 'tiny', 8, 128, dtype='float32', rank=4)
  yield tiny._replace(pieces=True)
  yield tiny._replace(name='cpu-tiny-mesh', devices=8, mesh=(2, 2, 2))


def _gpu() -> Iterable[Case]:
  """Mistral-7B on one card, 4,096 tokens a row, and on eight.

  What autodiff keeps by itself ('none') is too much for 80 GB at 8,192 tokens;
  'dots' makes no product twice either.
  """
  ladder = {
    (rows, remat): Case(
      f'gpu-7b-b{rows}-{remat}', 'gpu', 'mistral-7b', rows, 4096, remat=remat
    )
    for remat in remat_lib.POLICIES[::-1]
    for rows in (4, 2, 1)
  }
  base = ladder.pop((4, 'dots'))
  yield base
  yield base._replace(name='gpu-7b-b4-dots-unpacked', packed=False)
  # As the fastest LoRA run that is published for an H100 was set up, see
  # docs/benchmarks.md: rows without packs.
  yield base._replace(
    name='gpu-8b-b2-dots', model='llama-3.1-8b', batch=2, packed=False,
    grad_accum=4,
  )  # fmt: skip
  yield ladder.pop((4, 'full'))
  yield base._replace(
    name='gpu-7b-qv-r64-b4-dots', rank=64, targets='q_proj,v_proj'
  )
  yield base._replace(name='gpu-7b-b2-dots-pieces', batch=2, pieces=True)
  yield base._replace(
    name='gpu-7b-32k-full', batch=1, length=32768, remat='full'
  )
  yield from ladder.values()
  for remat in ('dots', 'full'):
    yield base._replace(
      name=f'gpu8-7b-b16-{remat}', batch=16, devices=8, remat=remat
    )


def _tpu() -> Iterable[Case]:
  """Mistral-7B over a slice; a model that one chip of 16 GB holds."""
  base = Case('', 'tpu', 'mistral-7b', 16, 4096, remat='full')
  for chips, rows in ((4, 4), (8, 8), (16, 16), (64, 64), (256, 256)):
    yield base._replace(name=f'tpu{chips}-7b-full', batch=rows, devices=chips)
  yield base._replace(name='tpu16-7b-32k-full', length=32768, devices=16)
  small = base._replace(model='tinyllama-1.1b', batch=4, length=2048)
  for remat in ('full', 'none'):
    yield small._replace(name=f'tpu-1b-{remat}', remat=remat)


CASES = {case.name: case for of in (_cpu, _gpu, _tpu) for case in of()}
