"""Quantised weights from files: made on the way, or stored so already.

Reference: `quant.quantise` of each matrix by itself, whose own tests compare
it with bitsandbytes; and for bitsandbytes' checkpoints what plain numpy makes
of the bytes that the test wrote.
"""

import json
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_train import lora, parallel
from lorax_train.errors import ConfigError
from lorax_train.formats import hf, hf_config, hf_save, quant_config, quantised
from lorax_train.infer.load import load_params
from lorax_train.lora.halves import is_weight
from lorax_train.models import params as params_lib
from lorax_train.quant import int8, nf4, quantise
from tests.toys import CONFIG, random_ids, random_tensors, write_model

from .bitsandbytes_files import EIGHT_BIT, FOUR_BIT, KINDS, SIZES, write
from .refusals import refusal

MESHES = [(1, 1, 1), (1, 2, 4), (2, 2, 2), (1, 8, 1)]
# Rows that PARAMS quantises, and what else a Llama-like model has.
LINEARS = tuple(
  [f'self_attn.{x}_proj' for x in 'qkvo']
  + [f'mlp.{x}_proj' for x in ('gate', 'up', 'down')]
)
Q = 'model.layers.1.self_attn.q_proj.weight'
STATE = f'{Q}.quant_state.bitsandbytes__nf4'


def mesh_of(sizes):
  return parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])


def load(directory, mesh, quant='none', dtype='float32'):
  cfg = quant_config.as_asked(hf_config.read_config(directory), quant)
  return hf.load_params(directory, cfg, dtype, mesh)


@pytest.fixture
def model(tmp_path):
  return write_model(tmp_path / 'model', tokenizer=False, **SIZES)


def by_path(params):
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
  return {lora.path_of(path): leaf for path, leaf in leaves}


def in_layer(params, name, layer):
  leaf = by_path(params)[f'layers/{name.replace(".", "/")}']
  return jax.tree.map(lambda x: np.asarray(x)[layer], leaf)


def assert_same(got, want):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_each_matrix_is_quantised_by_itself(kind, dtype, model, one_device):
  params = load(model, one_device, kind, dtype)
  plain = load(model, one_device, dtype=dtype)
  for name in LINEARS:
    for layer in range(2):
      w = random_tensors({**CONFIG, **SIZES})[
        f'model.layers.{layer}.{name}.weight'
      ]
      want = (
        int8.quantise(w)
        if kind == 'int8'
        else nf4.from_bitsandbytes(quantise(w))
      )
      assert_same(in_layer(params, name, layer), want)
  for path, leaf in by_path(params).items():
    if path.partition('/')[2].replace('/', '.') in LINEARS:
      assert leaf.dtype == dtype
    else:
      assert_same(leaf, by_path(plain)[path])
  cfg = quant_config.as_asked(hf_config.read_config(model), kind)
  shapes = params_lib.abstract(cfg, dtype)
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  assert_shapes(params, shapes)


def assert_shapes(arrays, shapes):
  for x, y in zip(
    jax.tree.leaves(arrays), jax.tree.leaves(shapes), strict=True
  ):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_what_is_quantised_is_what_the_files_hold(stored, model, one_device):
  tensors = random_tensors({**CONFIG, **SIZES})
  narrow = {k: v.astype(stored) for k, v in tensors.items()}
  save_file(narrow, model / 'model.safetensors')
  params = load(model, one_device, 'nf4', 'bfloat16')
  want = quantise(narrow[Q].astype(np.float32))
  assert_same(
    in_layer(params, 'self_attn.q_proj', 1), nf4.from_bitsandbytes(want)
  )


# Of q [128, 192], k [128, 192] and gate [128, 172] on (data, fsdp, tensor):
# parts of packed and of absmax. 128 inputs are two blocks; 4 heads.
PARTS = {
  (1, 2, 4): {'q_proj': ((32, 48), (1, 48)), 'gate_proj': ((32, 43), (1, 43))},
  (2, 2, 2): {'q_proj': ((32, 96), (1, 96)), 'gate_proj': ((32, 86), (1, 86))},
  (1, 8, 1): {'q_proj': ((64, 192), (2, 192))},
}  # fmt: skip


@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_no_mesh_changes_a_bit(kind, model):
  alone = load(model, mesh_of((1, 1, 1)), kind)
  for sizes in MESHES[1:]:
    params = load(model, mesh_of(sizes), kind)
    assert_same(params, alone)
    for name, leaf in by_path(params).items():
      own = PARTS[sizes].get(name.rpartition('/')[2])
      if own and kind == 'nf4':
        arrays = leaf.packed, leaf.absmax
        got = [x.addressable_shards[0].data.shape[1:] for x in arrays]
        assert got == list(own), (sizes, name)


def test_a_sharded_model_computes_what_it_does_alone(model):
  ids = random_ids(shape=(8, 16))
  mesh = mesh_of((1, 2, 4))
  apply, params = load_params(model, quant='nf4')
  plain = jax.tree.map(
    lambda w: w.dequantised() if isinstance(w, nf4.Nf4Weight) else w,
    params,
    is_leaf=is_weight,
  )
  want = jax.jit(apply)(plain, ids)
  with jax.set_mesh(mesh):
    apply, params = load_params(model, mesh, quant='nf4')
    got = jax.jit(apply)(params, ids)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_no_more_matrices_than_readers_are_in_hand(
  model, one_device, monkeypatch
):
  inside, most, lock = [0], [0], threading.Lock()
  matrix = quantised._matrix

  def counted(*args):
    with lock:
      inside[0] += 1
      most[0] = max(most[0], inside[0])
    try:
      return matrix(*args)
    finally:
      with lock:
        inside[0] -= 1

  monkeypatch.setattr(quantised, '_matrix', counted)
  load(model, one_device, 'nf4')
  assert 1 <= most[0] <= hf._READERS


def test_cpu_devices_share_a_part_s_memory(model):
  params = load(model, mesh_of((2, 2, 2)), 'nf4')
  q = params['layers']['self_attn']['q_proj']
  for array, parts in ((q.packed, 4), (q.absmax, 4), (q.absmax2, 1)):
    places = {s.data.unsafe_buffer_pointer() for s in array.addressable_shards}
    assert len(places) == parts


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_what_is_not_finite_is_named(bad, kind, model, one_device):
  tensors = random_tensors({**CONFIG, **SIZES})
  names = Q, 'model.layers.0.mlp.down_proj.weight', 'model.norm.weight'
  for name in names:
    tensors[name].reshape(-1)[3] = bad
  save_file(tensors, model / 'model.safetensors')
  message = refusal(load, model, one_device, kind)
  assert message.startswith(f'{model}: weights that are not finite: ')
  assert all(name in message for name in names)


@pytest.mark.parametrize('kind', KINDS)
def test_bitsandbytes_checkpoints_load_as_they_are(kind, tmp_path, one_device):
  want = write(tmp_path / 'model', kind)
  params = load(tmp_path / 'model', one_device)
  for name in LINEARS:
    leaf = by_path(params)[f'layers/{name.replace(".", "/")}']
    got = np.asarray(leaf.dequantised(jnp.float32))
    of_layers = [want[f'model.layers.{i}.{name}.weight'].T for i in range(2)]
    want_LIO = np.stack(of_layers)
    # absmax is worked out on the way, and not looked up in a table.
    np.testing.assert_allclose(got, want_LIO, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(params['norm'], want['model.norm.weight'])
  # Asked for what they are, they are the same; and nowhere cut otherwise.
  again = load(tmp_path / 'model', mesh_of((1, 2, 4)), kind.partition(',')[0])
  assert_same(again, params)


def test_what_a_checkpoint_keeps_stays_as_it_is(tmp_path, one_device):
  said = {
    **FOUR_BIT,
    'llm_int8_skip_modules': ['lm_head', 'v_proj', '.*up_proj'],
  }
  want = write(
    tmp_path / 'model', kept=('v_proj', 'up_proj'), quantization_config=said
  )
  params = by_path(load(tmp_path / 'model', one_device))
  v = params['layers/self_attn/v_proj']
  assert isinstance(v, jax.Array)
  np.testing.assert_array_equal(v[1], want[Q.replace('q_proj', 'v_proj')].T)
  assert isinstance(params['layers/mlp/up_proj'], jax.Array)
  assert isinstance(params['layers/mlp/gate_proj'], nf4.Nf4Weight)


def drop(name):
  return lambda tensors: tensors.pop(name)


def put(name, value):
  return lambda tensors: tensors.update({name: value})


def state(**changes):
  def change(tensors):
    own = json.loads(tensors[STATE].tobytes()) | changes
    tensors[STATE] = np.frombuffer(json.dumps(own).encode(), np.uint8)

  return change


DAMAGED = {
  'no absmax': (drop(f'{Q}.absmax'), f'{Q}.absmax is missing'),
  'no second level': (drop(f'{Q}.nested_absmax'), 'nested_absmax is missing'),
  'no state': (drop(STATE), f'{STATE} is missing'),
  'absmax of another size': (
    put(f'{Q}.absmax', np.zeros(3, np.uint8)),
    'absmax is uint8 of shape (3,), not uint8 of (384,)',
  ),
  'not double-quantised': (
    put(f'{Q}.absmax', np.zeros(384, np.float32)), 'absmax is float32',
  ),
  'a matrix that is not quantised': (
    put(Q, np.zeros((192, 128), np.float32)),
    f'{Q} is float32 of shape (192, 128), not uint8 of (12288, 1)',
  ),
  'a head that is': (
    put('lm_head.weight', np.zeros((260, 128), np.uint8)),
    'lm_head.weight is uint8, not a float',
  ),
  'other blocks': (state(blocksize=128), "has blocksize 128 for 64"),
  'fp4 after all': (state(quant_type='fp4'), "quant_type 'fp4' for 'nf4'"),
  'another shape': (state(shape=[128, 192]), 'shape [128, 192] for [192, 128]'),
  'no offset': (state(nested_offset=None), 'has no nested_offset'),
  'no JSON': (put(STATE, np.zeros(3, np.uint8)), "quant_type None for 'nf4'"),
  'another table': (
    put(f'{Q}.quant_map', np.zeros(16, np.float32)),
    f'{Q}.quant_map: another table than',
  ),
  'not finite': (
    put(f'{Q}.nested_absmax', np.full(2, np.nan, np.float32)),
    f'not finite: {Q}',
  ),
  'a tensor too many': (put(f'{Q}.extra', np.zeros(3)), 'has not:'),
}  # fmt: skip


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_checkpoint_is_refused(case, tmp_path, one_device):
  change, words = DAMAGED[case]
  write(tmp_path / 'model', changed=change)
  assert words in refusal(load, tmp_path / 'model', one_device)


# quantization_config -> what is said of it.
REFUSED = {
  'fp4': ({'bnb_4bit_quant_type': 'fp4'}, "'fp4' is not supported"),
  'no type, which is fp4': ({'bnb_4bit_quant_type': ...}, "'fp4'"),
  'stored as floats': (
    {'bnb_4bit_quant_storage': 'bfloat16'}, "'bfloat16' is not supported",
  ),
  'both widths': ({'load_in_8bit': True}, 'quantised (bitsandbytes)'),
  'neither width': ({'load_in_4bit': False}, 'quantised (bitsandbytes)'),
  'some layers kept': (
    {'llm_int8_skip_modules': ['model.layers.1.mlp']},
    'keeps 1 of 2 layers of layers/mlp/up_proj',
  ),
  'skipped, a word': ({'llm_int8_skip_modules': 'lm_head'}, 'not a list'),
  'skipped, no regex': ({'llm_int8_skip_modules': ['*x']}, 'is no regex'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_other_kinds_are_refused(case):
  changes, words = REFUSED[case]
  said = {k: v for k, v in {**FOUR_BIT, **changes}.items() if v is not ...}
  raw = {**CONFIG, **SIZES, 'quantization_config': said}
  assert words in refusal(hf_config.config_from_hf, raw)


def test_old_files_name_no_method():
  said = {k: v for k, v in FOUR_BIT.items() if k != 'quant_method'}
  raw = {**CONFIG, 'quantization_config': said}
  want = params_lib.Quant('nf4', double=True, stored=True)
  assert hf_config.config_from_hf(raw).quant == want


def test_one_kind_does_not_become_another():
  raw = {**CONFIG, 'quantization_config': EIGHT_BIT}
  cfg = hf_config.config_from_hf(raw)
  assert quant_config.as_asked(cfg, 'int8') == cfg
  message = refusal(quant_config.as_asked, cfg, 'nf4', kind=ConfigError)
  assert 'quant nf4: the weights of this model are stored in int8' in message
  plain = hf_config.config_from_hf(CONFIG)
  assert 'give nf4 or int8' in refusal(
    quant_config.as_asked, plain, 'fp4', kind=ConfigError
  )


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_what_is_saved_is_not_quantised(dtype, tmp_path, one_device):
  want = write(tmp_path / 'model')
  params = load(tmp_path / 'model', one_device)
  hf_save.save_params(tmp_path / 'out', tmp_path / 'model', params, dtype)
  cfg = hf_config.read_config(tmp_path / 'out')
  assert cfg.quant == params_lib.Quant()
  again = load(tmp_path / 'out', one_device)
  got = again['layers']['self_attn']['q_proj'][1].T
  rounding = 1e-6 if dtype is None else 2**-8
  np.testing.assert_allclose(got, want[Q], rtol=rounding, atol=1e-6)
