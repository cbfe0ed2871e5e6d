"""Schedules and AdamW.

References: tests/golden/schedules.json, transformers' schedules; the update
formula of Loshchilov & Hutter 2019, algorithm 2, in numpy float64.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

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
