"""Model directories: found, checked, and every weight where it belongs.

Reference: the tensors that the test itself wrote, turned and stacked by
numpy here, and cast by ml_dtypes.
"""

import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_train import parallel
from lorax_train.formats import hf, hf_config
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


def test_a_directory_is_found_without_a_network(tiny_model, monkeypatch):
  assert hf.find_model(str(tiny_model)) == tiny_model
  monkeypatch.setenv('HOME', str(tiny_model.parent))
  assert hf.find_model('~/model') == tiny_model
  monkeypatch.chdir(tiny_model.parent)
  assert hf.find_model('model').samefile(tiny_model)


# Path -> words of the message; {} is a directory that exists.
@pytest.mark.parametrize(('path', 'words'), [
  ('{}/config.json', 'is a file'),
  ('{}/absent', 'no such directory'),
  ('./absent', 'no such directory'),
  ('~/absent-model', 'no such directory'),
  ('absent', 'no such directory'),
  ('a/b/c', 'no such directory'),
  ('https://huggingface.co/mistralai/Mistral-7B-v0.1', 'no such directory'),
])  # fmt: skip
def test_paths_that_are_no_model(path, words, tiny_model):
  path = path.format(tiny_model)
  message = refusal(hf.find_model, path)
  assert message.startswith(f'model {path}: {words}; give a directory')


SHA = 'a' * 40


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub's API as it takes to serve `own/model`."""

  files: Mapping[str, bytes] = {}

  def answer(self):
    status, headers, body = 404, {'X-Error-Code': 'RepoNotFound'}, b'{}'
    path = self.path.partition('?')[0]
    name = path.removeprefix(f'/own/model/resolve/{SHA}/')
    if '/gated' in path:
      status, headers = 403, {'X-Error-Code': 'GatedRepo'}
    elif name in self.files:
      status, headers = 200, {'ETag': f'"{name}"'}
      body = self.files[name]
    elif path == f'/api/models/own/model/tree/{SHA}':
      listing = [
        {'type': 'file', 'path': n, 'size': len(b), 'oid': 'b' * 40}
        for n, b in self.files.items()
      ]
      status, headers, body = 200, {}, json.dumps(listing).encode()
    elif path.startswith('/api/models/own/model'):
      siblings = [{'rfilename': n} for n in self.files]
      info = {'id': 'own/model', 'sha': SHA, 'siblings': siblings}
      status, headers, body = 200, {}, json.dumps(info).encode()
    self.send_response(status)
    for key, value in {**headers, 'X-Repo-Commit': SHA}.items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  do_GET = do_HEAD = answer

  def log_message(self, *args):
    pass


def ask_hub(endpoint, home, *repos, offline='0'):
  """What `find_model` says of each repo, and in how long, in a process apart."""
  # huggingface_hub reads the environment once, when it is imported.
  code = textwrap.dedent("""
    import json, sys, time
    from lorax_train.errors import ModelError
    from lorax_train.formats import hf
    out = []
    for repo in sys.argv[1:]:
      begin = time.monotonic()
      try:
        answer = str(hf.find_model(repo))
      except ModelError as error:
        answer = f'ModelError: {error}'
      out.append([answer, time.monotonic() - begin])
    print(json.dumps(out))
  """)
  done = subprocess.run(
    [sys.executable, '-c', code, *repos],
    env=os.environ
    | {'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'PYTHONPATH': str(ROOT)}
    | {'HF_HUB_OFFLINE': offline},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_the_hub(tiny_model, tmp_path, monkeypatch, one_device):
  wanted = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
  others = ('README.md', 'pytorch_model.bin', 'consolidated.safetensors')
  monkeypatch.setattr(Hub, 'files', {**wanted, **dict.fromkeys(others, b'x')})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  endpoint = f'http://127.0.0.1:{server.server_port}'
  home = tmp_path / 'home'
  try:
    (found, _), (gated, _), (nobody, _), (odd, _) = ask_hub(
      endpoint, home, 'own/model', 'own/gated', 'own/nobody', 'no body/model'
    )
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
  # Only what we read is fetched.
  files = {p.name: p.read_bytes() for p in pathlib.Path(found).iterdir()}
  assert files == wanted
  assert_trees_equal(
    load(pathlib.Path(found), one_device), load(tiny_model, one_device)
  )
  for answer, repo, words in (
    (gated, 'own/gated', '(GatedRepoError); accept its terms at the hub'),
    (nobody, 'own/nobody', '(RepositoryNotFoundError); '),
    (odd, 'no body/model', '(HFValidationError); '),
  ):
    assert f'model {repo}: cannot be had from the hub {words}' in answer

  # Nothing listens any more, or nothing may be asked: the cache answers, or an
  # error does, and soon.
  for offline in '01':
    (kept, _), (none, seconds) = ask_hub(
      endpoint, home, 'own/model', 'own/other', offline=offline
    )
    assert kept == found
    assert none.startswith(
      'ModelError: model own/other: cannot be had from the hub ('
    )
    assert none.endswith('; give a local directory')
    assert seconds < 5


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
    from lorax_train.formats import hf, hf_config
    mesh = parallel.make_mesh(data=1, fsdp=2, tensor=2)
    def load(path):
      path = pathlib.Path(path)
      return hf.load_params(path, hf_config.read_config(path), 'float32', mesh)
    head = load(good)['lm_head']
    sums = {}
    for x in head.addressable_shards:
      at = [s.indices(n)[:2] for s, n in zip(x.index, head.shape)]
      sums[str(at)] = np.asarray(x.data).sum(dtype=np.float64).item()
    try:
      load(bad)
    except ModelError as error:
      print(json.dumps([sums, str(error)]))
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
  head = random_tensors(CONFIG)[HEAD].T
  sums = {}
  for out, err in answers:
    assert out, err
    mine, message = json.loads(out.splitlines()[-1])
    assert message == f'{bad}: weights that are not finite: {HEAD}'
    assert len(mine) == 2
    sums |= mine
  halves = [((i, i + 16), (j, j + 130)) for i in (0, 16) for j in (0, 130)]
  for rows, columns in halves:
    part = head[slice(*rows), slice(*columns)]
    want = np.sum(part, dtype=np.float64)
    assert sums[str([rows, columns])] == pytest.approx(want, rel=1e-12)
