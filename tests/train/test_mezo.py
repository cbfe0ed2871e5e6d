"""Steps without gradients: MeZO.

References: algorithm 1 of Malladi et al. 2023 in numpy float64, with the
directions handed over; the loop over probes for those at once; and for a replay
the run itself, to the bit.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from lorax_train import __main__ as verbs
from lorax_train import config, lora
from lorax_train.errors import ConfigError, ResumeError
from lorax_train.formats import hf_config
from lorax_train.lora import LoraSpec, perturbed
from lorax_train.plan import chips, verdict
from lorax_train.train import loop, mezo, replay, setup
from lorax_train.train.step import TrainState
from tests.train.test_loop import make_config, metrics

V, D, EPS, RATE = 7, 4, 1e-2, 0.05


def params_of(dtype=jnp.float32):
  normal = np.random.default_rng(0).standard_normal
  shapes = {'table': (V, D), 'stack': (2, D, D), 'head': (D, V)}
  return {n: jnp.asarray(normal(s), dtype) for n, s in shapes.items()}


def apply(params, ids):
  """Logits [B, T, V] of a table, two layers and a head."""
  x = params['table'][ids]
  x, _ = jax.lax.scan(
    lambda x, w: (x + jnp.tanh(x @ w), None), x, params['stack']
  )
  return (x @ params['head']).astype(jnp.float32)


def loss_in_numpy(params, batch):
  """Mean cross-entropy of the next token, in float64."""
  p = {name: np.asarray(w, np.float64) for name, w in params.items()}
  ids = batch['ids'].reshape(-1, batch['ids'].shape[-1])
  labels = batch['labels'].reshape(ids.shape)[:, 1:]
  x = p['table'][ids]
  for w in p['stack']:
    x = x + np.tanh(x @ w)
  logits = (x @ p['head'])[:, :-1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  own = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
  return -own[labels != -100].mean()


def batch_of(micro=2):
  ids = np.random.default_rng(1).integers(0, V, (micro, 3, 6), np.int32)
  labels = np.where(np.arange(6) < 2, -100, ids)
  return {'ids': ids, 'labels': labels.astype(np.int32)}


def halves_of(weights, dtype=jnp.float32):
  params = params_of(dtype)
  if weights == 'all':
    layout = {'table': 'vo', 'stack': 'sio', 'head': 'io'}
    return lora.all_whole(params, layout)
  frozen, trainable = lora.split(
    jax.random.key(0), params, LoraSpec('stack,head', rank=2, alpha=4)
  )
  # As after some steps: B no longer nothing.
  return frozen, jax.tree.map(lambda x: x + 0.1, trainable)


def step_of(probes, at_once):
  return mezo.make_train_step(
    apply,
    optax.linear_schedule(RATE, 0.0, 10),
    mezo.root_key(3),
    mezo.MezoConfig(EPS, probes, at_once),
  )


def authors(frozen, trainable, batch, probes):
  """(loss, g [P], weights) of a step of algorithm 1 at step 0."""
  keys = mezo.directions(mezo.root_key(3), jnp.int32(0), probes)
  zero = jax.tree.map(jnp.zeros_like, trainable)
  step = jax.jit(perturbed.stepped)
  w = jax.tree.map(lambda x: np.asarray(x, np.float64), trainable)
  losses, slopes, new = [], [], w
  for key in keys:
    z = step(frozen, zero, key[None], jnp.ones(1))
    z = jax.tree.map(lambda x: np.asarray(x, np.float64), z)
    ahead, behind = (
      loss_in_numpy(merged(frozen, along(w, z, s * EPS)), batch)
      for s in (1, -1)
    )
    losses += [ahead, behind]
    slopes.append((ahead - behind) / (2 * EPS))
    new = along(new, z, -RATE * slopes[-1] / probes)
  return np.mean(losses), np.array(slopes), new


def along(weights, z, far):
  return jax.tree.map(lambda w, z: w + far * z, weights, z)


def merged(frozen, trainable):
  """W + scale A^T B in float64."""

  def of(half, own):
    if own is None:
      return half
    if not isinstance(half, lora.Fixed):
      return own
    scale = np.asarray(half.scale, np.float64)
    ab = np.einsum('...ri,...ro,...->...io', own.a, own.b, scale)
    return np.asarray(half.w, np.float64) + ab

  is_leaf = lambda x: x is None or lora.is_trained(x)  # noqa: E731
  return jax.tree.map(of, frozen, trainable, is_leaf=is_leaf)


@pytest.mark.parametrize(
  ('weights', 'probes', 'at_once'),
  [('lora', 3, True), ('lora', 3, False), ('all', 1, False)],
)
@pytest.mark.usefixtures('strict')
def test_a_step_is_that_of_the_authors(weights, probes, at_once):
  frozen, trainable = halves_of(weights)
  batch = batch_of()
  state = TrainState(jnp.int32(0), trainable, ())
  state, got = jax.jit(step_of(probes, at_once))(state, frozen, batch)
  loss, slopes, new = authors(frozen, trainable, batch, probes)
  assert float(got['loss']) == pytest.approx(loss, rel=1e-6)
  assert int(got['tokens']) == (batch['labels'][..., 1:] != -100).sum()
  assert float(got['learning_rate']) == pytest.approx(RATE)
  # A difference of losses of 1e-2: float32 leaves it five digits.
  np.testing.assert_allclose(got['slopes'], slopes, atol=2e-4)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5),
    state.trainable,
    new,
  )
  assert int(state.step) == 1


@pytest.mark.parametrize(
  ('weights', 'dtype'),
  [('lora', 'float32'), ('all', 'bfloat16')],
)
def test_a_log_gives_the_weights_again_to_the_bit(weights, dtype):
  frozen, trainable = halves_of(weights, dtype)
  step, batch = jax.jit(step_of(2, weights == 'lora')), batch_of()
  state, log = TrainState(jnp.int32(0), trainable, ()), []
  for _ in range(5):
    state, got = step(state, frozen, batch)
    log.append((np.asarray(got['learning_rate']), np.asarray(got['slopes'])))
  # Through JSON, as on disk.
  log = [
    (np.float32(rate), np.float32(slopes))
    for rate, slopes in json.loads(
      json.dumps([(float(r), list(map(float, g))) for r, g in log])
    )
  ]
  update = jax.jit(mezo.make_update(mezo.root_key(3)))
  again = trainable
  for at, (rate, slopes) in enumerate(log):
    again = update(again, frozen, np.int32(at), slopes, rate)
  jax.tree.map(np.testing.assert_array_equal, again, state.trainable)
  changed = jax.tree.map(lambda x, y: (x != y).any(), trainable, again)
  assert all(jax.tree.leaves(changed))


def mezo_config(model, rows, run_dir, param_dtype='bfloat16', **keys):
  """A run on all weights."""
  sections = {'lora': {'rank': 8, 'alpha': 16.0}, 'eval': {'rows': 0}}
  cfg = make_config(model, rows, run_dir, **sections)
  return dataclasses.replace(
    cfg,
    method='mezo',
    mezo=config.MezoSection('all', 1e-3, 2),
    model=dataclasses.replace(cfg.model, param_dtype=param_dtype),
    train=dataclasses.replace(cfg.train, learning_rate=1e-3, **keys),
  )


def test_a_run_goes_on_and_is_replayed_to_the_bit(
  tiny_model, rows_file, tmp_path, capsys
):
  run_dir = tmp_path / 'run'
  loop.run(mezo_config(tiny_model, rows_file, run_dir, steps=2))
  # As if it had been cut off after a step that no checkpoint has.
  with open(run_dir / replay.FILE, 'a') as file:
    file.write('{"step": 3, "learning_rate": 1.0, "slopes": [1.0, 1.0]}\n{"st')
  cfg = mezo_config(tiny_model, rows_file, run_dir, steps=4)
  assert loop.run(cfg) == run_dir / 'model'
  said = capsys.readouterr().out
  assert 'resumed    at step 2' in said
  assert 'compute float32, trained weights bfloat16, no gradients' in said
  log = replay.read(run_dir)
  assert [len(slopes) for _, slopes in log] == [2] * 4
  norms = [np.sqrt(np.mean(np.square(slopes))) for _, slopes in log]
  told = [value for _, value in metrics(run_dir, 'projected_grad')]
  np.testing.assert_allclose(told, norms, rtol=1e-6)

  out = tmp_path / 'again'
  assert verbs.cli(['replay', str(run_dir), '--out', str(out)]) == 0
  files = [d / 'model.safetensors' for d in (run_dir / 'model', out)]
  made, again = (load_file(file) for file in files)
  base = load_file(tiny_model / 'model.safetensors')
  assert made.keys() == again.keys() == base.keys()
  for name in made:
    assert made[name].dtype == 'bfloat16'
    np.testing.assert_array_equal(made[name], again[name])
    rounded = base[name].astype(made[name].dtype)
    assert (made[name] != rounded).any()


# (what is done to the run, error, what it says)
UNPLAYABLE = [
  ('method', ConfigError, r'of method=lora, which leaves no log'),
  ('gone', ResumeError, r'no log of a MeZO run, or damaged'),
  ('cut', ResumeError, r'no log of a MeZO run, or damaged'),
  ('gap', ResumeError, r'its 1 lines are not of steps 1 to 2'),
  ('there', ConfigError, r'exists already'),
  ('base', ResumeError, r'are not those that it started from'),
]


@pytest.mark.parametrize(('harm', 'error', 'says'), UNPLAYABLE)
def test_what_cannot_be_replayed(
  harm, error, says, tiny_model, rows_file, tmp_path
):
  run_dir, out = tmp_path / 'run', tmp_path / 'out'
  run_dir.mkdir()
  cfg = mezo_config(tiny_model, rows_file, run_dir)
  if harm == 'method':
    cfg = make_config(tiny_model, rows_file, run_dir)
  loop.rundir.write_config(run_dir, config.to_mapping(cfg), {'weights': 'old'})
  line = '{"step": %d, "learning_rate": 0.1, "slopes": [0.5]}\n'
  text = {'cut': line[:30] + '\n', 'gap': line % 2}.get(harm, line % 1)
  if harm != 'gone':
    (run_dir / replay.FILE).write_text(text)
  if harm == 'there':
    out.mkdir()
  with pytest.raises(error, match=says):
    replay.replay(str(run_dir), str(out))


def test_a_line_that_was_cut_off_is_no_step(tmp_path):
  line = '{"step": %d, "learning_rate": 0.1, "slopes": [0.5, 2]}\n'
  (tmp_path / replay.FILE).write_text(line % 1 + line % 2 + (line % 3)[:-1])
  log = replay.read(tmp_path)
  assert [rate for rate, _ in log] == [np.float32(0.1)] * 2
  assert [slopes.tolist() for _, slopes in log] == [[0.5, 2.0]] * 2


# (keys, what is wrong with them)
REFUSED = [
  (
    {'train.clip_norm': 0.0},
    r'train\.clip_norm=0\.0: method=mezo makes no use',
  ),
  ({'train.beta1': 0.5, 'train.epsilon': 1e-6}, r'beta1=0\.5.*epsilon=1e-06'),
  ({'lora.dropout': 0.1}, r'lora\.dropout=0\.1: method=mezo makes no use'),
  ({'mezo.weights': 'all', 'lora.rank': 4}, r'lora\.rank: .* of all weights'),
  ({'mezo.epsilon': 0.0}, r'mezo\.epsilon'),
]


@pytest.mark.parametrize(('keys', 'says'), REFUSED)
def test_keys_that_say_nothing_are_refused(keys, says):
  mapping = config.defaults() | {'method': 'mezo'}
  mapping['model']['path'], mapping['data']['path'] = 'model', 'rows.json'
  for key, value in keys.items():
    section, _, name = key.rpartition('.')
    (mapping[section] if section else mapping)[name] = value
  with pytest.raises(ConfigError, match=says):
    config.from_mapping(mapping)


def test_a_step_needs_the_memory_of_inference(tiny_model, rows_file, tmp_path):
  """By formula: no gradients, no optimizer, and no second copy of the model."""
  cfg = mezo_config(tiny_model, rows_file, tmp_path / 'run')
  adapters = setup.plan_adapters(cfg, hf_config.read_config(tiny_model))
  case = verdict.case(cfg, adapters, chips.topology('h100-1'))
  of = case.found
  assert of.given['optimizer'] == of.given['frozen weights'] == 0
  assert of.made['gradients'] == of.made['saved activations'] == 0
  assert of.given['trained weights'] == 2 * 42_208
