"""What the seconds of scripts/bench.py come to: FLOPs, and shares of a peak."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from bench_cases import Case

from lorax_train import hardware
from lorax_train.models import params as params_lib
from lorax_train.models import remat
from lorax_train.models.params import DecoderConfig


class Took(NamedTuple):
  """Seconds of a call, each time: by the clock, and of the CPU."""

  wall: list[float]
  cpu: list[float]


class Roof(NamedTuple):
  """FLOPs of a large product a second: of the clock, and of the CPU."""

  wall: float
  cpu: float


def rates(
  case: Case,
  cfg: DecoderConfig,
  arrays: Mapping[str, np.ndarray],
  took: Took,
  roof: Roof,
  card: str,
  by_cpu: bool = False,
) -> dict[str, Any]:
  """Of steps of that batch: see bench.py for the names.

  Args:
    case: what was run.
    cfg: its model.
    arrays: the batch, with `mask` [A, B, T], and `positions` where packed.
    took: the steps.
    roof: of one of the case's devices.
    card: the device_kind of them.
    by_cpu: what counts are seconds of the CPU.
  """
  tokens, useful = arrays['mask'].size, int(arrays['mask'].sum())
  seconds, cpu = statistics.median(took.wall), statistics.median(took.cpu)
  per_token = flops_a_token(cfg, keys_seen(arrays, cfg.window))
  needed = per_token * useful
  again = cfg.layers * remat.recomputed_flops(cfg, case.remat, {}, 0.0)
  chip = hardware.of_kind(card) if case.dtype == 'bfloat16' else None
  mfu = hfu = None
  if chip is not None:
    could = chip.flops / chip.devices * case.devices * seconds
    mfu = needed / could
    hfu = mfu + again * tokens / could
  # Those of a CPU are of all the devices that it simulates.
  by_gemm = roof.cpu * cpu if by_cpu else roof.wall * seconds * case.devices
  return {
    'tokens': tokens,
    'useful_tokens': useful,
    'step_seconds': spread(took.wall),
    'step_cpu_seconds': spread(took.cpu),
    'tokens_per_second': tokens / seconds,
    'useful_tokens_per_second': useful / seconds,
    'tokens_per_cpu_second': tokens / cpu if by_cpu else None,
    'flops_per_token': per_token,
    'mfu_4n': mfu,
    'hfu': hfu,
    'gemm_tflops': (roof.cpu if by_cpu else roof.wall) / 1e12,
    'share_of_gemm': needed / by_gemm,
  }


def spread(seconds: Sequence[float]) -> dict[str, float]:
  """Median and extremes."""
  return {
    'median': statistics.median(seconds),
    'min': min(seconds),
    'max': max(seconds),
    'n': len(seconds),
  }


def keys_seen(arrays: Mapping[str, np.ndarray], window: int | None) -> float:
  """How many tokens one sees in the mean, itself included, padding apart."""
  shape = arrays['mask'].shape
  seen = arrays.get('positions', np.arange(shape[-1])) + 1
  if window is not None:
    seen = np.minimum(seen, window)
  return float(np.broadcast_to(seen, shape)[arrays['mask']].mean())


def product_params(cfg: DecoderConfig) -> int:
  """N: the parameters that take part in a product; the look-up does not."""
  sizes = {
    p.path: math.prod(params_lib.shape(cfg, p))
    for p in params_lib.table(cfg)
    if p.axes[-1] != 'norm'
  }
  look_up = sizes.pop('embed_tokens')
  return sum(sizes.values()) + (look_up if cfg.tied else 0)


def flops_a_token(cfg: DecoderConfig, keys: float) -> float:
  """What LoRA cannot do without: 4N + 3 x the forward pass of attention.

  2N forward and 2N for the gradient of the input; a frozen weight has none.

  Args:
    cfg: the model.
    keys: how many tokens one sees in the mean, itself included.
  """
  attention = cfg.layers * 4 * cfg.heads * cfg.head_dim * keys
  return 4 * product_params(cfg) + 3 * attention
