"""What packing is worth on a CPU: useful tokens a second of a train step.

  python scripts/bench_packing.py [--model DIR] [--data FILE] [--steps 30]

Trains the adapters of a small model on the same rows laid out in three ways,
each in batches of 8 and in the run's own order:

  packed             several rows in each pack of 512 tokens
  padded             one row in 512 tokens
  padded to longest  one row in as many tokens as the longest of its batch has,
                     rounded up to a multiple of 64

A step is taken in each way by turns, until each has taken so many. Seconds are
those of the CPU, all threads of the process together; compilation is not in
them. Useful tokens are those of rows, padding not counted.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorax_train import config, parallel
from lorax_train.data import batches
from lorax_train.formats import hf, hf_config
from lorax_train.train import optim, setup
from lorax_train.train import rows as rows_lib
from lorax_train.train import step as step_lib

SHARED = Path(__file__).parents[1].parent / 'shared'
LENGTH = 512
MULTIPLE = 64
Batch = dict[str, Any]


class Row(NamedTuple):
  """What the steps of one way came to."""

  useful: int
  tokens: int
  cpu: float


def make_config(model: str, data: str, packing: bool) -> config.TrainConfig:
  """A float32 run of all-linear adapters."""
  mapping = config.defaults()
  mapping['model'].update(
    path=model, dtype='float32', param_dtype='float32', remat='none'
  )
  mapping['lora'].update(targets='all-linear')
  mapping['data'].update(path=data, max_length=LENGTH, packing=packing)
  mapping['eval'].update(rows=0)
  return config.from_mapping(mapping)


def measure(model: str, data: str, steps: int) -> tuple[dict[str, Row], str]:
  """(the way's name -> what it came to, what became of the rows)."""
  cfg = make_config(model, data, packing=True)
  flat = make_config(model, data, packing=False)
  model_cfg = hf_config.read_config(Path(model))
  adapters = setup.plan_adapters(cfg, model_cfg)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  rows = setup.read_rows(cfg, Path(model), model_cfg)
  one_each = setup.read_rows(flat, Path(model), model_cfg)
  one_each = one_each._replace(length=LENGTH)
  tx = optim.make_optimizer(setup.optim_config(cfg))

  def longest(step: int) -> tuple[Batch, int]:
    n_rows, n_batch = len(rows.train_rows), flat.train.batch_size
    chosen = batches.rows_at(step, n_rows, n_batch, flat.train.seed)
    ids = [rows.train_set.ids[i] for i in rows.train_rows[chosen]]
    length = -(-max(map(len, ids)) // MULTIPLE) * MULTIPLE
    return one_each._replace(length=length).batch(flat, mesh, step)

  ways: dict[str, Callable[[int], tuple[Batch, int]]] = {
    f'packed to {LENGTH}': functools.partial(rows.batch, cfg, mesh),
    f'padded to {LENGTH}': functools.partial(one_each.batch, flat, mesh),
    'padded to longest': longest,
  }
  with jax.set_mesh(mesh):
    params = hf.load_params(Path(model), model_cfg, 'float32', mesh)
    frozen, trainable = setup.split(cfg, params, adapters)
    states = {
      name: setup.init_state(tx, frozen, trainable, mesh)[0] for name in ways
    }
    step = jax.jit(
      step_lib.make_train_step(setup.make_apply(cfg, model_cfg), tx)
    )
    compiled: dict[Any, Any] = {}
    found = dict.fromkeys(ways, Row(0, 0, 0.0))
    for at in range(steps):
      for name, batch_at in ways.items():
        batch, useful = batch_at(at)
        shape = len(batch), batch['ids'].shape
        if shape not in compiled:
          compiled[shape] = step.lower(states[name], frozen, batch).compile()
          jax.block_until_ready(compiled[shape](states[name], frozen, batch))
        began = time.process_time()
        states[name], _ = compiled[shape](states[name], frozen, batch)
        jax.block_until_ready(states[name])
        cpu = time.process_time() - began
        so_far = found[name]
        found[name] = Row(
          so_far.useful + useful,
          so_far.tokens + batch['ids'].size,
          so_far.cpu + cpu,
        )
  return found, rows_lib.summary(rows)


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--model', default=str(SHARED / 'models' / 'stories260K-mistral')
  )
  parser.add_argument(
    '--data', default=str(SHARED / 'data' / 'alpaca_gpt4_999.json')
  )
  parser.add_argument('--steps', type=int, default=30)
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  found, summary = measure(args.model, args.data, args.steps)
  print(f'{summary}\njax {jax.__version__}, {args.steps} steps of each\n')
  print('way                   padding %   CPU s a step   useful tokens/CPU s')
  first = next(iter(found.values()))
  for name, row in found.items():
    rate = row.useful / row.cpu
    print(
      f'{name:20}{100 * (1 - row.useful / row.tokens):11.1f}'
      f'{row.cpu / args.steps:15.3f}{rate:15,.0f}'
      f'   packed is {first.useful / first.cpu / rate:.2f} x'
    )


if __name__ == '__main__':
  main()
