"""Fixtures of the whole suite: 8 CPU devices, tiny models, shared files."""

import json
import os
from pathlib import Path

import jax
import pytest

# Before anything touches the backend: meshes are tested on simulated devices.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# Programs here run for milliseconds: they are compiled with as little of LLVM
# as there is. XLA's own passes, which decide on memory, are all there.
QUICK = [
  '--xla_backend_optimization_level=0',
  '--xla_cpu_parallel_codegen_split_count=1',
]
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know is fatal
  QUICK.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*QUICK, os.environ.get('XLA_FLAGS', '')])

GOLDEN = Path(__file__).parent / 'golden'
SHARED = Path(__file__).parents[1].parent / 'shared'


@pytest.fixture(autouse=True, scope='session')
def compiled_programs(tmp_path_factory):
  """On disk, for all processes of a run: many tests train the same model."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(autouse=True, scope='session')
def caches(tmp_path_factory):
  """Not the user's own, for this process and those it starts."""
  os.environ['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('caches'))


@pytest.fixture(autouse=True, scope='module')
def forget_compiled_programs():
  """Or those of the whole suite would pile up, with memory and mappings."""
  yield
  jax.clear_caches()


@pytest.fixture
def strict():
  """No silent promotion of dtypes or ranks in our own arithmetic."""
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    yield


@pytest.fixture
def one_device():
  """A mesh of one device, whatever the number simulated."""
  from lorax_train import parallel

  return parallel.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope='session')
def golden():
  """Files written by scripts/make_golden.py from transformers and PEFT."""
  return GOLDEN


@pytest.fixture(scope='session')
def shared():
  """Real weights and data, which lie beside the checkout and not in it."""
  if not SHARED.is_dir():
    pytest.skip('no ../shared: real weights and data are not part of the code')
  return SHARED


@pytest.fixture
def tiny_model(tmp_path):
  """A tiny random Mistral directory with a byte-level tokenizer."""
  from tests.toys import write_model

  return write_model(tmp_path / 'model')


@pytest.fixture
def rows_file(tmp_path):
  """40 rows in Alpaca's columns."""
  rows = [
    {
      'instruction': f'Say the number {i}.',
      'input': '' if i % 3 else f'in words, {i} times',
      'output': f'The number is {i}, and that is {"x" * (i % 7)} all.',
    }
    for i in range(40)
  ]
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps(rows), 'utf-8')
  return path
