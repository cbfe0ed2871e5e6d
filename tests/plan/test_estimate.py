"""What a step needs by formula, against XLA's account and closed formulas.

References: `memory_analysis` of the run's own step as XLA compiles it for CPU;
FLOPs of LoRA (4 N a token and attention, after Hu et al. 2021 and Kaplan et al.
2020); and the arrays themselves. Compilers for TPU and GPU are compared with by
scripts/aot.py; docs/plan.md has their figures.
"""

import jax
import pytest

from lorax_train import parallel
from lorax_train.plan import compiled, estimate, shapes
from lorax_train.train import optim, setup
from lorax_train.train import step as step_lib
from tests.plan.cases import MISTRAL_7B, SMALL, devices, run

MESHES = {
  'alone': (1, {}),
  'fsdp': (8, {}),
  'data': (8, {'data': 8, 'fsdp': 1}),
  'tensor': (8, {'fsdp': 4, 'tensor': 2}),
}

# Rows are short, and logits are not the peak: of a T x T softmax, and of logits,
# XLA:CPU keeps copies that compilers for TPU and GPU do not.
BY_XLA = [
  ('alone', {'remat': 'none'}),
  ('fsdp', {'rows': 32, 'train': {'grad_accum': 2}}),
  ('tensor', {'rows': 32, 'remat': 'dots'}),
  ('data', {'rows': 32, 'data': {'packing': True}}),
  ('alone', {'remat': 'none', 'model': {'quant': 'nf4'}}),
  # Weights, gradients and moments are cut, and each layer is put together.
  ('fsdp', {'rows': 32, 'method': 'full', 'train': {'grad_accum': 2}}),
]


# A compilation each: two of them stand for all, but for the slow tests.
@pytest.mark.parametrize(
  ('mesh', 'of'),
  [
    *(pytest.param(*c, marks=pytest.mark.slow) for c in BY_XLA[:-2]),
    *BY_XLA[-2:],
  ],
)
def test_the_peak_is_that_of_the_compiler(monkeypatch, mesh, of):
  n, sizes = MESHES[mesh]
  cfg, adapters = run(**of, mesh=sizes)
  topology = devices(n)
  monkeypatch.setattr(compiled, 'devices_of', lambda _: jax.devices()[:n])
  found = estimate.estimate(
    cfg, adapters, shapes.mesh_of(cfg, n), cfg.data.max_length, 'cpu'
  )
  own, _ = compiled.compile_step(cfg, adapters, topology, cfg.data.max_length)
  assert found.peak == pytest.approx(own.peak, rel=0.15)


def test_the_program_forms_no_gradient_of_a_frozen_weight(monkeypatch):
  cfg, adapters = run(length=48, rows=16, remat='full')
  monkeypatch.setattr(compiled, 'devices_of', lambda _: jax.devices()[:8])
  own, _ = compiled.compile_step(cfg, adapters, devices(8), 48)
  assert own.weight_gradients == set()
  # Nothing larger is summed than the adapters' gradients of a step.
  whole = shapes.shapes_of(cfg, adapters, shapes.mesh_of(cfg, 8), 48)
  largest = max(
    (c.bytes for c in own.collectives if c.kind == 'all-reduce'), default=0
  )
  assert 0 < largest <= 8 * shapes.bytes_of(whole.state.trainable)


@pytest.mark.parametrize('quant', ['none', 'nf4', 'int8'])
def test_what_is_given_is_what_lies_on_a_device(quant):
  cfg, adapters = run(
    rows=8, mesh={'fsdp': 4, 'tensor': 2}, model={'quant': quant}
  )
  found = estimate.estimate(cfg, adapters, shapes.mesh_of(cfg, 8), 64, 'cpu')
  mesh = setup.make_mesh(cfg)
  whole = shapes.shapes_of(cfg, adapters, mesh, 64)
  tx = optim.make_optimizer(setup.optim_config(cfg))

  def made(tree):
    return jax.tree.map(
      lambda x: jax.device_put(jax.numpy.zeros(x.shape, x.dtype), x.sharding),
      tree,
    )

  def on_first(tree):
    return sum(
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
    )

  state = step_lib.init_state(made(whole.state.trainable), tx)
  assert found.given['frozen weights'] == on_first(made(whole.frozen))
  assert found.given['adapters'] == on_first(state.trainable)
  assert found.given['optimizer'] == on_first(made(whole.state.opt_state))
  assert found.given['batch'] == on_first(made(whole.batch))


def lora_flops(m, remat, length, rank):
  """FLOPs a token, of attention what is seen.

  2 N forward and 2 N to the inputs; six a trained parameter; attention two
  products forward and five backward. Whole layers computed twice do all again
  but the last product and its B.
  """
  d, e, k, f = m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim, m.mlp
  pairs = [(d, e), (d, k), (d, k), (e, d), (d, f), (d, f), (f, d)]
  layer = sum(a * b for a, b in pairs)
  factors = rank * sum(a + b for a, b in pairs)
  seen = sum(min(t + 1, m.window or length) for t in range(length)) / length
  scores = 2 * seen * e
  total = m.layers * (4 * layer + 6 * factors + 7 * scores) + 4 * d * m.vocab
  if remat == 'full':
    again = layer - f * d + factors - rank * d
    total += m.layers * (2 * again + 2 * scores)
  return total


@pytest.mark.parametrize(
  ('model', 'length', 'remat', 'platform'),
  [
    (SMALL, 128, 'none', 'cpu'),
    (SMALL, 1024, 'full', 'gpu'),
    (MISTRAL_7B, 2048, 'dots', 'tpu'),
    (MISTRAL_7B, 8192, 'full', 'gpu'),
  ],
)
def test_flops_are_those_of_the_papers(model, length, remat, platform):
  cfg, adapters = run(model, length, 1, remat)
  found = estimate.estimate(
    cfg, adapters, shapes.mesh_of(cfg, 1), length, platform
  )
  expected = lora_flops(model, remat, length, cfg.lora.rank) * length
  assert found.flops == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize('length', [512, 4096, 16384])
def test_needed_flops_see_the_mask_and_the_window(length):
  _, adapters = run(MISTRAL_7B, length, 1)
  frozen, _ = setup.abstract(run(MISTRAL_7B)[0], adapters)
  needed = estimate.needed_flops(adapters, frozen, length)
  seen = sum(min(t + 1, 4096) for t in range(length)) / length
  assert needed['4 N'] == 4 * 7_110_393_856
  assert needed['adapters'] == 6 * 41_943_040
  assert needed['attention'] == pytest.approx(14 * 32 * 32 * 128 * seen)


@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_no_policy_keeps_a_weight_made_whole(remat):
  def made(**model):
    cfg, adapters = run(length=64, rows=16, remat=remat, model=model)
    mesh = shapes.mesh_of(cfg, 8)
    return estimate.estimate(cfg, adapters, mesh, 64, 'cpu').made

  kept = 'saved activations'
  assert made(quant='nf4')[kept] == made()[kept]


@pytest.mark.parametrize('quant', ['nf4', 'int8'])
def test_what_fsdp_gathers_is_what_a_quantised_weight_stands_for(quant):
  # As XLA has it for 8 H100: parts of W in bfloat16, made before they travel.
  def received(**model):
    cfg, adapters = run(model={'dtype': 'bfloat16', **model})
    mesh = shapes.mesh_of(cfg, 4)
    whole = shapes.shapes_of(cfg, adapters, mesh, 64)
    return estimate.collectives(cfg, whole, mesh)['all-gather']

  kept = {'param_dtype': 'bfloat16'}
  assert received(quant=quant, **kept) == received(**kept)


def test_of_all_weights_two_more_a_parameter_are_needed():
  cfg, adapters = run(MISTRAL_7B, method='full')
  frozen, _ = setup.abstract(cfg, adapters)
  needed = estimate.needed_flops(adapters, frozen, 64)
  assert needed['4 N'] + needed['gradients'] == 6 * 7_110_393_856


def test_full_remat_saves_the_input_of_each_layer():
  cfg, adapters = run(length=64, rows=16)
  found = estimate.estimate(cfg, adapters, shapes.mesh_of(cfg, 8), 64, 'cpu')
  assert found.made['saved activations'] == 6 * 2 * 64 * 256 * 4


def test_collectives_by_hand(monkeypatch):
  """W and the adapters cut by fsdp are gathered twice, gradients summed once."""
  monkeypatch.setattr(parallel, 'SMALL', 0)
  cfg, adapters = run(
    rows=8, lora={'targets': 'q_proj', 'rank': 4}, train={'grad_accum': 3}
  )
  mesh = shapes.mesh_of(cfg, 8)
  m = SMALL
  per_layer = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.hidden * m.mlp  # fmt: skip
  # Norms and B of q_proj, [4, 256], are whole everywhere; A is cut.
  cut = m.layers * per_layer + 2 * m.vocab * m.hidden
  a_bytes = m.layers * 4 * m.hidden * 4
  whole = shapes.shapes_of(cfg, adapters, mesh, 64)
  found = estimate.collectives(cfg, whole, mesh)
  assert found == {
    'all-gather': 2 * 3 * (4 * cut + a_bytes) * 7 // 8,
    'reduce-scatter': 3 * a_bytes * 7 // 8,
    'all-reduce': 3 * 2 * a_bytes * 7 // 8,
  }
