"""Schedules and optimizers.

References: tests/golden/schedules.json, transformers' schedules; the update
formulas of the papers in numpy float64, a layer at a time: AdamW's (Loshchilov &
Hutter 2019, algorithm 2), Adafactor's (Shazeer & Stern 2018, algorithm 4), Muon's
(Jordan et al. 2024; Liu et al. 2025), Lion's (Chen et al. 2023, algorithm 2).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.train import optim


def test_schedules_equal_those_of_transformers(golden):
  cases = json.loads((golden / 'schedules.json').read_text())['cases']
  assert len(cases) == 6
  for case in cases:
    schedule = optim.make_schedule(
      optim.OptimConfig(
        steps=case['total'],
        learning_rate=1.0,
        schedule=case['schedule'],
        warmup_steps=case['warmup'],
      )
    )
    rates = [float(schedule(i)) for i in range(len(case['rates']))]
    np.testing.assert_allclose(rates, case['rates'], atol=1e-6, err_msg=case)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_a_warm_up_longer_than_the_run(schedule):
  rates = optim.make_schedule(optim.OptimConfig(3, 1.0, schedule, 10))
  np.testing.assert_allclose(
    [float(rates(i)) for i in range(3)], [0, 0.1, 0.2], rtol=1e-6
  )


@pytest.mark.parametrize(
  ('clip', 'decay', 'scale'), [(0, 0, 1), (0, 0.1, 1), (1.0, 0.01, 9), (5, 0, 1e-2)]
)  # fmt: skip
def test_adamw_equals_the_paper(clip, decay, scale):
  cfg = optim.OptimConfig(
    5, 1e-2, weight_decay=decay, clip_norm=clip, beta1=0.8, beta2=0.95
  )
  rng = np.random.default_rng(0)
  w = rng.normal(size=7)
  tx = optim.make_optimizer(cfg)
  params = jnp.asarray(w, jnp.float32)
  state = tx.init(params)
  m = v = np.zeros(7)
  for t in range(1, 6):
    g = scale * rng.normal(size=7)
    updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
    params = params + updates
    norm = np.linalg.norm(g)
    if clip and norm > clip:
      g = g * clip / norm
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
    m_hat, v_hat = m / (1 - 0.8**t), v / (1 - 0.95**t)
    w = w - 1e-2 * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)
    np.testing.assert_allclose(params, w, rtol=1e-5, atol=1e-6)


# The whole of a model: two layers, [in, out] and norms, and an embedding.
SHAPES = {
  'layers': {'up': (2, 5, 8), 'down': (2, 8, 5), 'norm': (2, 5)},
  'embed_tokens': (9, 5),
  'norm': (5,),
}
LARGE = {'layers': {'up': (2, 130, 128), 'norm': (2, 130)}, 'norm': (130,)}
STEPS, RATE, DECAY = 3, 1e-2, 0.1


def trees(shapes, seed=0):
  """Weights, and gradients of each step."""
  rng = np.random.default_rng(seed)
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  one = lambda: jax.tree.map(  # noqa: E731
    lambda shape: rng.normal(size=shape), shapes, is_leaf=is_shape
  )
  return one(), [one() for _ in range(STEPS)]


def by_hand(shapes, rule, in_layer):
  """The weights after all steps: each layer's own, norms without decay."""
  weights, grads = trees(shapes)

  def trained(path, w):
    stacked = path[0].key == 'layers'
    layers = []
    for layer in range(len(w)) if stacked else [...]:
      x, state = w[layer], {}
      for t, tree in enumerate(grads, 1):
        g = tree
        for key in path:
          g = g[key.key]
        update = rule(g[layer], t, state, stacked and in_layer)
        x = x - RATE * (update + DECAY * x * (x.ndim > 1))
      layers.append(x)
    return np.stack(layers) if stacked else layers[0]

  return jax.tree_util.tree_map_with_path(trained, weights)


def adam(g, t, state, beta1=0.8, beta2=0.95):
  m = state['m'] = beta1 * state.get('m', 0) + (1 - beta1) * g
  v = state['v'] = beta2 * state.get('v', 0) + (1 - beta2) * g * g
  return m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)


def adafactor(g, t, state, _):
  keep, square = 1 - t**-0.8, g * g + 1e-30
  if g.ndim == 2 and min(g.shape) >= 128:
    row = state['row'] = keep * state.get('row', 0) + (1 - keep) * square.mean(
      1
    )
    column = state['column'] = keep * state.get('column', 0) + (
      1 - keep
    ) * square.mean(0)
    v = np.outer(row, column) / row.mean()
  else:
    v = state['v'] = keep * state.get('v', 0) + (1 - keep) * square
  update = g / np.sqrt(v)
  return update / max(1.0, np.sqrt(np.mean(update**2)))


def muon(g, t, state, in_layer):
  if g.ndim < 2 or not in_layer:
    return adam(g, t, state)
  m = state['m'] = 0.9 * state.get('m', 0) + 0.1 * g
  # Nesterov's, both without the bias of a start from 0.
  x = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return 0.2 * np.sqrt(max(g.shape)) * x


def lion(g, t, state, _):
  m = state.get('m', np.zeros_like(g))
  state['m'] = 0.95 * m + 0.05 * g
  return np.sign(0.8 * m + 0.2 * g)


def sgd(g, t, state, _):
  state['m'] = 0.9 * state.get('m', 0) + g
  return state['m']


@pytest.mark.parametrize(('name', 'rule', 'shapes'), [
  ('adamw', lambda g, t, state, _: adam(g, t, state), SHAPES),
  ('adafactor', adafactor, SHAPES),
  ('adafactor', adafactor, LARGE),
  ('muon', muon, SHAPES),
  ('lion', lion, SHAPES),
  ('sgd', sgd, SHAPES),
])  # fmt: skip
def test_an_optimizer_of_all_weights_equals_its_paper(name, rule, shapes):
  weights, grads = trees(shapes)
  tx = optim.make_optimizer(
    optim.OptimConfig(
      STEPS, RATE, optimizer=name, weight_decay=DECAY, momentum=0.9,
      beta1=0.8, beta2=0.95, full=True,
    )
  )  # fmt: skip
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for g in grads:
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    updates, state = update(g, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  want = by_hand(shapes, rule, in_layer=True)
  for got, hand in zip(
    jax.tree.leaves(params), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(got, hand, rtol=1e-4, atol=1e-5)


def test_factors_have_all_but_muon_and_padding_stays_zero():
  """Rows of A and B past a layer's rank are 0, and their gradients are."""
  a = np.ones((2, 3, 5), np.float32)
  a[1, 2] = 0
  factors = {'layers': {'q': lora.Adapter(jnp.asarray(a), jnp.asarray(a))}, 'norm': None}  # fmt: skip
  for name in ('adamw', 'adafactor', 'lion', 'sgd'):
    tx = optim.make_optimizer(
      optim.OptimConfig(STEPS, RATE, optimizer=name, weight_decay=DECAY)
    )
    updates, _ = tx.update(factors, tx.init(factors), factors)
    new = jax.tree.map(jnp.add, factors, updates)['layers']['q']
    assert not np.asarray(new.a[1, 2]).any()
    assert (np.asarray(new.b[0]) < 1).all()
    assert jax.tree.structure(updates) == jax.tree.structure(factors)


def test_layers_of_which_some_are_trained_are_matrices_too():
  """Adafactor of stacks of several lengths, and of none: as of each alone."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  params = {'layers': {'q': draw(3, 128, 130), 'down': draw(1, 130, 128)}}
  grads = jax.tree.map(lambda x: draw(*x.shape), params)
  cfg = optim.OptimConfig(1, 0.1, optimizer='adafactor')

  def moved(names):
    tx = optim.make_optimizer(cfg)
    own, g = (
      {'layers': {n: t['layers'][n] for n in names}} for t in (params, grads)
    )
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(g, own)[
      'layers'
    ]

  both = moved(['q', 'down'])
  for name in ('q', 'down'):
    np.testing.assert_allclose(both[name], moved([name])[name], rtol=1e-6)
  head = {'head': draw(4, 4)}
  tx = optim.make_optimizer(cfg)
  assert tx.update(head, tx.init(head), head)[0]['head'].shape == (4, 4)
