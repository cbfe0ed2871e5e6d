"""One case of scripts/bench.py: a model, its train step compiled, and timed.

What a run does in train/loop.py, without all that reads or writes files: weights
are random, and each step gets the same batch.

Axis letters: A micro-batches, B rows, T tokens.
"""

import functools
import math
import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from bench_cases import MODELS, Case
from bench_rates import Roof, Took, product_params, rates, spread

from lorax_train import lora, parallel
from lorax_train.data import packing
from lorax_train.models import params as params_lib
from lorax_train.models.attention import choose
from lorax_train.models.mistral import Decoder
from lorax_train.models.params import DecoderConfig
from lorax_train.train import optim
from lorax_train.train import state as state_lib
from lorax_train.train import step as step_lib
from lorax_train.train.step import TrainState

Tree = Any
Arrays = dict[str, np.ndarray]

WARM_UP = 2  # steps before those that are timed
# Width of the square matrices whose product is the roof, and products a timing.
ROOF_ON_CPU, ROOF = (2048, 1), (8192, 50)
# Tokens of a row in a pack: e to a normal of this mean and deviation, 119 in the
# mean; Alpaca's rows have 121.
ROW_TOKENS = (4.6, 0.6)


def start(distributed: bool) -> None:
  """Before anything else: joins the other hosts, where there are."""
  if distributed:
    jax.distributed.initialize()
  # Seconds of compilation are to be those of a fresh machine.
  jax.config.update('jax_enable_compilation_cache', False)


def probe() -> dict[str, Any]:
  """What there is to run on."""
  kind = jax.devices()[0].platform
  return {
    'platform': 'gpu' if kind in ('cuda', 'rocm') else kind,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    'process': jax.process_index(),
  }


def measure(case: Case, steps: int) -> dict[str, Any]:
  """Runs a case: see bench.py for what comes back.

  Raises:
    ValueError: it is for other devices than those at hand.
  """
  here = probe()['platform']
  if case.platform != here:
    raise ValueError(f'{case.name} is for a {case.platform}, this is a {here}')
  devices = jax.devices()[: case.devices]
  mesh = parallel.make_mesh(*case.mesh, devices=devices)
  cfg = MODELS[case.model]
  tx = optim.make_optimizer(
    optim.OptimConfig(WARM_UP + steps, learning_rate=1e-3, clip_norm=1.0)
  )
  roof = gemm_roof(jax.local_devices()[0], jnp.dtype(case.dtype))
  with jax.set_mesh(mesh):
    began = time.perf_counter()
    frozen, state = make_model(case, cfg, tx, mesh)
    arrays = make_batch(case, cfg.vocab)
    batch = on_mesh(arrays, mesh)
    jax.block_until_ready((frozen, state, batch))
    init_seconds = time.perf_counter() - began

    apply = make_apply(case, cfg)
    step = jax.jit(
      step_lib.make_train_step(apply, tx, loss_chunk=case.loss_chunk),
      donate_argnums=0,
      out_shardings=(state_lib.shardings_of(state), parallel.replicated(mesh)),
    )
    began = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - began

    losses: list[Any] = []

    def one_step() -> Any:
      nonlocal state
      state, metrics = compiled(state, frozen, batch)
      losses.append(metrics['loss'])
      return state, metrics

    took = timed(one_step, steps)
    memory = peak_memory(compiled, mesh)
    pieces = None
    if case.pieces:
      pieces = time_pieces(apply, tx, state, frozen, batch, steps)

  first, last = float(losses[0]), float(losses[-1])
  found = {
    'platform': here,
    'card': devices[0].device_kind,
    'devices': len(devices),
    'processes': jax.process_count(),
    'cpus': len(os.sched_getaffinity(0)),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'versions': {
      'python': platform.python_version(),
      **{m.__name__: m.__version__ for m in (jax, jaxlib, flax, optax)},
    },
    'kernel': kernel_of(case, cfg),
    'n_params': params_lib.total(cfg),
    'n_product_params': product_params(cfg),
    'n_trained': sum(x.size for x in jax.tree.leaves(state.trainable)),
    **rates(
      case,
      cfg,
      arrays,
      took,
      roof,
      devices[0].device_kind,
      by_cpu=case.platform == 'cpu' and jax.process_count() == 1,
    ),
    **memory,
    'init_seconds': init_seconds,
    'compile_seconds': compile_seconds,
    'pieces': pieces,
    'loss_first': first,
    'loss_last': last,
  }
  if not np.isfinite([first, last]).all():
    # JSON has no NaN.
    found |= {'loss_first': None, 'loss_last': None, 'error': 'loss not finite'}
  return found


def make_model(
  case: Case,
  cfg: DecoderConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[Tree, TrainState]:
  """The frozen half, and the state before the first step, on the mesh."""
  spec = lora.LoraSpec(case.targets, rank=case.rank, alpha=2.0 * case.rank)
  frozen, trainable = lora.split(
    jax.random.key(1),
    random_params(cfg, jnp.dtype(case.dtype), mesh),
    spec,
    params_lib.module_names(cfg),
    params_lib.layout(cfg),
    params_lib.norm_names(cfg),
  )
  frozen = jax.device_put(frozen, parallel.frozen_shardings(frozen))
  of_factors = parallel.trainable_shardings(frozen, trainable)
  trainable = jax.device_put(trainable, of_factors)
  like = state_lib.abstract_state(tx, frozen, trainable, mesh)
  return frozen, state_lib.init_state(tx, trainable, like)


def random_params(
  cfg: DecoderConfig, dtype: Any, mesh: jax.sharding.Mesh
) -> Tree:
  """Weights of the real shape, made where they stay, one leaf after another.

  A layer at a time: the random bits of a whole stack would take more than the
  train step does, and be its peak.
  """

  def make(p: params_lib.Param, number: int) -> Any:
    shape = params_lib.shape(cfg, p)

    def normal(key):
      own = shape[1:] if p.stacked else shape
      return cfg.init_std * jax.random.normal(key, own, dtype)

    def leaf(key):
      if p.axes[-1] == 'norm':
        return jnp.ones(shape, dtype)
      if p.stacked:
        return jax.lax.map(normal, jax.random.split(key, shape[0]))
      return normal(key)

    where = parallel.sharding(mesh, p.axes, params_lib.axis_units(cfg, p))
    return jax.jit(leaf, out_shardings=where)(jax.random.key(number))

  return params_lib.nest(
    {p.path: make(p, i) for i, p in enumerate(params_lib.table(cfg))}
  )


def kernel_of(case: Case, cfg: DecoderConfig) -> str:
  """Who computes attention."""
  return choose(case.attention, case.platform, cfg.head_dim, case.dtype)


def make_apply(case: Case, cfg: DecoderConfig) -> step_lib.Apply:
  """As train.setup.make_apply."""
  model: Any = Decoder(
    cfg,
    jnp.dtype(case.dtype),
    case.remat,
    head=False,
    kernel=kernel_of(case, cfg),
  )
  return lambda params, ids, positions=None, segments=None: model.apply(
    {'params': params}, ids, positions, segments_BT=segments
  )


def make_batch(case: Case, vocab: int) -> Arrays:
  """A batch [A, B, T] of random ids; `mask` is False in padding.

  Packs have `segments` and `positions` as well, as data.batches.pad_packs has
  them, and -100 for the label of a row's first token.
  """
  rng = np.random.default_rng(0)
  shape = (case.grad_accum, case.batch, case.length)
  ids = rng.integers(0, vocab, shape, np.int32)
  if not case.packed:
    return {'ids': ids, 'labels': ids, 'mask': np.ones(shape, bool)}
  lengths = np.exp(rng.normal(*ROW_TOKENS, ids.size)).astype(int)
  lengths = lengths.clip(2, case.length)
  # As many as fill all the packs, and the rest of the last one.
  lengths = lengths[: np.searchsorted(lengths.cumsum(), ids.size) + 1]
  segments, positions = np.zeros_like(ids), np.zeros_like(ids)
  packs = packing.best_fit(lengths, case.length)
  for pack, own, places in zip(
    packs,
    segments.reshape(-1, case.length),
    positions.reshape(-1, case.length),
    strict=False,
  ):
    begin = 0
    for number, row in enumerate(pack, start=1):
      end = begin + lengths[row]
      own[begin:end], places[begin:end] = number, np.arange(lengths[row])
      begin = end
  mask = segments > 0
  return {
    'ids': np.where(mask, ids, 0),
    'labels': np.where(positions > 0, ids, -100),
    'mask': mask,
    'segments': segments,
    'positions': positions,
  }


def on_mesh(arrays: Arrays, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """What the step takes of a batch, each device with its rows."""
  where = parallel.batch_sharding(mesh, 1)
  return {
    name: jax.make_array_from_callback(x.shape, where, x.__getitem__)
    for name, x in arrays.items()
    if name != 'mask'
  }


def gemm_roof(device: jax.Device, dtype: Any) -> Roof:
  """FLOPs of a large product a second."""
  width, times = ROOF_ON_CPU if device.platform == 'cpu' else ROOF
  with jax.default_device(device):
    x = jax.random.normal(jax.random.key(0), (width, width), dtype)
    x = x / math.sqrt(width)  # or a chain of products would overflow
    chain = jax.jit(
      lambda x: jax.lax.fori_loop(0, times, lambda _, y: jnp.matmul(x, y), x)
    )
    took = timed(lambda: chain(x), 5)
  flops = 2.0 * width**3 * times
  return Roof(flops / min(took.wall), flops / min(took.cpu))


def timed(call: Callable[[], Any], times: int) -> Took:
  """Calls, and waits for what comes back, each time."""
  took = Took([], [])
  for number in range(WARM_UP + times):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    if number >= WARM_UP:
      took.wall.append(time.perf_counter() - wall)
      took.cpu.append(time.process_time() - cpu)
  return took


def peak_memory(compiled: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The most bytes that a device held, or where it doesn't say will hold."""
  plan = compiled.memory_analysis()
  parts = {
    'arguments': plan.argument_size_in_bytes,
    # Of them without what lies where an argument was.
    'outputs': plan.output_size_in_bytes - plan.alias_size_in_bytes,
    'temporary': plan.temp_size_in_bytes,
  }
  held = [device.memory_stats() for device in mesh.local_devices]
  by_device = all(held)
  peak = sum(parts.values())
  if by_device:
    peak = max(stats['peak_bytes_in_use'] for stats in held)
  return {
    'peak_bytes': peak,
    'peak_from': 'device' if by_device else 'compiled',
    'compiled_bytes': {**parts, 'peak': plan.peak_memory_in_bytes},
    # Linux has kilobytes.
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def time_pieces(
  apply: step_lib.Apply,
  tx: optax.GradientTransformation,
  state: TrainState,
  frozen: Tree,
  batch: dict[str, jax.Array],
  times: int,
) -> dict[str, dict[str, float]]:
  """Seconds of the parts of a step, each compiled by itself."""
  loss = step_lib.make_loss(apply)
  micro = {name: x[0] for name, x in batch.items()}

  def forward(trainable, frozen, micro):
    return loss(trainable, frozen, micro, None)

  def optimizer(grads, state):
    with jax.numpy_dtype_promotion('standard'):
      updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
      return optax.apply_updates(state.trainable, updates), opt_state

  own = (state.trainable, frozen, micro)
  parts = {
    'forward': (forward, own),
    'forward_backward': (jax.value_and_grad(forward, has_aux=True), own),
    'optimizer': (optimizer, (state.trainable, state)),
  }
  return {
    name: spread(timed(functools.partial(jax.jit(part), *args), times).wall)
    for name, (part, args) in parts.items()
  }
