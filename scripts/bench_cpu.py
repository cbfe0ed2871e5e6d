"""A LoRA step on one CPU thread: ours, PEFT on torch, and JAX without us.

  python scripts/bench_cpu.py [--dtype float32] [--passes 2] [--only ours,bare]
    [--python-jax PYTHON]

A Mistral of 174.6M parameters with random weights, rank 16 and alpha 32 on its 7
linears, AdamW at 1e-3, 4 rows of 512 random tokens, all of them learned; weights,
factors and tokens are the same for all. The contenders:

  ours   lorax_train, a row a micro-batch
  peft   transformers and PEFT on torch, all 4 rows at once, as is quickest there
  bare   a step written out below in plain JAX, in the formulation of ours

Each runs in a process of its own, with one thread on one core, by turns. Told are
CPU seconds a step (median of --steps after --warm that don't count), the largest
resident set, and the first losses, which have to agree. --python-jax names an
interpreter for those two that use JAX, where torch lives in another one.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
V, D, L, N, K, H, F, R = 32000, 1024, 8, 16, 4, 64, 3584, 16
B, T, ALPHA, RATE, EPS, THETA = 4, 512, 32, 1e-3, 1e-5, 10000.0
BLOCK = 128  # queries of bare's attention at a time
Step = Callable[[], float]


def linears() -> dict[str, tuple[int, int]]:
  """{name in a layer: (in, out)}."""
  return {
    'self_attn.q_proj': (D, N * H),
    'self_attn.k_proj': (D, K * H),
    'self_attn.v_proj': (D, K * H),
    'self_attn.o_proj': (N * H, D),
    'mlp.gate_proj': (D, F),
    'mlp.up_proj': (D, F),
    'mlp.down_proj': (F, D),
  }


def weights() -> Iterator[tuple[str, np.ndarray]]:
  """(Hugging Face name without `.weight`, array [in, out]) of all matrices.

  One at a time, so that no contender has two copies of the model.
  """
  rng = np.random.default_rng(0)
  shapes = {'model.embed_tokens': (V, D), 'lm_head': (D, V)}
  for at in range(L):
    shapes |= {f'model.layers.{at}.{n}': s for n, s in linears().items()}
  for name, shape in shapes.items():
    yield name, 0.02 * rng.standard_normal(shape, np.float32)


def factors() -> dict[str, np.ndarray]:
  """{Hugging Face name: A [R, in]}; B begins as zeros."""
  rng = np.random.default_rng(1)
  return {
    f'model.layers.{at}.{name}': rng.uniform(-1, 1, (R, n_in)).astype('f')
    / n_in**0.5
    for at in range(L)
    for name, (n_in, _) in linears().items()
  }


def tokens() -> np.ndarray:
  """[B, T]."""
  return np.random.default_rng(2).integers(0, V, (B, T))


def ours(dtype: str) -> Step:
  """A run with train.batch_size=1, train.grad_accum=4 and model.remat=dots."""
  import jax
  import jax.numpy as jnp

  from lorax_train import config, parallel
  from lorax_train.models import params as params_lib
  from lorax_train.train import optim, setup
  from lorax_train.train import state as state_lib

  mapping = config.defaults()
  mapping['model'].update(
    path='.', dtype=dtype, param_dtype=dtype, remat='dots'
  )
  mapping['lora'].update(targets='all-linear', rank=R, alpha=ALPHA)
  mapping['data'].update(path='.', max_length=T)
  mapping['train'].update(
    learning_rate=RATE, schedule='constant', clip_norm=0.0
  )
  cfg = config.from_mapping(mapping)
  model_cfg = params_lib.DecoderConfig(V, D, L, N, K, H, F, EPS, THETA)
  own = {name: jnp.asarray(x, dtype) for name, x in weights()}
  leaves = {}
  for param in params_lib.table(model_cfg):
    if param.axes[-1] == 'norm':
      shape = params_lib.shape(model_cfg, param)
      leaves[param.path] = jnp.ones(shape, dtype)
      continue
    names = params_lib.hf_names(model_cfg, param)
    parts = [own.pop(name.removesuffix('.weight')) for name in names]
    leaves[param.path] = jnp.stack(parts) if param.stacked else parts[0]
  params = params_lib.nest(leaves)
  del leaves, parts
  adapters = setup.plan_adapters(cfg, model_cfg)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  tx = optim.make_optimizer(setup.optim_config(cfg))
  a = factors()
  with jax.set_mesh(mesh):
    params = jax.device_put(params, parallel.replicated(mesh))
    frozen, trainable = setup.split(cfg, params, adapters)
    del params
    for room, name in (name.split('.') for name in linears()):
      adapter = trainable['layers'][room][name]
      stack = [a[f'model.layers.{at}.{room}.{name}'] for at in range(L)]
      new = jax.device_put(jnp.asarray(np.stack(stack)), adapter.a.sharding)
      trainable['layers'][room][name] = type(adapter)(new, adapter.b)
    like = state_lib.abstract_state(tx, frozen, trainable, mesh)
    state = state_lib.init_state(tx, trainable, like)
    jitted = setup.make_step(cfg, model_cfg, tx, frozen, like, mesh, 'xla')
    ids = jnp.asarray(tokens(), jnp.int32)[:, None]
    batch = {'ids': ids, 'labels': ids}

  def step() -> float:
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = jitted(state, frozen, batch)
    return float(metrics['loss'])

  return step


def peft(dtype: str) -> Step:
  """The loop that their documentation shows."""
  import peft as peft_lib
  import torch
  import transformers

  torch.set_num_threads(1)
  model_cfg = transformers.MistralConfig(
    vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=N,
    num_key_value_heads=K, head_dim=H, intermediate_size=F, rms_norm_eps=EPS,
    sliding_window=None, tie_word_embeddings=False, use_cache=False,
  )  # fmt: skip
  with torch.device('meta'):
    model = transformers.MistralForCausalLM(model_cfg)
  model = model.to(getattr(torch, dtype)).to_empty(device='cpu')
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.fill_(1.0) if 'norm' in name else None
    for name, x in weights():
      p = model.get_parameter(f'{name}.weight')
      p.copy_(torch.from_numpy(x if 'embed' in name else x.T))
    rope = model.model.rotary_emb
    inverse = 1 / THETA ** (torch.arange(0, H, 2, dtype=torch.float32) / H)
    rope.inv_freq = rope.original_inv_freq = inverse
  model = peft_lib.get_peft_model(
    model,
    peft_lib.LoraConfig(
      r=R,
      lora_alpha=ALPHA,
      target_modules=[name.split('.')[1] for name in linears()],
      task_type='CAUSAL_LM',
    ),
  )
  with torch.no_grad():
    for name, x in factors().items():
      module = model.get_submodule(f'base_model.model.{name}')
      module.lora_A['default'].weight.copy_(torch.from_numpy(x))
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
  ids = torch.from_numpy(tokens())

  def step() -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def bare(dtype: str) -> Step:
  """One jitted function of arrays: two scans, the products, AdamW."""
  import jax
  import jax.numpy as jnp

  names = tuple(name.split('.')[1] for name in linears())
  own = {name: jnp.asarray(x, dtype) for name, x in weights()}
  drawn = factors()
  w, factor = {}, {}
  for name, linear in zip(linears(), names, strict=True):
    of_layers = [f'model.layers.{at}.{name}' for at in range(L)]
    w[linear] = jnp.stack([own.pop(n) for n in of_layers])
    a = jnp.asarray(np.stack([drawn[n] for n in of_layers]))
    factor[linear] = a, jnp.zeros((L, R, w[linear].shape[2]))
  angles = np.outer(np.arange(T), THETA ** -(np.arange(0, H, 2) / H))
  cos, sin = (jnp.asarray(f(angles), 'f')[:, None] for f in (np.cos, np.sin))
  above = jnp.asarray(np.triu(np.full((BLOCK, BLOCK), -1e30, 'f'), 1))

  def norm(x):
    x32 = x.astype('f')
    mean = jnp.mean(x32 * x32, -1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + EPS)).astype(dtype)

  def rotated(x):
    low, high = jnp.split(x.astype('f'), 2, -1)
    turned = low * cos - high * sin, high * cos + low * sin
    return jnp.concatenate(turned, -1).astype(dtype)

  @jax.checkpoint
  def attended(q_QNH, k_SKH, v_SKH):
    """The last Q of S queries."""
    q = q_QNH.reshape(BLOCK, K, N // K, H)
    s = jnp.einsum('qkgh,skh->kgqs', q, k_SKH, preferred_element_type='f')
    s = s / H**0.5
    s = s.at[..., -BLOCK:].add(above)
    p = jax.nn.softmax(s).astype(dtype)
    return jnp.einsum('kgqs,skh->qkgh', p, v_SKH).reshape(BLOCK, N * H)

  def layer(x, weights_and_factors):
    w, factor = weights_and_factors

    def dot(x, name):
      a, b = (f.astype(dtype) for f in factor[name])
      # One dot_general: its gradient in A is then du^T x.
      u = jax.lax.dot_general(x, a, (((1,), (1,)), ((), ())))
      return x @ w[name] + (u * (ALPHA / R)) @ b

    h = norm(x)
    q, k = (rotated(dot(h, n).reshape(T, -1, H)) for n in names[:2])
    v = dot(h, 'v_proj').reshape(T, K, H)
    blocks = [slice(at, at + BLOCK) for at in range(0, T, BLOCK)]
    out = [attended(q[b], k[: b.stop], v[: b.stop]) for b in blocks]
    x = x + dot(jnp.concatenate(out), 'o_proj')
    h = norm(x)
    inner = jax.nn.silu(dot(h, 'gate_proj')) * dot(h, 'up_proj')
    return x + dot(inner, 'down_proj'), None

  def loss_of(factor, w, embed, head, ids):
    x, _ = jax.lax.scan(layer, embed[ids], (w, factor))
    logits = jnp.matmul(norm(x[:-1]), head, preferred_element_type='f')
    labels = ids[1:, None]
    own = jnp.take_along_axis(logits, labels, 1)[:, 0]
    return jnp.sum(jax.nn.logsumexp(logits, -1) - own)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def update(factor, first, second, at, w, embed, head, ids):
    def row(total, ids):
      new = jax.value_and_grad(loss_of)(factor, w, embed, head, ids)
      return jax.tree.map(jnp.add, total, new), None

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, factor)
    (loss, grads), _ = jax.lax.scan(row, zero, ids)
    grads = jax.tree.map(lambda g: g / (B * (T - 1)), grads)
    mix = lambda rate, f: lambda m, g: rate * m + (1 - rate) * f(g)  # noqa: E731
    first = jax.tree.map(mix(0.9, lambda g: g), first, grads)
    second = jax.tree.map(mix(0.999, jnp.square), second, grads)

    def moved(p, m, v):
      m, v = m / (1 - 0.9**at), v / (1 - 0.999**at)
      return p - RATE * m / (jnp.sqrt(v) + 1e-8)

    factor = jax.tree.map(moved, factor, first, second)
    return loss / (B * (T - 1)), (factor, first, second)

  embed, head = own['model.embed_tokens'], own['lm_head']
  ids = jnp.asarray(tokens())
  state = factor, *(jax.tree.map(jnp.zeros_like, factor) for _ in range(2))
  done = 0.0

  def step() -> float:
    nonlocal state, done
    done += 1
    loss, state = update(*state, done, w, embed, head, ids)
    return float(loss)

  return step


CONTENDERS = {'ours': ours, 'peft': peft, 'bare': bare}


def measure(name: str, dtype: str, warm: int, steps: int) -> dict[str, Any]:
  """One contender in this process; seconds are those after `warm` steps."""
  step = CONTENDERS[name](dtype)
  losses, seconds = [], []
  for _ in range(warm + steps):
    began = time.process_time()
    losses.append(step())
    seconds.append(time.process_time() - began)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {'losses': losses, 'seconds': seconds[warm:], 'peak_bytes': peak}


def start(args: argparse.Namespace, name: str) -> dict[str, Any]:
  """One contender in a process of its own, on the core that is asked for."""
  python = sys.executable if name == 'peft' else args.python_jax
  threads = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
  options = ['--dtype', args.dtype]
  options += ['--warm', str(args.warm), '--steps', str(args.steps)]
  done = subprocess.run(
    [python, __file__, '--child', name, *options],
    env={
      **os.environ,
      **dict.fromkeys(threads, '1'),
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'CUDA_VISIBLE_DEVICES': '',
    },
    stdout=subprocess.PIPE,
    check=True,
    preexec_fn=lambda: os.sched_setaffinity(0, {args.core}),
  )
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Prints a line a contender and pass, then the medians side by side."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))  # fmt: skip
  parser.add_argument('--passes', type=int, default=2)
  parser.add_argument('--warm', type=int, default=2)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--only', default=','.join(CONTENDERS))
  parser.add_argument('--python-jax', default=sys.executable)
  parser.add_argument('--core', type=int, default=max(os.sched_getaffinity(0)))
  parser.add_argument('--child', choices=CONTENDERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    found = measure(args.child, args.dtype, args.warm, args.steps)
    print(json.dumps(found))
    return
  found: dict[str, list[dict]] = {name: [] for name in args.only.split(',')}
  for number in range(args.passes):
    for name, runs in found.items():
      runs.append(start(args, name))
      print(f'pass {number + 1}  {line(name, runs[-1:])}', flush=True)
  print('\nmedian of all passes')
  for name, runs in found.items():
    print(line(name, runs))
  report = {name: (cost(runs), peak(runs)) for name, runs in found.items()}
  if 'ours' in report:
    for name, (seconds, memory) in report.items():
      print(
        f'{name} / ours: {seconds / report["ours"][0]:.2f} of CPU seconds,'
        f' ours / {name}: {report["ours"][1] / memory:.2f} of memory'
      )


def cost(runs: list[dict]) -> float:
  """CPU seconds a step."""
  return statistics.median(s for run in runs for s in run['seconds'])


def peak(runs: list[dict]) -> int:
  """Largest resident set, bytes."""
  return max(run['peak_bytes'] for run in runs)


def line(name: str, runs: list[dict]) -> str:
  """What was found of a contender."""
  losses = ' '.join(f'{loss:.5f}' for loss in runs[0]['losses'][:5])
  return (
    f'{name:6} {cost(runs):6.2f} CPU s a step, {peak(runs) / 1e6:5.0f} MB,'
    f' losses {losses}'
  )


if __name__ == '__main__':
  main()
