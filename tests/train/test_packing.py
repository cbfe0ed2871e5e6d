"""Training on packs: each row is learned as it would be alone.

Reference: the same rows, one in a row of a batch, on real weights; for runs the
uninterrupted run, and the run without packing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora, parallel
from lorax_train.data import batches
from lorax_train.data.packing import pack_rows
from lorax_train.data.source import Row
from lorax_train.data.tokenize import load_tokenizer, tokenize_rows
from lorax_train.errors import ResumeError
from lorax_train.formats import hf, hf_config
from lorax_train.models import ops
from lorax_train.models import params as params_lib
from lorax_train.train import loop, reading, setup
from lorax_train.train import step as step_lib
from tests.train.test_loop import make_config, metrics

LENGTH = 256


@pytest.fixture
def real(shared, one_device):
  """(model_cfg, params, packs, their rows alone), the latter two as batches."""
  directory = shared / 'models' / 'stories260K-mistral'
  model_cfg = hf_config.read_config(directory)
  params = hf.load_params(directory, model_cfg, jnp.float32, one_device)
  text = (shared / 'data' / 'tinystories_v2_1MB.txt').read_text('utf-8')
  stories = [story.strip() for story in text.split('<|endoftext|>')[:40]]
  begun = [
    Row({'prompt': story[:30], 'completion': story[30 : 60 + 9 * n]}, '')
    for n, story in enumerate(stories)
  ]
  rows = tokenize_rows(
    begun, 'prompt_completion', load_tokenizer(directory), LENGTH
  )
  lengths = [len(ids) for ids in rows.ids]
  packs = pack_rows(lengths, LENGTH, np.arange(len(lengths))).rows[-4:]
  assert list(map(len, packs)) == [2, 3, 6, 1]
  packed = batches.pad_packs(
    [[rows.ids[i] for i in pack] for pack in packs],
    [[rows.labels[i] for i in pack] for pack in packs],
    LENGTH,
    pad_id=0,
  )
  flat = [i for pack in packs for i in pack]
  alone = batches.pad_batch(
    [rows.ids[i] for i in flat], [rows.labels[i] for i in flat], LENGTH, 0
  )
  return model_cfg, params, packed, alone


def apply_of(model_cfg, remat='none', dtype='float32'):
  cfg = make_config('unused', 'unused', 'unused')
  model = dataclasses.replace(cfg.model, remat=remat, dtype=dtype)
  return setup.make_apply(dataclasses.replace(cfg, model=model), model_cfg)


def token_losses(before_head, batch):
  """Losses of the learned tokens, in the order that they stand in."""
  logits = ops.dot(*before_head, jnp.float32)
  log_p = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
  labels = batch['labels'][:, 1:]
  losses = np.take_along_axis(-log_p, np.maximum(labels, 0)[..., None], 2)
  return losses[..., 0][labels != -100]


@pytest.mark.compat
@pytest.mark.parametrize('window', [None, 16])
def test_a_token_in_a_pack_has_the_loss_of_its_row_alone(window, real, strict):
  """In float64: logits reach 23, and sums in float32 part them by 1e-5."""
  model_cfg, params, packed, alone = real
  model_cfg = dataclasses.replace(model_cfg, window=window)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda w: w.astype(jnp.float64), params)
    apply = jax.jit(apply_of(model_cfg, dtype='float64'))
    in_packs = apply(
      params, packed['ids'], packed['positions'], packed['segments']
    )
    want = token_losses(apply(params, alone['ids']), alone)
    got = token_losses(in_packs, packed)
    assert len(want) > 200
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    # Of tokens that saw the rows before them, it is not.
    mixed = token_losses(apply(params, packed['ids']), packed)
    assert np.abs(mixed - want).max() > 0.1


@pytest.mark.compat
@pytest.mark.parametrize(
  'remat', ['none', pytest.param('full', marks=pytest.mark.slow)]
)
def test_gradients_of_packs_are_those_of_their_rows(remat, real, strict):
  model_cfg, params, packed, alone = real
  model_cfg = dataclasses.replace(model_cfg, window=16)
  frozen, trainable = lora.split(
    jax.random.key(0),
    params,
    lora.LoraSpec('all-linear', rank=4),
    params_lib.module_names(model_cfg),
  )
  keys = iter(jax.random.split(jax.random.key(1), 99))
  trainable = jax.tree.map(  # B begins as zero, and would hide A's gradient
    lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), trainable
  )
  loss = step_lib.make_loss(apply_of(model_cfg, remat))

  def grads(batch):
    micro = {name: x for name, x in batch.items() if name != 'mask'}
    value = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return value(trainable, frozen, micro, None)

  (got, n_got), of_packs = grads(packed)
  (want, n_want), of_rows = grads(alone)
  assert int(n_got) == int(n_want) > 200
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(
      g, w, rtol=1e-4, atol=1e-4 * float(jnp.abs(w).max())
    ),
    of_packs,
    of_rows,
  )


def packing_config(model, rows, run_dir, packing=True, **sections):
  data = {'template': 'tokens', 'packing': packing, 'max_length': 100}
  return make_config(model, rows, run_dir, data=data, **sections)


@pytest.mark.slow
@pytest.mark.compat
def test_a_run_on_packs_learns_resumes_and_stays_packed(
  tiny_model, tokens_file, tmp_path, capsys
):
  def config(name, steps, packing=True):
    return packing_config(
      tiny_model, tokens_file, tmp_path / name, packing,
      train={'steps': steps, 'batch_size': 2, 'grad_accum': 2},
      lora={'dropout': 0.1}, mesh={'data': 2, 'fsdp': 1, 'tensor': 4},
    )  # fmt: skip

  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  loop.run(config('whole', 6))
  said = capsys.readouterr().out
  assert '4 of them held out; packed 56 rows into 13 of 100 tokens' in said
  assert '2 x 2 packs of 100 tokens: 400 a step' in said
  loop.run(config('parts', 2))
  with pytest.raises(ResumeError, match=r'data\.packing was True, is False'):
    loop.run(config('parts', 6, packing=False))
  loop.run(config('parts', 6))
  for key in ('loss', 'grad_norm', 'eval_loss'):
    assert metrics(parts, key) == metrics(whole, key)
  name = 'adapter/adapter_model.safetensors'
  assert (parts / name).read_bytes() == (whole / name).read_bytes()
  card = (whole / 'adapter' / 'README.md').read_text()
  assert '6 steps of 4 packs of rows, 100 tokens each' in card
  # Rows held out are not packed: their loss is that of any run.
  loop.run(config('unpacked', 1, packing=False))
  held_out = metrics(whole, 'eval_loss')
  assert held_out[0] == metrics(tmp_path / 'unpacked', 'eval_loss')[0]
  assert held_out[-1][1] < held_out[0][1]


def test_a_batch_of_packs_is_the_same_on_any_mesh(
  tiny_model, tokens_file, one_device
):
  cfg = packing_config(tiny_model, tokens_file, 'unused')
  rows = reading.read_rows(cfg, tiny_model, hf_config.read_config(tiny_model))
  again = reading.read_rows(cfg, tiny_model, hf_config.read_config(tiny_model))
  mesh = parallel.make_mesh(2, 4, 1)
  for step in (3, 0):
    want, tokens = rows.batch(cfg, one_device, step)
    got, same = again.batch(cfg, mesh, step)
    assert set(want) == {'ids', 'labels', 'segments', 'positions'}
    assert tokens == same == int((want['segments'] > 0).sum())
    for name in want:
      np.testing.assert_array_equal(got[name], want[name], strict=True)
  unpacked = packing_config(tiny_model, tokens_file, 'unused', packing=False)
  rows = reading.read_rows(
    unpacked, tiny_model, hf_config.read_config(tiny_model)
  )
  assert set(rows.batch(unpacked, one_device, 0)[0]) == {'ids', 'labels'}
