"""Whole runs on toy models: what is written, and that it is what was trained.

References: the same run on one device for meshes, the uninterrupted run for
resumed ones, and `score` on the exported adapter.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import config, parallel
from lorax_train.errors import ConfigError, DataError
from lorax_train.formats import hf, hf_config
from lorax_train.infer.score import score
from lorax_train.train import evaluate, loop, optim, rundir, setup
from lorax_train.train import state as state_lib
from tests.toys import random_ids


def make_config(model, rows, run_dir, **sections):
  """A small float32 run; `sections` override keys."""
  mapping = config.defaults()
  mapping['run_dir'] = str(run_dir)
  mapping['model'].update(
    path=str(model), dtype='float32', param_dtype='float32', remat='none'
  )
  mapping['lora'].update(targets='q_proj,v_proj', rank=4, alpha=8.0)
  mapping['data'].update(
    path=str(rows), template='alpaca', max_length=64, truncation='left'
  )
  mapping['train'].update(
    steps=4, batch_size=8, learning_rate=1e-2, schedule='constant'
  )
  mapping['eval'].update(rows=4, every=2, samples=0)
  mapping['checkpoint'].update(every=2)
  for name, values in sections.items():
    mapping[name].update(values)
  return config.from_mapping(mapping)


def metrics(run_dir, key):
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  values = [json.loads(line) for line in lines]
  return [(v['step'], v[key]) for v in values if key in v]


@pytest.mark.slow
def test_the_look_before_the_first_step_is_no_time_of_steps(
  tiny_model, rows_file, tmp_path, monkeypatch
):
  def slow(*args):
    evaluate_of = evaluate.make_evaluate(*args)
    return lambda *trees: time.sleep(5) or evaluate_of(*trees)

  monkeypatch.setattr(loop, 'make_evaluate', slow)
  run_dir = tmp_path / 'run'
  sections = {'train': {'steps': 1}}
  began = time.monotonic()
  loop.run(make_config(tiny_model, rows_file, run_dir, **sections))
  assert time.monotonic() - began > 10  # before and after the step
  ((_, rate),) = metrics(run_dir, 'tokens_per_second')
  # A step of 8 rows of about 60 tokens takes milliseconds.
  assert rate > 8 * 64 / 5


@pytest.mark.compat
def test_a_run_leaves_what_the_contract_says(
  tiny_model, rows_file, tmp_path, capsys
):
  run_dir = tmp_path / 'run'
  cfg = make_config(tiny_model, rows_file, run_dir)
  adapter = loop.run(cfg)
  assert adapter == run_dir / 'adapter'
  assert {p.name for p in adapter.iterdir()} == {
    'adapter_config.json', 'adapter_model.safetensors', 'README.md',
    'tokenizer.json', 'tokenizer_config.json',
  }  # fmt: skip
  written = json.loads((run_dir / 'config.json').read_text())
  assert rundir.flat(written) == rundir.flat(config.to_mapping(cfg))
  assert [step for step, _ in metrics(run_dir, 'loss')] == [1, 2, 3, 4]
  held_out = metrics(run_dir, 'eval_loss')
  assert [step for step, _ in held_out] == [0, 2, 4]
  assert held_out[-1][1] < held_out[0][1]
  for key in ('grad_norm', 'learning_rate', 'tokens_per_second'):
    assert len(metrics(run_dir, key)) == 4
  assert all(0 <= share <= 1 for _, share in metrics(run_dir, 'data_wait'))
  assert len(metrics(run_dir, 'data_wait')) == 4
  steps = {p.name for p in (run_dir / 'checkpoints').iterdir()}
  assert steps == {'2', '4'}
  said = capsys.readouterr().out
  # 3 layers, r 4: q 32 -> 40 and v 32 -> 20.
  trainable = 3 * 4 * ((32 + 40) + (32 + 20))
  assert f'trainable  {trainable:,} of ' in said
  assert 'q_proj x 3 (r 4), v_proj x 3 (r 4)' in said


def test_a_kernel_that_the_mesh_has_not_is_refused_before_weights(
  tiny_model, rows_file, tmp_path, monkeypatch
):
  cfg = make_config(tiny_model, rows_file, tmp_path / 'run')
  model = dataclasses.replace(cfg.model, attention='splash')
  monkeypatch.setattr(hf, 'load_params', None)
  with pytest.raises(
    ConfigError, match=r'model\.attention: splash is a kernel'
  ):
    loop.run(dataclasses.replace(cfg, model=model))


def test_the_exported_adapter_scores_as_it_was_evaluated(
  tiny_model, rows_file, tmp_path
):
  rows = [
    {'input_ids': row.tolist(), 'labels': [-100, *row[1:].tolist()]}
    for row in random_ids(shape=(24, 20))
  ]
  data, held = tmp_path / 'rows.jsonl', tmp_path / 'held.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows[:16])))
  held.write_text('\n'.join(map(json.dumps, rows[16:])))
  run_dir = tmp_path / 'run'
  adapter = loop.run(
    make_config(
      tiny_model, data, run_dir,
      data={'template': 'tokens', 'eval_path': str(held), 'max_length': 64},
    )
  )  # fmt: skip
  arrays = {
    name: np.array([row[key] for row in rows[16:]])
    for name, key in (('ids', 'input_ids'), ('labels', 'labels'))
  }
  np.savez(tmp_path / 'in.npz', **arrays)
  report = score(
    str(tiny_model), tmp_path / 'in.npz', tmp_path / 'out.npz', str(adapter)
  )
  assert report['loss'] == pytest.approx(
    metrics(run_dir, 'eval_loss')[-1][1], rel=1e-5
  )


def losses_on(mesh, model, steps=5):
  """Losses of a few steps of the run's own step on a mesh."""
  cfg = make_config(
    model, 'unused', 'unused', lora={'targets': 'all-linear'},
    train={'steps': steps, 'grad_accum': 2},
  )  # fmt: skip
  model_cfg = hf_config.read_config(model)
  adapters = setup.plan_adapters(cfg, model_cfg)
  with jax.set_mesh(mesh):
    params = hf.load_params(model, model_cfg, jnp.float32, mesh)
    frozen, trainable = setup.split(cfg, params, adapters)
    tx = optim.make_optimizer(setup.optim_config(cfg))
    like = state_lib.abstract_state(tx, frozen, trainable, mesh)
    state = state_lib.init_state(tx, trainable, like)
    step = setup.make_step(cfg, model_cfg, tx, frozen, like, mesh, 'xla')
    ids = random_ids(shape=(2, 8, 20))
    batch = jax.device_put(
      {'ids': ids, 'labels': ids}, parallel.batch_sharding(mesh, axis=1)
    )
    losses = []
    for _ in range(steps):
      state, out = step(state, frozen, batch)
      losses.append(float(out['loss']))
  return losses, state


@pytest.mark.compat
@pytest.mark.parametrize(
  'sizes, small',
  [
    ((2, 2, 2), 0),
    pytest.param((8, 1, 1), 0, marks=pytest.mark.slow),
    pytest.param((1, 8, 1), 0, marks=pytest.mark.slow),
    pytest.param((1, 2, 4), 2**26, marks=pytest.mark.slow),
  ],
)
def test_any_mesh_gives_the_losses_of_one_device(
  sizes, small, tiny_model, one_device, monkeypatch
):
  monkeypatch.setattr(parallel, 'SMALL', small)
  mesh = parallel.make_mesh(*sizes)
  got, state = losses_on(mesh, tiny_model)
  want, _ = losses_on(one_device, tiny_model)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert want[-1] < want[0]
  # The factors are cut as their weight is, small ones over tensor alone, and
  # the rank axis never.
  mlp = state.trainable['layers']['mlp']['up_proj']
  ways = 1 if small else sizes[1]
  assert mlp.a.sharding.shard_shape(mlp.a.shape) == (3, 4, 32 // ways)
  assert mlp.b.sharding.shard_shape(mlp.b.shape) == (3, 4, 48 // sizes[2])


@pytest.mark.parametrize(
  'options',
  [
    {'targets': 'all-linear', 'dropout': 0.1},
    {'targets': 'q_proj,embed_tokens', 'variant': 'dora'},
    {'targets': 'q_proj', 'variant': 'lora_fa'},
    {'targets': 'v_proj', 'init': 'pissa', 'modules_to_save': 'lm_head,norm'},
    {'targets': 'v_proj', 'trainable_token_indices': '1,5'},
  ],
  ids=lambda options: '-'.join(map(str, options.values())),
)
def test_shapes_are_those_of_the_run(options, tiny_model):
  """What `plan` compiles is what a run compiles, and lies where it does."""
  cfg = make_config(tiny_model, 'unused', 'unused', lora=options)
  model_cfg = hf_config.read_config(tiny_model)
  adapters = setup.plan_adapters(cfg, model_cfg)
  mesh = parallel.make_mesh(2, 2, 2)
  tx = optim.make_optimizer(setup.optim_config(cfg))
  with jax.set_mesh(mesh):
    params = hf.load_params(tiny_model, model_cfg, jnp.float32, mesh)
    halves = setup.split(cfg, params, adapters)
  shapes = setup.abstract(cfg, adapters, mesh)
  for real, shape in zip(halves, shapes, strict=True):
    assert jax.tree.structure(real) == jax.tree.structure(shape)
    assert list(map(jax.typeof, jax.tree.leaves(real))) == list(
      map(jax.typeof, jax.tree.leaves(shape))
    )
  of_halves, of_shapes = (
    jax.tree.leaves(state_lib.abstract_state(tx, *each, mesh))
    for each in (halves, shapes)
  )
  assert of_halves == of_shapes
  for real, shape in zip(
    *(jax.tree.leaves(tree[0]) for tree in (halves, shapes)), strict=True
  ):
    if real.committed:
      assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)


def test_a_second_start_does_nothing_and_a_longer_one_continues(
  tiny_model, rows_file, tmp_path, capsys
):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  dropout = {'dropout': 0.2}
  loop.run(make_config(tiny_model, rows_file, whole, lora=dropout))
  short = make_config(
    tiny_model, rows_file, parts, lora=dropout, train={'steps': 2}
  )
  loop.run(short)
  before = (parts / 'metrics.jsonl').read_bytes()
  capsys.readouterr()
  loop.run(short)
  assert 'already done: 2 steps' in capsys.readouterr().out
  assert (parts / 'metrics.jsonl').read_bytes() == before
  loop.run(make_config(tiny_model, rows_file, parts, lora=dropout))
  assert 'resumed    at step 2' in capsys.readouterr().out
  for key in ('loss', 'grad_norm', 'eval_loss'):
    assert metrics(parts, key) == metrics(whole, key)
  name = 'adapter/adapter_model.safetensors'
  assert (parts / name).read_bytes() == (whole / name).read_bytes()
  with pytest.raises(ConfigError, match=r'train\.steps=3: .* is at step 4'):
    loop.run(
      make_config(
        tiny_model, rows_file, parts, lora=dropout, train={'steps': 3}
      )
    )


def test_starting_from_an_adapter_continues_its_function(
  tiny_model, rows_file, tmp_path
):
  first = loop.run(
    make_config(
      tiny_model, rows_file, tmp_path / 'first',
      lora={
        'targets': 'q_proj,down_proj', 'rank_pattern': 'layers.1.*=2',
        'variant': 'rslora',
      },
    )
  )  # fmt: skip
  second = loop.run(
    make_config(
      tiny_model, rows_file, tmp_path / 'second',
      lora={'init_from': str(first)}, train={'steps': 1},
    )
  )  # fmt: skip
  ends = metrics(tmp_path / 'first', 'eval_loss')[-1]
  begins = metrics(tmp_path / 'second', 'eval_loss')[0]
  assert begins[1] == pytest.approx(ends[1], rel=1e-6)
  one, two = (
    load_file(d / 'adapter_model.safetensors') for d in (first, second)
  )
  assert {k: v.shape for k, v in one.items()} == {
    k: v.shape for k, v in two.items()
  }
  configs = [
    json.loads((d / 'adapter_config.json').read_text()) for d in (first, second)
  ]
  assert configs[0] == configs[1]


def test_a_step_is_compiled_once(tiny_model, rows_file, tmp_path):
  compiled = []

  def listen(event, _seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  def count(steps):
    compiled.clear()
    loop.run(
      make_config(
        tiny_model, rows_file, tmp_path / f'run{steps}',
        train={'steps': steps}, checkpoint={'every': 50}, eval={'every': 50},
      )
    )  # fmt: skip
    return len(compiled)

  jax.monitoring.register_event_duration_secs_listener(listen)
  count(1)  # fills the caches of what is shared between runs
  assert count(7) == count(3)


@pytest.mark.compat
@pytest.mark.parametrize(
  ('lengths', 'steps'),
  [pytest.param('', 50, marks=pytest.mark.slow), ('24,40', 8)],
)
def test_of_rows_of_all_lengths_the_step_is_compiled_once(
  lengths, steps, tiny_model, tokens_file, tmp_path, capsys
):
  """jax itself counts; with buckets, once for each of their lengths."""
  compiled = []

  def listen(event, _seconds, **facts):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(facts['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  loop.run(
    make_config(
      tiny_model, tokens_file, tmp_path / 'run',
      data={'template': 'tokens', 'max_length': 40, 'buckets': lengths},
      train={'steps': steps}, checkpoint={'every': 50}, eval={'rows': 0},
    )
  )  # fmt: skip
  jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled.count('jit(train_step)') == 1 + bool(lengths)
  said = capsys.readouterr().out
  assert ('(for 24, 40 tokens)' in said) == bool(lengths)


def test_fewer_rows_than_a_batch_repeat(tiny_model, rows_file, tmp_path):
  rows = json.loads(rows_file.read_text())[:3]
  rows_file.write_text(json.dumps(rows))
  loop.run(make_config(tiny_model, rows_file, tmp_path / 'run'))
  assert len(metrics(tmp_path / 'run', 'loss')) == 4
  assert metrics(tmp_path / 'run', 'eval_loss') == []


def test_a_finished_run_survives_another_data_file(
  tiny_model, rows_file, tmp_path
):
  run_dir = tmp_path / 'run'
  cfg = make_config(tiny_model, rows_file, run_dir, train={'steps': 1})
  loop.run(cfg)
  rows_file.write_text('[]')
  with pytest.raises(DataError):
    loop.run(cfg)
  assert (run_dir / 'adapter' / 'adapter_model.safetensors').exists()


@pytest.mark.slow
def test_what_begins_from_the_base_resumes_and_is_exported(
  tiny_model, rows_file, tmp_path
):
  # A is frozen, the lengths of columns are trained, embeddings are noisy.
  sections = {
    'lora': {'variant': 'dora+lora_fa', 'init': 'pissa'},
    'eval': {'rows': 4, 'every': 2},
  }

  def config_of(name, steps):
    learn = {'steps': steps, 'neftune_alpha': 5.0, 'lora_plus_ratio': 2.0}
    return make_config(
      tiny_model, rows_file, tmp_path / name, train=learn, **sections
    )

  whole = loop.run(config_of('whole', 4))
  loop.run(config_of('parts', 2))
  parts = loop.run(config_of('parts', 4))
  want = load_file(whole / 'adapter_model.safetensors')
  got = load_file(parts / 'adapter_model.safetensors')
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], name)
  ranks = {name.rpartition('.lora_A')[0]: len(x) for name, x in want.items()
           if 'lora_A' in name}  # fmt: skip
  assert set(ranks.values()) == {8}  # B A less B0 A0, of rank 4 each
  # The base's own loss, then the adapter's, as `eval` finds it again.
  first, last = (
    loss for _, loss in metrics(tmp_path / 'whole', 'eval_loss')[::2]
  )
  report = evaluate.evaluate_run(str(tmp_path / 'whole'))
  assert report['base']['loss'] == pytest.approx(first, abs=1e-5)
  assert report['adapted']['loss'] == pytest.approx(last, abs=1e-5)
  assert last < first
