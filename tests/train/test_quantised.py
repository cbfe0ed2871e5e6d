"""What a run does with a quantised base that the loop's own tests don't see.

Reference: LoftQ by numpy (Li et al. 2023, algorithm 1 with one iteration) on the
matrices that the test wrote and what `quant` leaves of them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lorax_train import config, lora, parallel
from lorax_train.errors import ConfigError
from lorax_train.formats import hf, hf_config, quantised, safetensors
from lorax_train.quant import nf4, quantise
from lorax_train.train import report, setup
from tests.formats.bitsandbytes_files import write
from tests.toys import CONFIG, random_tensors, write_model

SIZES = {'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
         'head_dim': 16}  # fmt: skip


def config_of(directory, rows_file, run_dir, **changes):
  mapping = config.defaults()
  mapping['run_dir'] = str(run_dir)
  for section, values in {
    'model': {'path': str(directory), 'dtype': 'float32',
              'param_dtype': 'float32', 'quant': 'nf4', 'remat': 'full'},
    'data': {'path': str(rows_file), 'template': 'uno_reverse',
             'max_length': 64, 'truncation': 'left'},
    'lora': {'rank': 4, 'targets': 'down_proj', 'init': 'loftq'},
    'train': {'steps': 2, 'warmup_steps': 0, 'log_every': 1},
    'mesh': {'fsdp': 4, 'tensor': 2},
    'eval': {'rows': 8, 'samples': 0},
  }.items():  # fmt: skip
    mapping[section].update(values | changes.get(section, {}))
  return config.from_mapping(mapping)


def loftq(w, rank, scale):
  """The update of rank R nearest to what NF4 loses of W (out, in)."""
  q = nf4.from_bitsandbytes(quantise(w))
  lost = w.T - np.asarray(q.dequantised(jnp.float32))
  u, s, vt = np.linalg.svd(lost.astype(np.float64), full_matrices=False)
  return lost, (u[:, :rank] * s[:rank]) @ vt[:rank] / scale


@pytest.mark.slow
def test_loftq_begins_with_what_quantising_lost(tmp_path):
  model = write_model(tmp_path / 'model', tokenizer=False, **SIZES)
  cfg = config_of(model, '.', tmp_path)
  adapters = setup.plan_adapters(cfg, hf_config.read_config(model))
  model_cfg, mesh = adapters.model_cfg, setup.make_mesh(cfg)
  with jax.set_mesh(mesh):
    params = hf.load_params(model, model_cfg, 'float32', mesh)
    originals = quantised.originals(
      safetensors.open_dir(model), model_cfg, mesh
    )
    frozen, trainable = setup.split(cfg, params, adapters, originals)
  shapes = setup.abstract(cfg, adapters, mesh)
  for got, want in zip((frozen, trainable), shapes, strict=True):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  tensors = random_tensors({**CONFIG, **SIZES})
  own = trainable['layers']['mlp']['down_proj']
  for layer in range(2):
    w = tensors[f'model.layers.{layer}.mlp.down_proj.weight']
    lost, want = loftq(w, 4, scale=4.0)
    got = np.asarray(own.a)[layer].T @ np.asarray(own.b)[layer]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.linalg.norm(lost - 4.0 * got) < np.linalg.norm(lost)


@pytest.mark.parametrize(('quant', 'bits'), [
  ('nf4', 'load_in_4bit=True'), ('int8', 'load_in_8bit=True')
])  # fmt: skip
def test_who_uses_the_adapter_is_told_of_its_base(quant, bits, tmp_path):
  (tmp_path / 'adapter').mkdir()
  cfg = config_of('model', '.', tmp_path, model={'quant': quant})
  said = report.end_card(cfg, tmp_path, Path('model'), [])
  assert said.count(f' --quant {quant} ') == 2
  assert f"('model', quantization_config=BitsAndBytesConfig({bits}" in said
  card = report.model_card(cfg, lora.LoraSpec('q_proj'), 'held-out loss 1')
  assert f'its base in {quant}: `BitsAndBytesConfig({bits}' in card


def test_loftq_wants_what_was_quantised(tmp_path):
  write(tmp_path / 'model')
  model_cfg = hf_config.read_config(tmp_path / 'model')
  cfg = config_of(tmp_path / 'model', '.', tmp_path)
  with pytest.raises(ConfigError, match=r'^lora.init=loftq: the files of'):
    setup.plan_adapters(cfg, model_cfg)
  plain = config_of('.', '.', tmp_path, model={'quant': 'none'})
  adapters = setup.plan_adapters(plain, hf_config.config_from_hf(CONFIG))
  with pytest.raises(ConfigError, match='load the model quantised'):
    setup.abstract(plain, adapters)


def test_a_mesh_cuts_the_adapters_of_a_quantised_weight(tmp_path):
  model = write_model(tmp_path / 'model', tokenizer=False, **SIZES)
  cfg = config_of(model, '.', tmp_path)
  adapters = setup.plan_adapters(cfg, hf_config.read_config(model))
  mesh = parallel.make_mesh(1, 4, 2)
  frozen, trainable = setup.abstract(cfg, adapters, mesh)
  down = frozen['layers']['mlp']['down_proj'].w
  assert down.sharding.spec == P(None, 'tensor', 'fsdp')
  assert down.absmax.sharding.spec == P(None, 'tensor', 'fsdp')
  assert down.absmax2.sharding.spec == P()
  assert trainable['layers']['mlp']['down_proj'].a.sharding.spec[-1] == 'tensor'
