"""Model directories written, and read back: save_params and load_params.

References: the files that the parameters came from, byte for byte; for merged
weights the formula in numpy, float64. tests/parity/test_generate.py has
transformers and PEFT.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lorax_train import __main__, lora
from lorax_train.errors import ConfigError, ModelError
from lorax_train.formats import hf, hf_config, hf_save, peft
from lorax_train.infer.load import load_params
from lorax_train.models import params as params_lib
from tests.formats.refusals import refusal
from tests.toys import CONFIG, random_ids, random_tensors, write_model

BF16 = np.dtype(ml_dtypes.bfloat16)


def stored(directory):
  """{name: array} of all files of a model directory."""
  tensors = {}
  for path in sorted(directory.glob('*.safetensors')):
    tensors |= load_file(path)
  return tensors


def equal(got, want):
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype, name
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def load(directory, mesh, dtype=jnp.float32):
  cfg = hf_config.read_config(directory)
  return hf.load_params(directory, cfg, dtype, mesh)


def write_adapter(directory, params, cfg, spec=None, std=0.2):
  spec = spec or lora.LoraSpec('all-linear', rank=3, alpha=6)
  names = params_lib.module_names(cfg)
  frozen, trainable = lora.split(jax.random.key(2), params, spec, names)
  rng = np.random.default_rng(3)
  trainable = jax.tree.map(
    lambda x: x + std * rng.standard_normal(x.shape, np.float32), trainable
  )
  trainable = peft.fill(  # ranks below the widest are padded with zeros
    peft.LoadedAdapter(spec, factors(frozen, trainable, names), ''),
    frozen, trainable, names,
  )  # fmt: skip
  peft.save_adapter(directory, frozen, trainable, names, spec, 'base')
  return str(directory)


def factors(frozen, trainable, names):
  """{module: (A, B)} of an adapter, as `peft.fill` wants them."""
  tensors = peft.to_tensors(frozen, trainable, names)
  halves = {}
  for key, array in tensors.items():
    name, half = key.removeprefix(peft.PREFIX).split('.lora_')
    halves.setdefault(name, {})[half[0]] = array
  return {name: (h['A'], h['B'].T) for name, h in halves.items()}


@pytest.mark.compat
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('dtype', [np.float32, BF16])
@pytest.mark.parametrize('shard_bytes', [hf_save.SHARD_BYTES, 20_000])
def test_what_is_saved_loads_bit_for_bit(
  tied, dtype, shard_bytes, one_device, tmp_path
):
  source = write_model(tmp_path / 'base', tie_word_embeddings=tied)
  params = load(source, one_device, dtype)
  out = tmp_path / 'deep' / 'out'
  count = hf_save.save_params(out, source, params, dtype, shard_bytes)
  cfg = hf_config.read_config(out)
  assert cfg == hf_config.read_config(source)
  assert count == params_lib.total(cfg)
  again = load(out, one_device, dtype)
  same = jax.tree.map(
    lambda x, y: x.dtype == y.dtype and bool((x == y).all()), params, again
  )
  assert all(jax.tree.leaves(same))
  equal(
    stored(out),
    {n: x.astype(dtype) for n, x in load_file(source / 'model.safetensors').items()},
  )  # fmt: skip
  assert ('lm_head.weight' in stored(out)) is not tied
  assert not list(out.parent.glob('*.tmp'))


def test_shards_and_their_index(one_device, tmp_path):
  source = write_model(tmp_path / 'base')
  out, params = tmp_path / 'out', load(source, one_device)
  hf_save.save_params(out, source, params, shard_bytes=30_000)
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  files = sorted(path.name for path in out.glob('*.safetensors'))
  assert sorted(set(index['weight_map'].values())) == files
  assert files == [
    f'model-{n:05}-of-{len(files):05}.safetensors'
    for n in range(1, len(files) + 1)
  ]
  sizes = [
    sum(x.nbytes for x in load_file(out / name).values()) for name in files
  ]
  assert len(files) > 3
  assert index['metadata']['total_size'] == sum(sizes)
  # Only a tensor that is too large by itself passes the limit.
  whole = 260 * 32 * 4
  assert [size for size in sizes if size > 30_000] == [whole] * 2


@pytest.mark.compat
def test_dtypes_as_stored_are_kept_tensor_by_tensor(one_device, tmp_path):
  source = write_model(tmp_path / 'base', torch_dtype='bfloat16')
  tensors = {
    name: x if 'norm' in name else x.astype(BF16)
    for name, x in random_tensors(CONFIG).items()
  }
  save_file(tensors, source / 'model.safetensors')
  assert hf_save.exact_dtype(source) == np.float32
  out = tmp_path / 'out'
  hf_save.save_params(out, source, load(source, one_device))
  equal(stored(out), tensors)
  assert json.loads((out / 'config.json').read_text()) == json.loads(
    (source / 'config.json').read_text()
  )


def test_a_tied_matrix_stored_as_the_head_keeps_its_dtype(one_device, tmp_path):
  source = write_model(tmp_path / 'base', tie_word_embeddings=True)
  tensors = load_file(source / 'model.safetensors')
  embed = tensors.pop('model.embed_tokens.weight').astype(BF16)
  save_file(tensors | {'lm_head.weight': embed}, source / 'model.safetensors')
  hf_save.save_params(tmp_path / 'out', source, load(source, one_device))
  equal(
    stored(tmp_path / 'out'), tensors | {'model.embed_tokens.weight': embed}
  )


# Stored dtypes, dtype asked for -> dtype to load in.
@pytest.mark.parametrize(('kept', 'asked', 'want'), [
  ([np.float32], None, np.float32),
  ([BF16], None, BF16),
  ([BF16], 'bfloat16', BF16),
  ([BF16], 'float32', np.float32),
  ([np.float32], 'bfloat16', np.float32),
  ([np.float16], None, np.float16),
  ([np.float16], BF16, np.float32),
  ([np.float64], None, np.float32),
  ([BF16, np.float32], None, np.float32),
])  # fmt: skip
def test_the_dtype_that_rounds_once(kept, asked, want, tmp_path):
  tensors = {str(n): np.zeros(2, dtype) for n, dtype in enumerate(kept)}
  save_file(tensors, tmp_path / 'model.safetensors')
  assert hf_save.exact_dtype(tmp_path, asked) == want


# config.json before, dtype -> what it says after.
@pytest.mark.parametrize(('said', 'dtype', 'want'), [
  ({'torch_dtype': 'float32'}, BF16, {'torch_dtype': 'bfloat16'}),
  ({'dtype': 'float32'}, BF16, {'dtype': 'bfloat16'}),
  ({}, 'float32', {'torch_dtype': 'float32'}),
  ({'dtype': 'float16'}, None, {'dtype': 'float16'}),
])  # fmt: skip
def test_config_says_the_dtype(said, dtype, want, one_device, tmp_path):
  source = write_model(tmp_path / 'base', their_own={'key': [1]}, **said)
  hf_save.save_params(tmp_path / 'out', source, load(source, one_device), dtype)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config == {**CONFIG, 'their_own': {'key': [1]}, **want}


def test_the_rest_of_a_model_comes_along_and_no_more(one_device, tmp_path):
  source = write_model(tmp_path / 'base')
  (source / 'generation_config.json').write_text('{"eos_token_id": [1, 2]}')
  (source / 'optimizer.json').write_text('{}')
  (source / 'pytorch_model.bin').write_bytes(b'')
  hf_save.save_params(tmp_path / 'out', source, load(source, one_device))
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  copied = {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json'}
  assert names == {'config.json', 'model.safetensors', *copied}
  for name in copied:
    assert (tmp_path / 'out' / name).read_bytes() == (
      source / name
    ).read_bytes()


def test_what_a_dtype_cannot_hold_is_refused(one_device, tmp_path):
  source = write_model(tmp_path / 'base')
  params = load(source, one_device)
  params['norm'] = params['norm'].at[3].set(1e6)
  message = refusal(
    hf_save.save_params, tmp_path / 'out', source, params, np.float16
  )
  assert 'float16 cannot hold in model.norm.weight' in message
  assert {p.name for p in tmp_path.iterdir()} == {'base'}


def test_a_full_disk_leaves_nothing_behind(one_device, tmp_path, monkeypatch):
  source = write_model(tmp_path / 'base')
  params = load(source, one_device)

  def full(*args, **kwargs):
    raise SafetensorError('I/O error: No space left on device')

  monkeypatch.setattr(hf_save, 'save_file', full)
  message = refusal(
    hf_save.save_params, tmp_path / 'out', source, params, kind=OSError
  )
  assert 'No space left' in message
  assert {p.name for p in tmp_path.iterdir()} == {'base'}


# --- merged weights


SPECS = {
  'all': lora.LoraSpec('all-linear', rank=3, alpha=6),
  'one layer, with the head': lora.LoraSpec(
    r'.*layers\.1\..*q_proj|lm_head', rank=4, alpha=8
  ),
  'ranks of their own': lora.LoraSpec(
    'q_proj,down_proj', rank=4, alpha=8,
    rank_pattern={r'layers\.0\..*': 2}, alpha_pattern={'q_proj': 3},
  ),
}  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize('case', SPECS)
def test_merged_weights_are_the_formula(case, one_device, tmp_path):
  source = write_model(tmp_path / 'base')
  base = load_file(source / 'model.safetensors')
  cfg = hf_config.read_config(source)
  adapter = write_adapter(
    tmp_path / 'adapter', load(source, one_device), cfg, SPECS[case]
  )
  loaded = peft.load_adapter(adapter)
  placed = peft.placement(loaded, params_lib.module_names(cfg))
  want = {name: x.astype(np.float64) for name, x in base.items()}
  for name, (a, b) in loaded.factors.items():
    delta = placed[name].scale * (a.T.astype(np.float64) @ b)
    want[f'{name}.weight'] += delta.T
  apply, params = load_params(source, None, adapter)
  hf_save.save_params(tmp_path / 'out', source, params)
  got = stored(tmp_path / 'out')
  assert got.keys() == base.keys()
  for name, x in want.items():
    assert got[name].dtype == np.float32
    np.testing.assert_allclose(got[name], x, atol=2e-6, rtol=0, err_msg=name)
  # And the logits of the model are those of the adapted one.
  ids = random_ids()
  apply_merged, merged = load_params(tmp_path / 'out')
  np.testing.assert_allclose(
    jax.jit(apply_merged)(merged, ids),
    jax.jit(apply)(params, ids),
    atol=1e-4,
    rtol=0,
  )


def test_a_merge_rounds_once(one_device, tmp_path):
  """From float32 to bfloat16: not the base first and then the sum."""
  source = write_model(tmp_path / 'base')
  cfg = hf_config.read_config(source)
  adapter = write_adapter(tmp_path / 'adapter', load(source, one_device), cfg)
  arguments = ['--model', str(source), '--adapter', adapter]
  out = [str(tmp_path / name) for name in ('full', 'half')]
  for path, dtype in zip(out, ('float32', 'bfloat16'), strict=True):
    code = __main__.cli(['merge', *arguments, '--out', path, '--dtype', dtype])
    assert code == 0
  full, half = (stored(tmp_path / name) for name in ('full', 'half'))
  equal(half, {name: x.astype(BF16) for name, x in full.items()})


# --- the verb


@pytest.fixture
def pair(one_device, tmp_path):
  """(model, adapter) directories."""
  source = write_model(tmp_path / 'base')
  cfg = hf_config.read_config(source)
  params = load(source, one_device)
  return str(source), write_adapter(tmp_path / 'adapter', params, cfg)


def test_the_verb_merges(pair, tmp_path, capsys):
  out = tmp_path / 'out'
  arguments = ['--model', pair[0], '--adapter', pair[1], '--out', str(out)]
  assert __main__.cli(['merge', *arguments]) == 0
  said, err = capsys.readouterr()
  total = params_lib.total(hf_config.read_config(out))
  assert (said, err) == (f'{total:,} parameters: {out}\n', '')
  assert sum(x.size for x in stored(out).values()) == total
  assert {x.dtype for x in stored(out).values()} == {np.dtype(np.float32)}
  # And then refuses to do so again.
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  assert __main__.cli(['merge', *arguments]) == 2
  assert 'exists already: name another directory' in capsys.readouterr().err
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_an_existing_file_or_dangling_link_is_refused(tmp_path):
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
  for name in ('file', 'link', '.'):
    message = refusal(hf_save.check_absent, tmp_path / name, kind=ConfigError)
    assert 'exists already' in message


@pytest.mark.parametrize(('changes', 'code', 'words'), [
  ({'--out': None}, 2, 'required: --out'),
  ({'--adapter': None}, 2, 'required: --adapter'),
  ({'--dtype': 'int8'}, 2, "invalid choice: 'int8'"),
  ({'--model': './none'}, 4, 'no such directory'),
  ({'--adapter': 'none'}, 4, 'is this an adapter?'),
  ({'--out': '/proc/none/out'}, 74, 'input/output error'),
])  # fmt: skip
def test_errors_of_the_verb(changes, code, words, pair, tmp_path, capsys):
  named = {
    '--model': pair[0],
    '--adapter': pair[1],
    '--out': str(tmp_path / 'out'),
    **changes,
  }
  argv = [x for key, value in named.items() if value for x in (key, value)]
  assert __main__.cli(['merge', *argv]) == code
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('\n') == 1
  assert words in err
  assert not (tmp_path / 'out').exists()


def test_an_adapter_for_another_model_is_refused(pair, tmp_path, capsys):
  other = write_model(tmp_path / 'other', num_hidden_layers=2)
  argv = ['--model', str(other), '--adapter', pair[1]]
  code = __main__.cli(['merge', *argv, '--out', str(tmp_path / 'out')])
  assert code == ModelError.exit_code
  assert not (tmp_path / 'out').exists()
