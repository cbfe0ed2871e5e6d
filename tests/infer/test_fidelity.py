"""Merging, and how far the merged model is from the adapter unmerged.

Reference: softmax, KL and the rest in numpy and float64, on the logits that
`score` writes of the adapted and of the merged model.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_train import __main__ as verbs
from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.errors import ModelError
from lorax_train.infer import fidelity, score
from lorax_train.infer.load import load_model
from lorax_train.quant import nf4, quantise
from tests import toys
from tests.data.toys import sentencepiece_model

KEYS = [f'model.layers.{i}.self_attn.q_proj' for i in range(3)]


def write_adapter(directory, b=0.3):
  """q_proj in rank 4; B is random, `b` its size."""
  directory.mkdir()
  config = {
    'peft_type': 'LORA', 'target_modules': ['q_proj'], 'r': 4, 'lora_alpha': 8
  }  # fmt: skip
  (directory / 'adapter_config.json').write_text(json.dumps(config))
  rng = np.random.default_rng(8)
  tensors = {}
  for name in KEYS:
    key = f'base_model.model.{name}.lora_'
    for half, size, shape in (('A', 0.3, (4, 32)), ('B', b, (40, 4))):
      factor = size * rng.standard_normal(shape)
      tensors[f'{key}{half}.weight'] = factor.astype(np.float32)
  save_file(tensors, directory / 'adapter_model.safetensors')
  return str(directory)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """(model, adapter) directories."""
  folder = tmp_path_factory.mktemp('fidelity')
  model = toys.write_model(folder / 'model')
  return str(model), write_adapter(folder / 'adapter')


def save(path, **arrays):
  np.savez(path, **arrays)
  return str(path)


def log_softmax(x):
  """In float64, term by term."""
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(-1))[..., None]


def divergence(p, q):
  p, q = log_softmax(p), log_softmax(q)
  return (np.exp(p) * (p - q)).sum(-1)


def scored(tokens, model, adapter=None):
  out = f'{tokens}.logits'
  score.score(model, tokens, out, adapter)
  with np.load(out) as file:
    return file['logits']


def check(report, counted, adapted, merged, base):
  """The report against what numpy makes of the logits of `score`."""
  adapted, merged, base = (x[counted] for x in (adapted, merged, base))
  apart = np.abs(adapted.astype(np.float64) - merged)
  kl = divergence(adapted, merged)
  want = {
    'positions': counted.sum(),
    'max_logit_difference': apart.max(),
    'mean_logit_difference': apart.mean(),
    'mean_kl': kl.mean(),
    'max_kl': kl.max(),
    'argmax_agreement': np.mean(adapted.argmax(-1) == merged.argmax(-1)),
    'mean_kl_of_base': divergence(adapted, base).mean(),
    'largest_logit': np.abs(adapted).max(),
  }
  for key, value in want.items():
    # Two programs, two orders of summing in float32.
    assert report[key] == pytest.approx(value, rel=2e-3, abs=2e-6), key


@pytest.mark.parametrize(('masked', 'batch_size'), [(True, 2), (False, 8)])
def test_the_report_is_what_numpy_says(masked, batch_size, pair, tmp_path):
  ids = toys.random_ids(4, (5, 40))
  mask = np.ones_like(ids)
  arrays = {'ids': ids}
  if masked:
    mask[1, :7] = mask[4, 30:] = 0
    arrays['mask'] = mask
  tokens = save(tmp_path / 'in.npz', **arrays)
  out = str(tmp_path / 'out')
  done = fidelity.merge(
    *pair, out, 'bfloat16', report=True, tokens=tokens, batch_size=batch_size
  )
  report = done['report']
  assert (report['rows'], report['dtype']) == (5, 'bfloat16')
  assert report['tokens'] == tokens
  check(
    report,
    mask.astype(bool),
    scored(tokens, *pair),
    scored(tokens, out),
    scored(tokens, pair[0]),
  )
  assert report['max_logit_difference'] > 1e-3
  assert report['mean_kl_of_base'] > 0.1


def test_in_float32_a_merge_loses_nothing(pair, tmp_path):
  done = fidelity.merge(*pair, str(tmp_path / 'out'), report=True)
  report = done['report']
  assert report['dtype'] == 'float32'
  assert report['max_logit_difference'] < 1e-4
  assert report['max_kl'] < 1e-8
  assert report['argmax_agreement'] == 1.0
  assert report['mean_kl_of_base'] > 0.1
  assert report['advice'].startswith('none: ')


def test_in_bfloat16_the_rounding_is_seen_and_named(pair, tmp_path):
  report = fidelity.merge(
    *pair, str(tmp_path / 'out'), 'bfloat16', report=True
  )['report']
  assert report['max_logit_difference'] > 1e-3
  assert report['max_kl'] >= report['mean_kl'] > 1e-7
  assert 'rounding the sum to bfloat16 costs' in report['advice']
  assert '--dtype float32, or serve the adapter unmerged' in report['advice']


def test_an_update_that_rounding_swallows(tmp_path):
  """W + s B A rounds to W where the update is below half a unit of W."""
  model = toys.write_model(tmp_path / 'model')
  # Stored in bfloat16, so that the base itself is not rounded any more.
  tensors = load_file(model / 'model.safetensors')
  save_file(
    {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors.items()},
    model / 'model.safetensors',
  )
  pair = str(model), write_adapter(tmp_path / 'adapter', b=1e-5)
  report = fidelity.merge(*pair, str(tmp_path / 'out'), report=True)['report']
  assert report['dtype'] == 'bfloat16'
  # What is lost is about all that the adapter does.
  assert report['mean_kl'] == pytest.approx(report['mean_kl_of_base'], rel=0.2)
  share = 100 * report['mean_kl'] / report['mean_kl_of_base']
  assert f'costs {share:.2f}% of what the adapter does' in report['advice']
  assert 'to lose nothing' not in report['advice']
  whole = fidelity.merge(
    *pair, str(tmp_path / 'whole'), 'float32', report=True
  )['report']
  assert whole['max_logit_difference'] < 1e-4
  assert whole['mean_kl'] < report['mean_kl'] / 100


def test_an_adapter_that_does_nothing(tmp_path, pair):
  adapter = write_adapter(tmp_path / 'adapter', b=0.0)
  report = fidelity.merge(
    pair[0], adapter, str(tmp_path / 'out'), 'bfloat16', report=True
  )['report']
  assert report['mean_kl_of_base'] == 0
  assert 'costs more than what the adapter does' in report['advice']


def test_a_merged_model_has_the_tokenizer_json_that_its_base_lacks(
  pair, tmp_path, capsys
):
  base = shutil.copytree(pair[0], tmp_path / 'base')
  (base / 'tokenizer.json').unlink()
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'model_max_length': 64}
  (base / 'tokenizer_config.json').write_text(json.dumps(config))
  (base / 'tokenizer.model').write_bytes(sentencepiece_model())
  done = fidelity.merge(str(base), pair[1], str(tmp_path / 'a'))
  assert done['no_tokenizer_json'] == ''
  files, _ = missing_files(base)
  assert sorted(files) == ['tokenizer.json', 'tokenizer_config.json']
  for name, content in files.items():
    assert (tmp_path / 'a' / name).read_bytes() == content
  # Where none can be made, a line says why.
  unigram = sentencepiece_model(
    model_type='unigram', vocab_size=60, byte_fallback=False
  )
  (base / 'tokenizer.model').write_bytes(unigram)
  argv = ['--model', str(base), '--adapter', pair[1], '--out']
  assert verbs.merge([*argv, str(tmp_path / 'b')]) == 0
  assert not (tmp_path / 'b' / 'tokenizer.json').exists()
  line = capsys.readouterr().out.splitlines()[1]
  assert line.startswith(
    f'tokenizer: {base}/tokenizer.model: no tokenizer.json'
  )


def test_no_more_logits_than_a_batch_are_in_memory(pair, tmp_path):
  out = tmp_path / 'out'
  fidelity.merge(*pair, str(out))
  model = load_model(Path(pair[0]), None, pair[1])
  shapes = set()

  def watched(params, ids, mask_BS=None):
    logits = model.apply(params, ids, mask_BS=mask_BS)
    shapes.add(logits.shape)
    return logits

  arrays = fidelity.random_rows(260, 7)
  watched_model = model._replace(apply=watched)
  report = fidelity.compare(watched_model, out, arrays, batch_size=2)
  assert shapes == {(2, 64, 260)}
  assert report['positions'] == 7 * 64


def test_random_rows_are_the_same_each_time():
  ids = fidelity.random_rows(260)['ids']
  assert ids.shape == (8, 64)
  assert ids.min() >= 0
  assert 200 < ids.max() < 260
  np.testing.assert_array_equal(fidelity.random_rows(260)['ids'], ids)
  np.testing.assert_array_equal(fidelity.random_rows(260, 3)['ids'], ids[:3])


def test_logits_that_are_not_finite_are_no_report(pair, tmp_path):
  out = tmp_path / 'out'
  fidelity.merge(*pair, str(out))

  def broken(params, ids, mask_BS=None):
    return jnp.full((*ids.shape, 260), jnp.nan)

  model = load_model(Path(pair[0]), None, pair[1])._replace(apply=broken)
  with pytest.raises(ModelError, match='logits that are not finite'):
    fidelity.compare(model, out, fidelity.random_rows(260))


# --- the verb


def test_the_verb_reports(pair, tmp_path, capsys):
  out = str(tmp_path / 'out')
  argv = ['--model', pair[0], '--adapter', pair[1], '--out', out]
  argv = ['merge', *argv, '--report', '--rows', '3', '--dtype', 'bfloat16']
  assert verbs.cli(argv) == 0
  said, err = capsys.readouterr()
  assert err == ''
  lines = said.splitlines()
  assert lines[0].endswith(f' parameters: {out}')
  assert [line.split()[0] for line in lines[1:]] == [
    'compared', 'stored', 'logits', 'KL', 'argmax', 'advice',
  ]  # fmt: skip
  assert '3 rows (random, seed 0), 192 positions' in lines[1]
  assert 'bfloat16' in lines[2]


def test_the_verb_as_json(pair, tmp_path, capsys):
  for name, options in (('plain', []), ('full', ['--report', '--rows', '2'])):
    out = str(tmp_path / name)
    argv = ['--model', pair[0], '--adapter', pair[1], '--out', out, '--json']
    assert verbs.cli(['merge', *argv, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said['out'] == out
    assert said['parameters'] == 42_208
    if not options:
      assert said['report'] is None
    else:
      assert said['report']['positions'] == 128
      assert said['report']['max_logit_difference'] < 1e-4


@pytest.mark.parametrize(('options', 'code', 'words'), [
  (['--rows', '3'], 2, '--rows is for --report'),
  (['--tokens', 'x.npz'], 2, '--tokens is for --report'),
  (['--report', '--rows', '0'], 2, '--rows 0: below 1'),
  (['--report', '--rows', 'x'], 2, "'x'"),
  (['--report', '--batch-size', '0'], 2, '--batch-size 0: below 1'),
  (['--report', '--tokens', 'x.npz', '--rows', '3'], 2, 'not allowed with'),
  (['--report', '--tokens', '{tmp}/none.npz'], 3, 'no such file'),
  (['--report', '--tokens', '{tmp}/text'], 3, 'not an npz file'),
  (['--report', '--tokens', '{tmp}/wide.npz'], 3, 'ids[0, 1] is 260'),
  (['--report', '--tokens', '{tmp}/hidden.npz'], 3, 'leaves no position'),
])  # fmt: skip
def test_errors_come_before_the_merge(
  options, code, words, pair, tmp_path, capsys
):
  (tmp_path / 'text').write_text('ids')
  save(tmp_path / 'wide.npz', ids=np.array([[5, 260]]))
  save(
    tmp_path / 'hidden.npz', ids=np.array([[5, 6]]), mask=np.zeros((1, 2), int)
  )
  out = tmp_path / 'out'
  argv = ['--model', pair[0], '--adapter', pair[1], '--out', str(out)]
  options = [option.format(tmp=tmp_path) for option in options]
  assert verbs.cli(['merge', *argv, *options]) == code
  said, err = capsys.readouterr()
  assert said == ''
  assert err.count('\n') == 1
  assert words in err
  assert not out.exists()


@pytest.mark.slow
def test_a_quantised_base_is_merged_into_what_it_stands_for(
  pair, tmp_path, capsys
):
  model, adapter = pair
  out = tmp_path / 'out'
  argv = ['merge', '--model', model, '--adapter', adapter, '--out', str(out)]
  assert verbs.cli([*argv, '--quant', 'nf4', '--report', '--rows', '1']) == 0
  said = capsys.readouterr().out
  assert '\nbase: nf4, and the adapter is merged into what it' in said
  assert 'none: the merged model computes what the adapted one does' in said
  base = load_file(Path(model) / 'model.safetensors')
  written = load_file(out / 'model.safetensors')
  factors = load_file(Path(adapter) / 'adapter_model.safetensors')

  def stands_for(name):
    weight = nf4.from_bitsandbytes(quantise(base[f'{name}.weight']))
    return np.asarray(weight.dequantised()).T

  for name in (KEYS[1], 'model.layers.2.mlp.down_proj'):
    want = stands_for(name)
    if name in KEYS:
      key = f'base_model.model.{name}.lora_'
      a, b = (factors[f'{key}{half}.weight'] for half in 'AB')
      want = want + 2 * b @ a
    np.testing.assert_allclose(written[f'{name}.weight'], want, atol=1e-5)
  for name in ('model.norm.weight', 'lm_head.weight'):
    np.testing.assert_array_equal(written[name], base[name])
