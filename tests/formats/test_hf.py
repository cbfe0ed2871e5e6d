"""Model directories: found, checked, and every weight where it belongs.

Reference: the tensors that the test itself wrote, turned and stacked by
numpy here, and cast by ml_dtypes.
"""

import collections
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_train import parallel
from lorax_train.formats import hf, hf_config, safetensors
from lorax_train.models import params as params_lib
from tests.toys import CONFIG, random_tensors, write_model

from .refusals import refusal

ROOT = pathlib.Path(__file__).parents[2]
CFG = hf_config.config_from_hf(CONFIG)
TIED = {**CONFIG, 'tie_word_embeddings': True}
EMBED, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def load(directory, mesh, dtype=jnp.float32):
  return hf.load_params(
    directory, hf_config.read_config(directory), dtype, mesh
  )


def expected(tensors, dtype=np.float32, layers=CONFIG['num_hidden_layers']):
  """Our tree of a Llama-like model, spelled out: no table is looked at."""

  def stack(name, turn):
    each = [tensors[f'model.layers.{i}.{name}.weight'] for i in range(layers)]
    return np.stack([x.T if turn else x for x in each]).astype(dtype)

  attn = {
    n: stack(f'self_attn.{n}', True)
    for n in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
  }
  mlp = {
    n: stack(f'mlp.{n}', True) for n in ('gate_proj', 'up_proj', 'down_proj')
  }
  norms = {
    n: stack(n, False) for n in ('input_layernorm', 'post_attention_layernorm')
  }
  tree = {
    'embed_tokens': tensors[EMBED].astype(dtype),
    'layers': {'self_attn': attn, 'mlp': mlp, **norms},
    'norm': tensors['model.norm.weight'].astype(dtype),
  }
  if HEAD in tensors:
    tree['lm_head'] = tensors[HEAD].T.astype(dtype)
  return tree


def assert_trees_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    where = jax.tree_util.keystr(path)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), where
    assert np.asarray(x).tobytes() == np.ascontiguousarray(y).tobytes(), where


@pytest.mark.parametrize(('dtype', 'numpy_dtype'), [
  (jnp.float32, np.float32),
  (jnp.bfloat16, ml_dtypes.bfloat16),
  ('bfloat16', ml_dtypes.bfloat16),
])  # fmt: skip
def test_weights_are_turned_stacked_and_cast(
  dtype, numpy_dtype, tiny_model, one_device
):
  got = load(tiny_model, one_device, dtype)
  assert_trees_equal(got, expected(random_tensors(CONFIG), numpy_dtype))
  assert jax.tree.structure(got) == jax.tree.structure(
    params_lib.abstract(CFG, dtype)
  )


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_may_be_stored_in_any_float(stored, tmp_path, one_device):
  directory = write_model(tmp_path, tokenizer=False)
  tensors = {k: v.astype(stored) for k, v in random_tensors(CONFIG).items()}
  save_file(tensors, directory / 'model.safetensors')
  assert_trees_equal(load(directory, one_device), expected(tensors))


# Mesh (data, fsdp, tensor) -> shape of each device's part of some parameters.
# Whole: embed [260, 32], q [3, 32, 40], k [3, 32, 20], o [3, 40, 32],
# down [3, 48, 32], norm [32], lm_head [32, 260]. 4 heads, 2 of keys.
PARTS = {
  (1, 2, 4): {
    'embed_tokens': (65, 16),
    'layers/self_attn/q_proj': (3, 16, 10),
    'layers/self_attn/k_proj': (3, 16, 20),  # 2 heads on 4 devices: whole
    'layers/self_attn/o_proj': (3, 10, 16),
    'layers/mlp/down_proj': (3, 12, 16),
    'layers/input_layernorm': (3, 32),
    'norm': (32,),
    'lm_head': (16, 65),
  },
  (2, 2, 2): {
    'embed_tokens': (130, 16),
    'layers/self_attn/q_proj': (3, 16, 20),
    'layers/self_attn/k_proj': (3, 16, 10),
    'layers/self_attn/o_proj': (3, 20, 16),
    'layers/mlp/down_proj': (3, 24, 16),
    'layers/input_layernorm': (3, 32),
    'norm': (32,),
    'lm_head': (16, 130),
  },
  (1, 1, 8): {
    'embed_tokens': (260, 32),  # 8 does not divide 260
    'layers/self_attn/q_proj': (3, 32, 40),  # nor 4 heads
    'layers/self_attn/k_proj': (3, 32, 20),
    'layers/self_attn/o_proj': (3, 40, 32),
    'layers/mlp/down_proj': (3, 6, 32),
    'layers/input_layernorm': (3, 32),
    'norm': (32,),
    'lm_head': (32, 260),
  },
  (1, 8, 1): {
    'embed_tokens': (260, 4),
    'layers/self_attn/q_proj': (3, 4, 40),
    'layers/self_attn/k_proj': (3, 4, 20),
    'layers/self_attn/o_proj': (3, 40, 4),
    'layers/mlp/down_proj': (3, 48, 4),
    'layers/input_layernorm': (3, 32),
    'norm': (32,),
    'lm_head': (4, 260),
  },
  (8, 1, 1): {
    'embed_tokens': (260, 32),
    'layers/self_attn/q_proj': (3, 32, 40),
    'layers/mlp/down_proj': (3, 48, 32),
    'norm': (32,),
  },
}


@pytest.mark.parametrize('sizes', PARTS)
def test_each_device_holds_its_part(sizes, tiny_model):
  data, fsdp, tensor = sizes
  mesh = parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  params = load(tiny_model, mesh)
  want = expected(random_tensors(CONFIG))
  assert_trees_equal(params, want)
  for path, shape in PARTS[sizes].items():
    leaf, whole = params, want
    for name in path.split('/'):
      leaf, whole = leaf[name], whole[name]
    assert len(leaf.addressable_shards) == 8
    for shard in leaf.addressable_shards:
      assert shard.data.shape == shape, path
      np.testing.assert_array_equal(shard.data, whole[shard.index])


# Wider than the tiles in which a matrix is turned, and in no power of 2.
WIDE = {
  'hidden_size': 600,
  'intermediate_size': 1040,
  'num_attention_heads': 8,
  'num_key_value_heads': 8,
  'head_dim': 70,
  'num_hidden_layers': 2,
}


@pytest.mark.parametrize('sizes', [(1, 1, 1), (1, 2, 4), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_wide_weights(dtype, sizes, tmp_path):
  config = {**CONFIG, **WIDE}
  directory = write_model(tmp_path, tokenizer=False, **WIDE)
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  want = expected(random_tensors(config), dtype, layers=2)
  assert_trees_equal(load(directory, mesh, dtype), want)


@pytest.fixture
def bytes_read(monkeypatch):
  """{tensor: bytes of each part that is read of it}."""
  counts = collections.defaultdict(list)
  read_into = safetensors.TensorRef.read_into

  def counted(ref, parts):
    parts = list(parts)
    counts[ref.name] += [out.size * ref.dtype.itemsize for _, out in parts]
    read_into(ref, parts)

  monkeypatch.setattr(safetensors.TensorRef, 'read_into', counted)
  return counts


# Of each tensor of q: into how many parts the mesh cuts it.
@pytest.mark.parametrize(('sizes', 'parts'), [
  ((1, 1, 1), 1), ((8, 1, 1), 1), ((1, 8, 1), 8), ((2, 2, 2), 4), ((1, 2, 4), 8)
])  # fmt: skip
def test_each_byte_is_read_once_however_many_devices_hold_it(
  sizes, parts, tiny_model, bytes_read
):
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  load(tiny_model, mesh)
  assert {name: sum(each) for name, each in bytes_read.items()} == {
    name: x.nbytes for name, x in random_tensors(CONFIG).items()
  }
  assert len(bytes_read['model.layers.1.self_attn.q_proj.weight']) == parts
  assert len(bytes_read['model.norm.weight']) == 1


def test_cpu_devices_that_hold_the_same_part_share_its_memory(tiny_model):
  mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
  params = load(tiny_model, mesh)
  # Whole on each device, in 4 parts, in 2 x 2 parts.
  for x, parts in (
    (params['norm'], 1),
    (params['layers']['self_attn']['q_proj'], 4),
    (params['embed_tokens'], 4),
  ):
    places = {s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert len(places) == parts


def test_a_donated_weight_leaves_those_that_share_its_memory(tiny_model):
  mesh = parallel.make_mesh(data=8, fsdp=1)
  before = random_tensors(CONFIG)[EMBED]
  shards = load(tiny_model, mesh)['embed_tokens'].addressable_shards
  first, *others = (shard.data for shard in shards)
  jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(first))
  for other in others:
    np.testing.assert_array_equal(other, before)


def split_in_two(directory):
  """The same model as two shards and an index, its layers torn apart."""
  tensors = random_tensors(CONFIG)
  (directory / 'model.safetensors').unlink()
  weight_map = {}
  for i in range(2):
    file = f'model-0000{i + 1}-of-00002.safetensors'
    names = sorted(tensors)[i::2]
    save_file({n: tensors[n] for n in names}, directory / file)
    weight_map |= dict.fromkeys(names, file)
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))


def test_two_shards_equal_one_file(tiny_model, one_device):
  want = load(tiny_model, one_device)
  split_in_two(tiny_model)
  assert_trees_equal(load(tiny_model, one_device), want)


def rewrite(directory, change, config=CONFIG):
  tensors = random_tensors(config)
  change(tensors)
  save_file(tensors, directory / 'model.safetensors')
  return tensors


def test_all_that_does_not_fit_is_listed_at_once(tiny_model, one_device):
  q = 'model.layers.{}.self_attn.q_proj.weight'

  def damage(tensors):
    del tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.layers.2.mlp.up_projx.weight'] = tensors.pop(
      'model.layers.2.mlp.up_proj.weight'
    )
    tensors[q.format(0)] = np.ascontiguousarray(tensors[q.format(0)].T)
    tensors[q.format(1)] = tensors[q.format(1)].astype(np.int8)
    tensors['model.norm.weight'] = np.ones(32, bool)
    tensors['model.layers.3.input_layernorm.weight'] = np.ones(32, np.float32)
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.ones(40, np.float32)

  rewrite(tiny_model, damage)
  message = refusal(load, tiny_model, one_device)
  assert message.startswith(f'{tiny_model}: ')
  for words in (
    'model.layers.1.mlp.up_proj.weight is missing',
    'model.layers.2.mlp.up_proj.weight is missing (there is'
    ' model.layers.2.mlp.up_projx.weight)',
    'model.layers.0.self_attn.q_proj.weight has shape (32, 40), config.json'
    ' says (40, 32)',
    'model.layers.1.self_attn.q_proj.weight is int8, not a float',
    'model.norm.weight is bool, not a float',
    'tensors that a model of this config.json has not:'
    ' model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_projx.weight,'
    ' model.layers.3.input_layernorm.weight',
  ):
    assert words in message


def test_gptq_tensors_are_refused_by_name(tiny_model, one_device):
  def quantise(tensors):
    for i in range(3):
      name = f'model.layers.{i}.self_attn.q_proj'
      del tensors[f'{name}.weight']
      tensors[f'{name}.qweight'] = np.zeros((4, 40), np.int32)

  rewrite(tiny_model, quantise)
  message = refusal(load, tiny_model, one_device)
  assert 'model.layers.0.self_attn.q_proj.weight is missing' in message
  assert 'model.layers.2.self_attn.q_proj.qweight' in message


def test_a_config_of_fewer_layers_than_the_file(tiny_model, one_device):
  config = {**CONFIG, 'num_hidden_layers': 2}
  (tiny_model / 'config.json').write_text(json.dumps(config))
  message = refusal(load, tiny_model, one_device)
  assert 'has not: model.layers.2.' in message
  assert 'and 1 more' in message


def test_old_rotary_buffers_are_ignored(tiny_model, one_device):
  want = load(tiny_model, one_device)

  def add(tensors):
    for i in range(3):
      name = f'model.layers.{i}.self_attn.rotary_emb.inv_freq'
      tensors[name] = np.ones(5, np.float32)

  rewrite(tiny_model, add)
  assert_trees_equal(load(tiny_model, one_device), want)


@pytest.mark.parametrize(
  ('value', 'sizes'),
  [(np.nan, (1, 1, 1)), (np.inf, (1, 1, 1)), (-np.inf, (1, 2, 4))],
)
def test_what_is_not_finite_is_named(value, sizes, tiny_model):
  devices = jax.devices()[: np.prod(sizes)]
  mesh = parallel.make_mesh(*sizes, devices=devices)
  bad = [
    'model.layers.1.mlp.down_proj.weight',  # in the middle of a stack
    'model.layers.2.input_layernorm.weight',
    'model.norm.weight',
    'lm_head.weight',
  ]

  def poison(tensors):
    for name in bad:
      tensors[name].flat[-3] = value

  rewrite(tiny_model, poison)
  message = refusal(load, tiny_model, mesh)
  assert str(tiny_model) in message
  names = message.partition('not finite: ')[2]
  assert sorted(names.split(', ')) == sorted(bad)


def test_what_overflows_the_dtype_is_not_finite_either(tiny_model, one_device):
  names = ['model.norm.weight', 'model.layers.1.mlp.up_proj.weight']

  def grow(tensors):
    for name in names:
      tensors[name] = tensors[name].astype(np.float64)
      tensors[name].flat[3] = 1e39

  rewrite(tiny_model, grow)
  for dtype in (jnp.float32, jnp.bfloat16):
    message = refusal(load, tiny_model, one_device, dtype)
    assert all(name in message for name in names)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_the_largest_numbers_are_finite(dtype, tiny_model, one_device):
  # Though their sum is not.
  def grow(tensors):
    for name, x in tensors.items():
      tensors[name] = np.full(x.shape, ml_dtypes.finfo(dtype).max, dtype)

  tensors = rewrite(tiny_model, grow)
  want = expected(tensors, dtype)
  assert_trees_equal(load(tiny_model, one_device, dtype), want)


# A vectorised search may lose what a scalar one finds, or the other way round.
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('place', [0, 1000, -1])
def test_one_nan_in_wide_weights_is_found(place, dtype, tmp_path, one_device):
  directory = write_model(tmp_path, tokenizer=False, **WIDE)
  names = ['model.layers.1.mlp.up_proj.weight', HEAD]

  def poison(tensors):
    for name in names:
      tensors[name].flat[place] = np.nan

  rewrite(directory, poison, {**CONFIG, **WIDE})
  message = refusal(load, directory, one_device, dtype)
  assert message.endswith(f'not finite: {", ".join(names)}')


# Names under which the tied matrix is stored, and whether they agree.
@pytest.mark.parametrize('names', [(EMBED,), (HEAD,), (EMBED, HEAD)])
def test_a_tied_matrix_under_either_name(names, tmp_path, one_device):
  directory = write_model(tmp_path, tie_word_embeddings=True, tokenizer=False)

  def store(tensors):
    tied = tensors.pop(EMBED)
    tensors.update({name: tied.copy() for name in names})

  rewrite(directory, store, TIED)
  want = expected(random_tensors(TIED))
  assert 'lm_head' not in want
  assert_trees_equal(load(directory, one_device), want)


@pytest.mark.parametrize(('names', 'words'), [
  ((EMBED, HEAD), 'embed_tokens.weight and lm_head.weight differ'),
  ((), 'model.embed_tokens.weight is missing'),
])  # fmt: skip
def test_a_tied_matrix_that_is_not_one(names, words, tmp_path, one_device):
  directory = write_model(tmp_path, tie_word_embeddings=True, tokenizer=False)

  def store(tensors):
    tied = tensors.pop(EMBED)
    tensors.update({n: tied + i for i, n in enumerate(names)})

  rewrite(directory, store, TIED)
  assert words in refusal(load, directory, one_device)


def test_an_untied_model_needs_its_head(tiny_model, one_device):
  rewrite(tiny_model, lambda tensors: tensors.pop(HEAD))
  assert 'lm_head.weight is missing' in refusal(load, tiny_model, one_device)


def test_two_processes_load_their_parts_and_agree_on_what_is_bad(tmp_path):
  # With 2 devices each: a weight that is cut over all four is in no one's
  # reach, and neither is the answer whether it is finite.
  good = write_model(tmp_path / 'good', tokenizer=False)
  bad = write_model(tmp_path / 'bad', tokenizer=False)

  def poison(tensors):
    tensors['lm_head.weight'][-1, -1] = np.nan

  rewrite(bad, poison)
  code = textwrap.dedent("""
    import json, pathlib, sys
    import jax
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 2)
    me, port, good, bad = sys.argv[1:]
    jax.distributed.initialize(f'localhost:{port}', 2, int(me))
    import numpy as np
    from lorax_train import parallel
    from lorax_train.errors import ModelError
    from lorax_train.formats import hf, hf_config, safetensors
    count, read_into = 0, safetensors.TensorRef.read_into
    def counted(ref, parts):
      global count
      count += sum(out.size * ref.dtype.itemsize for _, out in parts)
      read_into(ref, parts)
    safetensors.TensorRef.read_into = counted
    mesh = parallel.make_mesh(data=1, fsdp=2, tensor=2)
    def load(path):
      path = pathlib.Path(path)
      return hf.load_params(path, hf_config.read_config(path), 'float32', mesh)
    head = load(good)['lm_head']
    nbytes, sums = count, {}
    for x in head.addressable_shards:
      at = [s.indices(n)[:2] for s, n in zip(x.index, head.shape)]
      sums[str(at)] = np.asarray(x.data).sum(dtype=np.float64).item()
    try:
      load(bad)
    except ModelError as error:
      print(json.dumps([sums, nbytes, str(error)]))
  """)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  running = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(me), str(port), str(good), str(bad)],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for me in range(2)
  ]
  answers = [p.communicate(timeout=120) for p in running]
  tensors = random_tensors(CONFIG)
  # Every matrix is cut into four, two of which a process holds.
  half = sum(
    x.nbytes // 2 if x.ndim == 2 else x.nbytes for x in tensors.values()
  )
  head = tensors[HEAD].T
  sums = {}
  for out, err in answers:
    assert out, err
    mine, nbytes, message = json.loads(out.splitlines()[-1])
    assert nbytes == half
    assert message == f'{bad}: weights that are not finite: {HEAD}'
    assert len(mine) == 2
    sums |= mine
  halves = [((i, i + 16), (j, j + 130)) for i in (0, 16) for j in (0, 130)]
  for rows, columns in halves:
    part = head[slice(*rows), slice(*columns)]
    want = np.sum(part, dtype=np.float64)
    assert sums[str([rows, columns])] == pytest.approx(want, rel=1e-12)
