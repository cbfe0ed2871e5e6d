"""What packing is worth: useful tokens a second, or a FLOP, of a train step.

  python scripts/bench_packing.py [--length 512] [--steps 10]
  python scripts/bench_packing.py --count [--length 2048]

The same rows (Alpaca's, by Mistral's v1 tokenizer) laid out in four ways, each in
batches of 8 and in the run's own order:

  packed             several rows in each pack of --length tokens
  padded             one row in --length tokens
  padded to longest  one row in as many tokens as the longest of its batch has,
                     rounded up to a multiple of 64
  in buckets         data.buckets: --length, its half, and so on down to 64

Without --count a small model with random weights is trained: a step in each way
by turns. Seconds are those of the CPU, all threads of the process together, and
none of them is compilation. With --count nothing is trained: the products of a
step of Mistral-7B's shape (rank 64 on q_proj and v_proj, nothing recomputed) are
counted, those of attention with what it masks. Useful tokens are those of rows,
padding not counted.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train import config, parallel
from lorax_train.data import prepare, tokenize
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig
from lorax_train.plan.flops import flops
from lorax_train.train import optim, setup
from lorax_train.train import rows as rows_lib
from lorax_train.train import step as step_lib
from lorax_train.train.rows import Rows

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'
MULTIPLE = 64
Batch = dict[str, Any]

SMALL = DecoderConfig(32000, 256, 4, 8, 4, 32, 768)
MISTRAL_7B = DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336)


class Total(NamedTuple):
  """What the steps of one way came to; cost is CPU seconds, or FLOPs."""

  useful: int = 0
  tokens: int = 0
  cost: float = 0.0


def make_config(length: int, targets: str, **data: Any) -> config.TrainConfig:
  """A run of batches of 8 rows of at most so many tokens."""
  mapping = config.defaults()
  mapping['model'].update(
    path='.', dtype='float32', param_dtype='float32', remat='none'
  )
  mapping['lora'].update(targets=targets, rank=64)
  mapping['data'].update(path='.', max_length=length, **data)
  mapping['eval'].update(rows=0)
  return config.from_mapping(mapping)


def ways(
  path: str, tokenizer_dir: str, length: int, targets: str
) -> tuple[config.TrainConfig, dict[str, Callable[[int], tuple[Batch, int]]]]:
  """A run, and the batch of a step and its useful tokens for each way."""
  tokenizer = tokenize.load_tokenizer(tokenizer_dir)
  options = prepare.Options(length)
  rows = prepare.prepare(path, 'alpaca', tokenizer, options)
  print(rows.report.summary())

  def batches(**data: Any) -> tuple[Rows, config.TrainConfig]:
    cfg = make_config(length, targets, **data)
    return rows_lib.arrange(cfg, [rows], None, tokenizer), cfg

  def take(arranged: Rows, cfg: config.TrainConfig, step: int):
    items, _ = arranged.items_at(cfg, step)
    useful = int(arranged.tokens[items[items >= 0]].sum())
    return arranged.part(cfg, step, np.arange(items.shape[1])), useful

  plain, cfg = batches()
  plain = plain._replace(length=length)

  def longest(step: int):
    items, _ = plain.items_at(cfg, step)
    own = -(-int(plain.tokens[items].max()) // MULTIPLE) * MULTIPLE
    return take(plain._replace(length=own), cfg, step)

  bounds = [length >> n for n in range(16) if length >> n >= MULTIPLE]
  packed = batches(packing=True)
  bucketed = batches(buckets=','.join(map(str, bounds)))
  for arranged, _ in (packed, bucketed):
    print(rows_lib.summary(arranged).rpartition('; ')[2])
  return cfg, {
    f'packed to {length}': lambda step: take(*packed, step),
    f'padded to {length}': lambda step: take(plain, cfg, step),
    'padded to longest': longest,
    'in buckets': lambda step: take(*bucketed, step),
  }


def measure(
  cfg: config.TrainConfig,
  batch_of: dict[str, Callable[[int], tuple[Batch, int]]],
  steps: int,
) -> dict[str, Total]:
  """Trains SMALL in each way, by turns."""
  adapters = setup.plan_adapters(cfg, SMALL)
  shapes = params_lib.abstract(SMALL, jnp.float32)
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  params = jax.tree.unflatten(
    tree,
    [
      jax.random.normal(k, x.shape) / 50
      for k, x in zip(keys, leaves, strict=True)
    ],
  )
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  tx = optim.make_optimizer(setup.optim_config(cfg))
  step = jax.jit(step_lib.make_train_step(setup.make_apply(cfg, SMALL), tx))
  found = dict.fromkeys(batch_of, Total())
  with jax.set_mesh(mesh):
    frozen, trainable = adapters.split(jax.random.key(1), params)
    state = step_lib.init_state(trainable, tx)
    states = dict.fromkeys(batch_of, state)
    warm: set[Any] = set()
    for at in range(steps):
      for name, take in batch_of.items():
        batch, useful = take(at)
        shape = len(batch), batch['ids'].shape
        if shape not in warm:
          warm.add(shape)
          jax.block_until_ready(step(states[name], frozen, batch))
        began = time.process_time()
        states[name], _ = step(states[name], frozen, batch)
        jax.block_until_ready(states[name])
        cost = time.process_time() - began
        found[name] = _added(found[name], batch, useful, cost)
  return found


def count(
  cfg: config.TrainConfig,
  batch_of: dict[str, Callable[[int], tuple[Batch, int]]],
  steps: int,
) -> dict[str, Total]:
  """Counts the FLOPs of steps of MISTRAL_7B in each way."""
  adapters = setup.plan_adapters(cfg, MISTRAL_7B)
  frozen, trainable = setup.abstract(cfg, adapters)
  tx = optim.make_optimizer(setup.optim_config(cfg))
  state = jax.eval_shape(lambda t: step_lib.init_state(t, tx), trainable)
  step = step_lib.make_train_step(setup.make_apply(cfg, MISTRAL_7B), tx)
  costs: dict[Any, int] = {}
  found = dict.fromkeys(batch_of, Total())
  for name, take in batch_of.items():
    for at in range(steps):
      batch, useful = take(at)
      shape = len(batch), batch['ids'].shape
      if shape not in costs:
        costs[shape] = flops(step, state, frozen, batch)
      found[name] = _added(found[name], batch, useful, costs[shape])
  return found


def _added(total: Total, batch: Batch, useful: int, cost: float) -> Total:
  return Total(
    total.useful + useful,
    total.tokens + int(np.prod(batch['ids'].shape)),
    total.cost + cost,
  )


def main() -> None:
  """Measures and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--data', default=str(SHARED / 'data' / 'alpaca_51924.json.gz')
  )
  parser.add_argument(
    '--tokenizer', default=str(SHARED / 'tokenizers' / 'mistral-v1')
  )
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--count', action='store_true')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  targets = 'q_proj,v_proj' if args.count else 'all-linear'
  cfg, batch_of = ways(args.data, args.tokenizer, args.length, targets)
  found = (count if args.count else measure)(cfg, batch_of, args.steps)
  print(f'jax {jax.__version__}, {args.steps} steps of each\n')
  what, unit, scale = ('CPU s', 'CPU s', 1.0)
  if args.count:
    what, unit, scale = ('TFLOPs', 'TFLOP', 1e12)
  print(
    f'{"way":20}{"padding %":>11}{what + " a step":>16}'
    f'{"useful tokens a " + unit:>24}'
  )
  first = next(iter(found.values()))
  for name, total in found.items():
    cost = total.cost / scale
    rate = total.useful / cost
    worth = first.useful / (first.cost / scale) / rate
    print(
      f'{name:20}{100 * (1 - total.useful / total.tokens):11.1f}'
      f'{cost / args.steps:16.3f}{rate:24,.2f}   packed is {worth:.2f} x'
    )


if __name__ == '__main__':
  main()
