"""What a step needs and how fast it can be, by formula: no compiler, no device.

Bytes are those of one device. What the step is given is exact. What it makes on
the way is read off its jaxpr (`liveness`), as one device computes it, and to that
comes what the weights need that other devices hold. FLOPs are those of the jaxpr,
to which come those of attention.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lorax_train import lora, parallel
from lorax_train.config import TrainConfig, trains_all
from lorax_train.formats import quantised
from lorax_train.plan import flops, liveness, opaque, shapes
from lorax_train.plan.chips import Topology
from lorax_train.plan.shapes import Mesh
from lorax_train.train import setup

# How far off the compiler the formula may be; docs/plan.md has how far it was.
ERROR = 0.10
# What is left free where a policy is chosen.
SPARE = 0.07

# FLOPs of attention's backward pass over those of its forward pass.
BACKWARD = 2.5

_LANES = 128  # the last axis of an array in a TPU's memory is a multiple of it


class Estimate(NamedTuple):
  """A step on one device.

  Attributes:
    given: {kind: bytes} of what is there between steps.
    made: {kind: bytes} of what a step makes, at its peak.
    peak: bytes, the sum of all of these.
    flops: of its products.
    moved: bytes that its memory must read and write at the least.
    tokens: of a step, over all devices, padding counted.
    collectives: {kind: bytes that it receives}.
  """

  given: dict[str, int]
  made: dict[str, int]
  peak: int
  flops: int
  moved: int
  tokens: int
  collectives: dict[str, int]


def estimate(
  cfg: TrainConfig,
  adapters: setup.Adapters,
  mesh: Mesh,
  length: int,
  platform: str,
) -> Estimate:
  """A run's step on a mesh.

  Args:
    cfg: the run; its remat is a policy.
    adapters: from `setup.plan_adapters`.
    mesh: devices, or their number alone (`shapes.mesh_of`).
    length: tokens of a row.
    platform: tpu, gpu or cpu.
  """
  whole = shapes.shapes_of(cfg, adapters, mesh, length)
  given = {
    'frozen weights': shapes.bytes_of(whole.frozen),
    _what_is_trained(cfg): shapes.bytes_of(whole.state.trainable),
    'optimizer': shapes.bytes_of(whole.state.opt_state),
    'batch': shapes.bytes_of(whole.batch),
  }
  jaxpr, own = shapes.program(cfg, adapters, mesh, length, platform)
  m = own.model_cfg
  gathered, head = _gathered(whole, mesh)
  rules = liveness.Rules(cut=_cut(whole, own, mesh))
  if platform == 'tpu':
    gathered = 0
    padded = -(-m.head_dim // _LANES) * _LANES
    rules = rules._replace(
      laid_out={m.head_dim: padded},
      rewrites=True,
      gathered={(m.hidden, m.vocab): head},
    )
  saved = liveness.stacked(jaxpr, m.layers, rules)
  logits = _widest(jaxpr, m.vocab)
  trained = [] if cfg.method == 'mezo' else jax.tree.leaves(own.state.trainable)
  made = {
    'saved activations': saved,
    'gradients': sum(map(rules.size, trained)),
    'logits': logits,
    'gathered weights': gathered,
  }
  donated = len(jax.tree.leaves(own.state))
  peak = liveness.peak(jaxpr, rules, donated) + gathered
  rest = peak - sum(made.values())
  if rest < 0:  # they are not all alive at once
    made['logits'] = max(0, made['logits'] + rest)
    rest = peak - sum(made.values())
  made['temporary'] = max(0, rest)
  tokens = math.prod(whole.batch['ids'].shape)
  return Estimate(
    given,
    made,
    sum(given.values()) + peak,
    flops.total(jaxpr) + attention_flops(jaxpr, m.window),
    _read_and_written(cfg, own, given, saved),
    tokens,
    collectives(cfg, whole, mesh),
  )


def _what_is_trained(cfg: TrainConfig) -> str:
  return 'trained weights' if trains_all(cfg) else 'adapters'


def keys_seen(length: int, window: int | None) -> float:
  """Keys that a query of a row sees, in the mean: causal, within a window."""
  window = min(window or length, length)
  return window * (length - (window - 1) / 2) / length


def attention_flops(jaxpr: Any, window: int | None) -> int:
  """FLOPs of all attention in a program in which it is opaque.

  Two products a key and query forward, and five backward, which makes the scores
  once more; of keys that nobody sees, none. Packs count as a row.
  """
  total = 0.0
  for eqn, times in flops.walk(getattr(jaxpr, 'jaxpr', jaxpr)):
    if eqn.primitive.name == opaque.PRIMITIVE:
      rows, length, heads, head_dim = eqn.invars[0].aval.shape
      forward = 4 * heads * head_dim * rows * length * keys_seen(length, window)
      backward = opaque.RESULTS[len(eqn.outvars)] == 'backward'
      total += times * forward * (BACKWARD if backward else 1)
  return round(total)


def _widest(jaxpr: Any, vocab: int) -> int:
  """Bytes of the largest array of logits that is ever made."""
  return max(
    (
      liveness.size_of(var.aval)
      for eqn in liveness.equations(jaxpr)
      for var in eqn.outvars
      if getattr(var.aval, 'shape', ())[-1:] == (vocab,)
      and len(var.aval.shape) > 1
      and eqn.primitive.name == 'dot_general'
    ),
    default=0,
  )


def _read_and_written(
  cfg: TrainConfig, own: shapes.Shapes, given: Mapping[str, int], saved: int
) -> int:
  """Weights once in each pass, what is saved twice, the state in and out.

  The least there can be: what a pass makes and reads again might never leave
  the chip.
  """
  state = sum(given.values()) - given['frozen weights'] - given['batch']
  base = own.state.trainable if trains_all(cfg) else own.frozen
  weights = shapes.bytes_of(base)
  if not trains_all(cfg):
    weights += sum(map(shapes.bytes_of, _trained(own)))
  if not own.model_cfg.tied:
    weights -= shapes.bytes_of(base['embed_tokens'])
  passes = 3 if cfg.model.remat == 'full' and cfg.method != 'mezo' else 2
  return cfg.train.grad_accum * (passes * weights + 2 * saved) + 2 * state


def _cut_by(leaf: Any, axis: str) -> bool:
  return any(
    axis in (part if isinstance(part, tuple) else (part,))
    for part in leaf.sharding.spec
  )


def _whole(leaf: Any, mesh: Mesh) -> int:
  """Bytes of a leaf put together from what `fsdp` cuts."""
  return shapes.bytes_of(leaf) * mesh.shape['fsdp']


def _cut(
  whole: shapes.Shapes, own: shapes.Shapes, mesh: Mesh
) -> dict[tuple[int, ...], int]:
  """{shape: into how many parts `fsdp` cuts it} of leaves that are trained whole.

  By shapes of the program on one device, where they stand whole.
  """
  return {
    leaf.shape: mesh.shape['fsdp']
    for leaf, there in zip(_trained(own), _trained(whole), strict=True)
    if _cut_by(there, 'fsdp')
  }


def _trained(of: shapes.Shapes) -> list[Any]:
  """Leaves that are trained whole, in place of frozen ones."""
  leaves = jax.tree.leaves(
    of.state.trainable, is_leaf=lambda x: isinstance(x, lora.Adapter)
  )
  return [leaf for leaf in leaves if not isinstance(leaf, lora.Adapter)]


def _gathered(whole: shapes.Shapes, mesh: Mesh) -> tuple[int, int]:
  """Bytes of the weights that are put together ahead, and of the head alone.

  The head is whole for all chunks of the loss. On a GPU so are a layer's weights,
  while the layer before it is computed; those of the layer itself are slices of the
  loop, which are copied without fsdp too. A TPU multiplies by the parts as they come.
  """
  if mesh.shape['fsdp'] == 1:
    return 0, 0
  weights = [*jax.tree.leaves(whole.frozen), *_trained(whole)]
  cut = [x for x in weights if _cut_by(x, 'fsdp')]
  head = max((_whole(x, mesh) for x in cut if len(x.shape) == 2), default=0)
  layer = sum(_whole(x, mesh) // x.shape[0] for x in cut if len(x.shape) == 3)
  return max(layer, head), head


def collectives(
  cfg: TrainConfig, whole: shapes.Shapes, mesh: Mesh
) -> dict[str, int]:
  """{kind: bytes that a device receives} in a step.

  W of each layer is gathered over fsdp for the forward and for the backward
  pass, a quantised one as what it stands for, the adapters with it; their gradients are summed over data and fsdp; and
  over tensor the two sums of each layer, of its inputs and of its recomputed
  half.
  """
  data, fsdp, tensor = (mesh.shape[n] for n in parallel.MESH_AXES)
  n_micro = cfg.train.grad_accum
  out = dict.fromkeys(('all-gather', 'reduce-scatter', 'all-reduce'), 0)
  trainable = jax.tree.leaves(whole.state.trainable)
  width = 2 if cfg.model.dtype == 'bfloat16' else 4
  for leaf in [*jax.tree.leaves(whole.frozen), *trainable]:
    if _cut_by(leaf, 'fsdp'):
      out['all-gather'] += 2 * n_micro * (fsdp - 1) * shapes.bytes_of(leaf)
  for w in quantised.weights(whole.frozen):
    if hasattr(w, 'dequantised') and _cut_by(w, 'fsdp'):
      parts = [x for x in jax.tree.leaves(w) if _cut_by(x, 'fsdp')]
      more = _whole_bytes(w, width) - shapes.bytes_of(parts)
      out['all-gather'] += 2 * n_micro * (fsdp - 1) * more
  for leaf in trainable:
    n = shapes.bytes_of(leaf)
    if _cut_by(leaf, 'fsdp'):
      out['reduce-scatter'] += n_micro * (fsdp - 1) * n
      out['all-reduce'] += n_micro * _summed(n, data)
    else:
      out['all-reduce'] += n_micro * _summed(n, data * fsdp)
  if tensor > 1:
    m = whole.model_cfg
    rows = math.prod(whole.batch['ids'].sharding.shard_shape(whole.batch['ids'].shape))  # fmt: skip
    sums = m.layers * (5 if cfg.model.remat == 'full' else 4) + 1
    out['all-reduce'] += sums * _summed(rows * m.hidden * width, tensor)
  return out


def _whole_bytes(w: Any, width: int) -> int:
  """Bytes of what a device's part of a quantised weight stands for."""
  stored = jax.tree.leaves(w)[0]
  part = math.prod(stored.sharding.shard_shape(stored.shape))
  return math.prod(w.shape) * part // math.prod(stored.shape) * width


def _summed(n: int, ways: int) -> int:
  """Bytes that one of so many receives where n are summed, by a ring."""
  return 2 * n * (ways - 1) // ways


def seconds(found: Estimate, topology: Topology) -> dict[str, float]:
  """{what: the least seconds it takes}; of what nothing is known there is none.

  Compute, memory and links may all be busy at once: a step takes as long as the
  longest of these, or longer.
  """
  chip = topology.chip
  if chip is None:
    return {}
  received = sum(found.collectives.values())
  return {
    'compute': found.flops * chip.devices / chip.flops,
    'memory': found.moved * chip.devices / chip.hbm_bandwidth,
    'links': received * chip.devices / topology.link_bandwidth,
  }


def matmul_parameters(adapters: setup.Adapters) -> int:
  """N: parameters that take part in a product, the head among them."""
  m = adapters.model_cfg
  per_layer = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.hidden * m.mlp  # fmt: skip
  return m.layers * per_layer + m.hidden * m.vocab


def needed_flops(
  adapters: setup.Adapters, frozen: Any, length: int
) -> Mapping[str, float]:
  """FLOPs a token that the run cannot do without, by kind.

  4 N: each product forward, and backward to its input; no gradient of a frozen W.
  6 an adapter's parameter. 2 N where all are trained. Attention: what is seen under the causal mask and the
  window, forward and, with the scores once more, backward.
  """
  m = adapters.model_cfg
  seen = keys_seen(length, m.window)
  trained, base = lora.count(frozen)
  n = matmul_parameters(adapters)
  of_trained = {'adapters': 6.0 * trained}
  if trained == base:
    of_trained = {'gradients': 2.0 * n}
  return {
    '4 N': 4.0 * n,
    **of_trained,
    'attention': (1 + BACKWARD) * 4 * m.layers * m.heads * m.head_dim * seen,
  }
