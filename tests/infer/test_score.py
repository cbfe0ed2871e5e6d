"""Logits and loss of given ids, in a function, a process and a library call.

Reference: logits and losses that transformers and PEFT gave (tests/golden).
"""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_train
from lorax_train import __main__, parallel
from lorax_train.errors import DataError
from lorax_train.formats import hf_config
from lorax_train.infer import score as room
from lorax_train.infer.load import load_params
from lorax_train.models.mistral import Decoder
from tests.formats.refusals import refusal
from tests.toys import random_ids, write_model

ROOT = pathlib.Path(__file__).parents[2]
# The others are in tests/models.
CASES = ['mistral_window', 'mistral_wide_heads', 'llama3_rope']


def reference(golden, case):
  folder = golden / case
  facts = json.loads((folder / 'reference.json').read_text())
  return folder, load_file(folder / 'reference.safetensors'), facts


def save(path, **arrays):
  np.savez(path, **arrays)
  return path


def scored(path, model, out, **kwargs):
  report = room.score(str(model), path, out, **kwargs)
  with np.load(out) as file:
    return report, dict(file)


@pytest.mark.parametrize('case', CASES)
def test_logits_and_loss_equal_transformers(case, golden, tmp_path):
  folder, want, facts = reference(golden, case)
  tokens = save(tmp_path / 'in.npz', ids=want['ids'], labels=want['labels'])
  report, got = scored(tokens, folder / 'model', tmp_path / 'out.npz')
  assert got.keys() == {'logits', 'loss'}
  assert (got['logits'].dtype, got['loss'].dtype) == (np.float32, np.float32)
  np.testing.assert_allclose(got['logits'], want['logits'], atol=1e-4, rtol=0)
  assert float(got['loss']) == pytest.approx(facts['loss'], abs=1e-5)
  assert report == {
    'rows': 2,
    'tokens': want['ids'].size,
    'loss': float(got['loss']),
  }


def test_a_mask_hides_padding(golden, tmp_path):
  folder, want, _ = reference(golden, 'mistral_tied')
  tokens = save(tmp_path / 'in.npz', ids=want['ids'], mask=want['mask'])
  report, got = scored(tokens, folder / 'model', tmp_path / 'out.npz')
  assert got.keys() == {'logits'}
  assert report['loss'] is None
  mask = want['mask'].astype(bool)
  np.testing.assert_allclose(
    got['logits'][mask], want['logits_masked'][mask], atol=1e-4, rtol=0
  )
  # The mask did something.
  gap = np.abs(got['logits'] - want['logits'])[mask].max()
  assert gap > 0.01


@pytest.mark.parametrize('adapter', ['adapter_patterns', 'adapter_head'])
def test_logits_under_an_adapter_equal_pefts(adapter, golden, tmp_path):
  folder, want, _ = reference(golden, 'mistral_window')
  tokens = save(tmp_path / 'in.npz', ids=want['ids'])
  _, got = scored(
    tokens,
    folder / 'model',
    tmp_path / 'out.npz',
    adapter=str(folder / adapter),
  )
  np.testing.assert_allclose(
    got['logits'], want[f'logits_{adapter}'], atol=1e-4, rtol=0
  )


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp('score') / 'model')


@pytest.fixture
def ids():
  return random_ids(1, (5, 9))


def test_out_is_the_very_name_that_was_given(model, ids, tmp_path):
  tokens = save(tmp_path / 'in.npz', ids=ids)
  room.score(str(model), tokens, tmp_path / 'logits')
  assert {p.name for p in tmp_path.iterdir()} == {'in.npz', 'logits'}
  with np.load(tmp_path / 'logits') as file:
    assert file['logits'].shape == (5, 9, 260)


def test_batches_of_any_size_give_the_same(model, ids, tmp_path):
  # 5 rows: in pairs with one left, three and two, and all at once.
  mask = np.ones_like(ids)
  mask[1, :4] = mask[4, 6:] = 0
  labels = np.where(mask, ids, -100)
  tokens = save(tmp_path / 'in.npz', ids=ids, mask=mask, labels=labels)
  every = [
    scored(tokens, model, tmp_path / 'out.npz', batch_size=size)[1]
    for size in (2, 3, 64)
  ]
  for other in every[1:]:
    np.testing.assert_allclose(other['logits'], every[0]['logits'], atol=1e-5)
    assert float(other['loss']) == pytest.approx(
      float(every[0]['loss']), abs=1e-6
    )


def test_loss_is_the_mean_over_labels_that_count():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 7)).astype(np.float32)
  labels = rng.integers(0, 7, (3, 4))
  labels[0, 0] = labels[1, 2] = labels[2, 3] = -100
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  losses = [
    -logp[b, t, labels[b, t + 1]]
    for b in range(3)
    for t in range(3)
    if labels[b, t + 1] != -100
  ]
  assert len(losses) == 7
  got = room.mean_loss(logits, labels)
  assert got == pytest.approx(np.mean(losses), abs=1e-6)


def test_no_label_that_counts_gives_nan(model, ids, tmp_path):
  labels = np.full_like(ids, -100)
  labels[:, 0] = 3  # nothing stands before it
  tokens = save(tmp_path / 'in.npz', ids=ids, labels=labels)
  report, _ = scored(tokens, model, tmp_path / 'out.npz')
  assert np.isnan(report['loss'])


def test_bfloat16_is_bfloat16_inside_and_float32_outside(model, ids, tmp_path):
  tokens = save(tmp_path / 'in.npz', ids=ids)
  _, full = scored(tokens, model, tmp_path / 'out.npz')
  _, half = scored(tokens, model, tmp_path / 'out.npz', dtype='bfloat16')
  assert half['logits'].dtype == np.float32
  gap = np.abs(half['logits'] - full['logits']).max()
  # tests/parity compares this distance with torch's.
  assert 1e-4 < gap < 0.05 * np.abs(full['logits']).max()


IDS = random_ids(2, (2, 6))
LABELS = IDS.copy()


def at(value, array=IDS):
  changed = array.astype(np.int64)
  changed[1, 2] = value
  return changed


# Arrays in the npz -> words of the message.
@pytest.mark.parametrize(('arrays', 'words'), [
  ({'labels': LABELS}, 'ids is missing'),
  ({'ids': IDS.astype(np.float32)}, 'ids is float32 [2, 6], not integers'),
  ({'ids': IDS.astype(bool)}, 'ids is bool [2, 6], not integers'),
  ({'ids': IDS[0]}, 'ids is int32 [6], not integers [B, T]'),
  ({'ids': IDS[None]}, 'ids is int32 [1, 2, 6], not integers [B, T]'),
  ({'ids': IDS[:0]}, 'ids is int32 [0, 6], not integers [B, T]'),
  ({'ids': np.array('words')}, 'not integers'),
  ({'ids': IDS, 'mask': IDS[:1]}, 'mask is [1, 6], ids [2, 6]'),
  ({'ids': IDS, 'mask': np.ones((2, 6))}, 'mask is float64 [2, 6]'),
  ({'ids': IDS, 'labels': IDS[:, 1:]}, 'labels is [2, 5], ids [2, 6]'),
  ({'ids': IDS, 'labels': IDS > 3}, 'labels is bool [2, 6]'),
  ({'ids': IDS, 'mask': IDS[0], 'labels': IDS[:1]}, 'labels is [1, 6]'),
  ({'ids': at(260)}, 'ids[1, 2] is 260; the model has 260 rows'),
  ({'ids': at(2**32)}, 'ids[1, 2] is 4294967296'),
  ({'ids': at(-1)}, 'ids[1, 2] is -1'),
  ({'ids': at(-100)}, 'ids[1, 2] is -100'),
  ({'ids': IDS, 'labels': at(260)}, 'labels[1, 2] is 260'),
  ({'ids': IDS, 'labels': at(-1)}, 'labels[1, 2] is -1'),
  ({'ids': at(7).astype(np.uint64) + np.uint64(2**63)}, 'ids[0, 0] is 92233'),
  ({'ids': np.array([[1, None]])}, 'not an npz file of plain arrays'),
])  # fmt: skip
def test_arrays_that_are_refused(arrays, words, model, tmp_path):
  tokens = save(tmp_path / 'in.npz', **arrays)
  out = tmp_path / 'out.npz'
  message = refusal(room.score, str(model), tokens, out, kind=DataError)
  assert message.startswith(f'--tokens {tokens}: ')
  assert words in message
  assert not out.exists()


def an_npz():
  file = io.BytesIO()
  np.savez(file, ids=IDS)
  return file.getvalue()


def an_npy(array=IDS):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def deflated():
  file = io.BytesIO()
  np.savez_compressed(file, ids=IDS)
  return file.getvalue()


def a_zip(**members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as zipped:
    for name, content in members.items():
      zipped.writestr(f'{name}.npy', content)
  return file.getvalue()


# Bytes of the file. The last of the list says that it holds 8 TB.
@pytest.mark.parametrize('content', [
  b'',
  b'[[1, 2, 3]]',
  b'\x80\x04N.',
  an_npy(),
  an_npz()[:-30],
  an_npz()[:40],
  an_npz().replace(b'ids.npy', b'ids.npx', 1),
  an_npz().replace(IDS.tobytes(), bytes(IDS.nbytes)),
  deflated()[:70] + b'junk' + deflated()[74:],
  a_zip(ids=b'words'),
  a_zip(ids=an_npy()[:-1]),
  a_zip(ids=an_npy()[:20]),
  a_zip(ids=an_npy().replace(b'(2, 6)', b'(1000000, 1000000)')),
])  # fmt: skip
def test_files_that_are_no_npz(content, model, tmp_path):
  path = tmp_path / 'in.npz'
  path.write_bytes(content)
  message = refusal(
    room.score, str(model), path, tmp_path / 'out.npz', kind=DataError
  )
  assert message.startswith(f'--tokens {path}: ')


def test_paths_that_are_no_file(model, tmp_path):
  for path, words in (
    (tmp_path / 'absent.npz', 'no such file'),
    (tmp_path, 'not an npz file'),
  ):
    message = refusal(
      room.score, str(model), path, tmp_path / 'out.npz', kind=DataError
    )
    assert message.startswith(f'--tokens {path}: {words}')


def test_ids_are_refused_before_weights_are_read(tmp_path):
  # There is no model: only an error about the tokens can come first.
  tokens = save(tmp_path / 'in.npz', ids=IDS[0])
  message = refusal(
    room.score, str(tmp_path / 'none'), tokens, 'out', kind=DataError
  )
  assert 'ids is int32 [6]' in message


# As a library.


@pytest.mark.parametrize('adapter', [None, 'adapter_patterns'])
def test_load_gives_a_function_parameters_and_a_tokenizer(
  adapter, golden, tmp_path
):
  folder, want, _ = reference(golden, 'mistral_window')
  directory = write_model(tmp_path / 'model')  # for its tokenizer's files
  for file in (folder / 'model').iterdir():
    (directory / file.name).write_bytes(file.read_bytes())
  apply, params, tokenizer = lorax_train.load(
    str(directory), adapter=adapter and str(folder / adapter)
  )
  name = f'logits_{adapter}' if adapter else 'logits'
  ids = jnp.asarray(want['ids'])
  np.testing.assert_allclose(
    jax.jit(apply)(params, ids), want[name], atol=1e-4, rtol=0
  )
  assert [tokenizer.decode(ids) for ids in tokenizer.encode(['a', 'word'])] == [
    'a',
    'word',
  ]


@pytest.mark.slow
def test_what_load_gives_can_be_differentiated_twice_and_forwards(golden):
  """Against the kernel of training, which cannot: other code altogether."""
  folder, want, _ = reference(golden, 'mistral_window')
  apply, params = load_params(folder / 'model')
  model = Decoder(hf_config.read_config(folder / 'model'))
  ids = jnp.asarray(want['ids'])
  along = jax.tree.map(
    lambda w: jax.random.normal(jax.random.key(3), w.shape) / 10, params
  )

  def loss(apply, params):
    return jnp.mean(jnp.square(jnp.tanh(apply(params, ids))))

  def slope(grads):
    return sum(map(jnp.vdot, *map(jax.tree.leaves, (grads, along))))

  @jax.jit
  def of_load(params):
    own = functools.partial(loss, apply)
    forwards = jax.jvp(own, (params,), (along,))[1]
    return forwards, jax.grad(lambda p: slope(jax.grad(own)(p)))(params)

  @jax.jit
  def of_training(params):
    own = functools.partial(
      loss, lambda p, ids: model.apply({'params': p}, ids)
    )
    grads, products = jax.jvp(jax.grad(own), (params,), (along,))
    return slope(grads), products

  got, wanted = of_load(params), of_training(params)
  np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(
      g, w, rtol=0, atol=1e-5 * float(jnp.abs(w).max())
    ),
    got[1],
    wanted[1],
  )


def test_load_takes_positions_and_a_mask(golden):
  folder, want, _ = reference(golden, 'mistral_tied')
  apply, params = load_params(folder / 'model')
  mask = want['mask'].astype(bool)
  positions = np.arange(12, dtype=np.int32)[None]
  logits = jax.jit(apply)(params, want['ids'], positions, mask)
  np.testing.assert_allclose(
    np.asarray(logits)[mask], want['logits_masked'][mask], atol=1e-4, rtol=0
  )
  # Rotary positions are relative: where all shift, nothing changes.
  shifted = jax.jit(apply)(params, want['ids'], positions + 5, mask)
  np.testing.assert_allclose(
    np.asarray(shifted)[mask], np.asarray(logits)[mask], atol=1e-4, rtol=0
  )


@pytest.mark.parametrize('adapter', [None, 'adapter_patterns'])
def test_load_onto_eight_devices_gives_the_same(adapter, golden):
  folder, want, _ = reference(golden, 'mistral_window')
  mesh = parallel.make_mesh(data=1, fsdp=2, tensor=4)
  apply, params = load_params(
    folder / 'model', mesh, adapter and str(folder / adapter)
  )
  name = f'logits_{adapter}' if adapter else 'logits'
  logits = jax.jit(apply)(params, jnp.asarray(want['ids']))
  np.testing.assert_allclose(logits, want[name], atol=1e-4, rtol=0)


def test_load_stores_and_computes_in_the_dtypes_asked_for(model, ids):
  path = str(model)
  full, stored, _ = lorax_train.load(path, param_dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype('bfloat16')}
  half, params, _ = lorax_train.load(path, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  exact, rounded, _ = lorax_train.load(path)
  rounded = jax.tree.map(
    lambda x: x.astype('bfloat16').astype('float32'), rounded
  )
  want = jax.jit(exact)(rounded, ids)
  np.testing.assert_allclose(jax.jit(full)(stored, ids), want, atol=1e-5)
  assert np.abs(jax.jit(half)(params, ids) - want).max() > 1e-4


# As a program.


def test_the_program(golden, tmp_path):
  folder, want, facts = reference(golden, 'mistral_window')
  tokens = save(tmp_path / 'in.npz', ids=want['ids'], labels=want['labels'])
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'lorax_train', 'score', '--json'),
      *('--model', folder / 'model', '--tokens', tokens),
      *('--out', tmp_path / 'out.npz', '--batch-size', '1'),
    ],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  # stdout is the report and nothing else.
  assert json.loads(done.stdout) == {
    'rows': 2,
    'tokens': 24,
    'loss': pytest.approx(facts['loss'], abs=1e-5),
  }
  with np.load(tmp_path / 'out.npz') as got:
    np.testing.assert_allclose(got['logits'], want['logits'], atol=1e-4, rtol=0)


def test_the_report_in_words(model, ids, tmp_path, capsys):
  out = tmp_path / 'out.npz'
  arguments = ['--model', str(model), '--out', str(out)]
  for arrays, loss in (
    ({'ids': ids}, ''),
    ({'ids': ids, 'labels': ids}, ', loss'),
  ):
    tokens = save(tmp_path / 'in.npz', **arrays)
    code = __main__.cli(['score', *arguments, '--tokens', str(tokens)])
    assert code == 0
    words = capsys.readouterr().out
    assert words.startswith(f'5 rows, 45 tokens{loss}')
    assert words.endswith(f': {out}\n')


SCORE = ['score', '--model', 'm', '--tokens', 't', '--out', 'o']


# Arguments -> exit code, words on stderr.
@pytest.mark.parametrize(('argv', 'code', 'words'), [
  ([], 2, 'VERB is missing; there are: train, score'),
  (['wibble'], 2, "'wibble' is no verb; there are: train, score"),
  (['--verbose'], 2, "'--verbose' is no verb"),
  (['score'], 2, 'required: --model, --tokens, --out'),
  (['score', '--model'], 2, 'expected one argument'),
  ([*SCORE, '--wibble'], 2, 'unrecognized arguments: --wibble'),
  ([*SCORE, '--dtype', 'int4'], 2, "invalid choice: 'int4'"),
  ([*SCORE, '--batch-size', 'big'], 2, "invalid int value: 'big'"),
  ([*SCORE, '--batch-size', '0'], 2, '--batch-size 0: below 1'),
  (SCORE, 3, '--tokens t: no such file'),
])  # fmt: skip
def test_errors_of_usage(argv, code, words, capsys):
  assert __main__.cli(argv) == code
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('\n') == 1
  assert words in err


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_lists_the_verbs(flag, capsys):
  assert __main__.cli([flag]) == 0
  out = capsys.readouterr().out
  assert out.startswith('usage: ')
  assert all(f'  {verb} ' in out for verb in __main__.VERBS)


def test_model_and_disk_errors_have_their_codes(model, tmp_path, capsys):
  tokens = str(save(tmp_path / 'in.npz', ids=IDS))
  for changed, code, words in (
    ({'--model': str(tmp_path / 'none')}, 4, 'no such directory'),
    ({'--adapter': str(tmp_path / 'none')}, 4, 'is this an adapter?'),
    ({'--out': str(tmp_path / 'none' / 'out')}, 74, 'input/output error'),
  ):
    named = {'--model': str(model), '--tokens': tokens, '--out': 'o', **changed}
    argv = ['score', *(x for pair in named.items() for x in pair)]
    assert __main__.cli(argv) == code
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert words in err
