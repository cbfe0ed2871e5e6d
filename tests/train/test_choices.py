"""Loss and accuracy over the likelihoods of choices, and a run of them.

Reference: the formulas of MeZO (arXiv 2305.17333, appendix E.1) in numpy on
whole logits, one choice at a time: a score is the mean of its tokens'
log-likelihoods, the loss the cross-entropy of the softmax over a row's scores.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from lorax_train import __main__ as verbs
from lorax_train import config
from lorax_train.errors import ConfigError, DataError
from lorax_train.formats import hf_config
from lorax_train.infer.load import load_params
from lorax_train.models import ops
from lorax_train.train import choices, loop, reading, samples, setup
from lorax_train.train.validate import validate
from tests.toys import write_model

V, D, T = 29, 6, 8
NONE = -100

# Sequences of prompt and choice: (prompt, [right, other, ...]).
ROWS = [
  ([1, 2, 3], [[4], [5]]),
  ([7], [[8, 9, 10], [11], [12, 13]]),
  ([2, 2, 2, 2], [[3, 4, 5, 6], [6, 5]]),
  ([], []),  # padding
]


def batch_of(rows=ROWS):
  """As `sequences.take` makes it, by hand."""
  n = len(rows)
  batch = {
    'ids': np.zeros((n, 3, T), np.int32),
    'targets': np.full((n, 3, 4), NONE, np.int32),
    'begins': np.ones((n, 3), np.int32),
  }
  for b, (prompt, texts) in enumerate(rows):
    for c, text in enumerate(texts):
      ids = prompt + text
      batch['ids'][b, c, : len(ids)] = ids
      batch['targets'][b, c, : len(text)] = text
      batch['begins'][b, c] = len(prompt)
  return {name: jnp.asarray(x) for name, x in batch.items()}


def by_formula(logits, rows=ROWS):
  """(choices' loss, right ones' loss, hits) from logits [B, C, T, V]."""
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  compared = next_token = hits = n = n_tokens = 0
  for b, (prompt, texts) in enumerate(rows):
    if not texts:
      continue
    of_tokens = [
      [log_p[b, c, len(prompt) + k - 1, token] for k, token in enumerate(text)]
      for c, text in enumerate(texts)
    ]
    scores = np.array([np.mean(values) for values in of_tokens])
    compared += np.log(np.exp(scores).sum()) - scores[0]
    next_token -= sum(of_tokens[0])
    hits += all(scores[0] > scores[1:])
    n, n_tokens = n + 1, n_tokens + len(texts[0])
  return (compared, n), (next_token, n_tokens), (hits, n)


def logits_and_states():
  keys = jax.random.split(jax.random.key(3), 2)
  x = jax.random.normal(keys[0], (len(ROWS) * 3, T, D))
  w = jax.random.normal(keys[1], (D, V))
  return x @ w, ops.BeforeHead(x, w)


@pytest.mark.compat
@pytest.mark.parametrize('chunk', [None, 0, 12, 36])
@pytest.mark.usefixtures('strict')
def test_every_figure_is_that_of_the_formula(chunk):
  logits, states = logits_and_states()
  out = logits if chunk is None else states
  measures = choices.cross_entropy, choices.next_token_loss, choices.hits

  @jax.jit
  def measured(out):
    of = choices.likelihoods(out, batch_of(), chunk or 0)
    return [measure(of) for measure in measures]

  want = by_formula(logits.reshape(len(ROWS), 3, T, V))
  for got, (total, n) in zip(measured(out), want, strict=True):
    np.testing.assert_allclose(got[0], total, rtol=1e-5)
    assert int(got[1]) == n
  assert 0 < want[2][0] < 3  # some are right, and some are not


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('chunk', [None, 0, 36])
def test_choices_of_one_token_share_their_prompt(chunk):
  rows = [([1, 2, 3], [[4], [5]]), ([7], [[8], [3], [9]]), ([], [])]
  batch = batch_of(rows)
  batch = {
    'ids': batch['ids'][:, :1].at[0, 0, 3:].set(0).at[1, 0, 1:].set(0),
    'targets': batch['targets'][:, :, :1],
    'begins': batch['begins'],
  }
  keys = jax.random.split(jax.random.key(5), 2)
  x = jax.random.normal(keys[0], (len(rows), T, D))
  w = jax.random.normal(keys[1], (D, V))
  out = x @ w if chunk is None else ops.BeforeHead(x, w)
  of = choices.likelihoods(out, batch, chunk or 0)
  each = np.broadcast_to((x @ w)[:, None], (len(rows), 3, T, V))
  want = by_formula(each, rows)
  measures = choices.cross_entropy, choices.next_token_loss, choices.hits
  for measure, (total, n) in zip(measures, want, strict=True):
    np.testing.assert_allclose(measure(of)[0], total, rtol=1e-5)
    assert int(measure(of)[1]) == n


@pytest.mark.usefixtures('strict')
def test_gradients_by_chunks_are_those_of_all_logits():
  _, states = logits_and_states()

  def loss(x, w, make):
    # Three tokens at once of four.
    of = choices.likelihoods(make(x, w), batch_of(), 36)
    return choices.cross_entropy(of)[0]

  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  want = gradient(*states, lambda x, w: x @ w)
  got = gradient(*states, ops.BeforeHead)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.isfinite(ours).all()


def test_few_logits_are_made():
  _, states = logits_and_states()
  text = str(jax.make_jaxpr(lambda s: choices.likelihoods(s, batch_of()))(states))  # fmt: skip
  assert f'f32[{len(ROWS) * 3},4,{V}]' in text
  assert f'f32[{len(ROWS) * 3},{T},{V}]' not in text


def test_accuracy_of_a_model_that_likes_one_token():
  batch = batch_of([([1, 2], [[4], [5]]), ([3], [[4], [5]])])
  hits = jax.jit(lambda x: choices.hits(choices.likelihoods(x, batch)))
  # Of 6 both choices are as likely: who can't tell is not right.
  for liked, n_right in ((4, 2), (5, 0), (6, 0)):
    logits = np.zeros((6, T, V), np.float32)
    logits[..., liked] = 5.0
    assert [float(x) for x in hits(logits)] == [n_right, 2]


# --- a run of them


def write_table(path, n=60):
  """Texts of which the last letter's case tells the label."""
  ends = ['A', 'a']
  rows = [f'{"ab" * (i % 5)}{ends[i % 2]} \t{i % 2}' for i in range(n)]
  path.write_text('\n'.join(['text\tlabel', *rows]) + '\n')
  return path


def mapping_of(root, **sections):
  mapping = config.defaults()
  mapping['run_dir'] = str(root / 'run')
  mapping['model'].update(
    path=str(root / 'model'), dtype='float32', param_dtype='float32'
  )
  mapping['lora'].update(targets='all-linear', rank=4)
  mapping['data'].update(
    path=str(root / 'rows.tsv'),
    template='{text:strip} is{|} {label:0=up,1=low.}',
    rows=40,
  )
  mapping['train'].update(
    steps=10,
    batch_size=4,
    grad_accum=2,
    learning_rate=2e-2,
    schedule='constant',
  )
  mapping['mesh'].update(data=2, fsdp=2, tensor=2)
  mapping['eval'].update(rows=18, every=5, samples=0)
  for name, values in sections.items():
    mapping[name].update(values)
  return mapping


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Where the model and the rows are."""
  root = tmp_path_factory.mktemp('choices')
  write_model(root / 'model', num_hidden_layers=2)
  write_table(root / 'rows.tsv')
  return root


@pytest.fixture(scope='module')
def run_dir(root):
  """A finished run on 8 devices."""
  loop.run(config.from_mapping(mapping_of(root)))
  return root / 'run'


def lines_of(run_dir, key):
  lines = (run_dir / 'metrics.jsonl').read_text().splitlines()
  return [v[key] for v in map(json.loads, lines) if key in v]


# A byte a token, numbered by what stands for each; a space is U+0120.
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def ids_of(text):
  return [LETTERS.index(c) for c in text.replace(' ', '\u0120')]


def text_rows(numbers):
  """ROWS of a table's rows, BOS 256 in front."""
  words = [ids_of(' up'), ids_of(' low.')]
  rows = []
  for i in numbers:
    prompt = [256, *ids_of('ab' * (i % 5) + 'Aa'[i % 2] + ' is')]
    rows.append((prompt, [words[i % 2], words[1 - i % 2]]))
  return rows


def formula_of_model(root, numbers):
  """`by_formula` on all logits of the base, of each choice by itself."""
  apply, params = load_params(root / 'model', dtype='float32')
  rows = text_rows(numbers)
  ids = np.zeros((len(rows), 2, 24), np.int32)
  for b, (prompt, texts) in enumerate(rows):
    for c, text in enumerate(texts):
      ids[b, c, : len(prompt + text)] = prompt + text
  apply = jax.jit(apply)
  logits = np.stack([apply(params, of_row) for of_row in ids])
  return by_formula(logits, rows)


def rows_of_run(root, **sections):
  cfg = config.from_mapping(mapping_of(root, **sections))
  model_cfg = hf_config.read_config(root / 'model')
  return cfg, reading.read_rows(cfg, root / 'model', model_cfg)


def test_a_run_says_what_the_formula_says(run_dir, root):
  cfg, rows = rows_of_run(root)
  assert len(rows.eval_rows) == 18
  (loss, n), _, (hits, _) = formula_of_model(root, rows.eval_rows)
  assert lines_of(run_dir, 'eval_loss')[0] == pytest.approx(loss / n, rel=1e-4)
  assert lines_of(run_dir, 'eval_accuracy')[0] == hits / n
  # The first step: what adapters begin with is the base.
  items, _ = rows.items_at(cfg, 0)
  (loss, n), *_ = formula_of_model(root, rows.train_rows[items.ravel()])
  assert lines_of(run_dir, 'loss')[0] == pytest.approx(loss / n, rel=1e-4)


def test_a_run_learns_to_choose_and_eval_finds_it_so(run_dir, capsys):
  accuracies = lines_of(run_dir, 'eval_accuracy')
  assert accuracies[-1] == 1.0 > accuracies[0]
  assert verbs.cli(['eval', '--run', str(run_dir), '--json']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['base']['accuracy'] == accuracies[0]
  assert report['adapted']['accuracy'] == 1.0
  for key, at in (('base', 0), ('adapted', -1)):
    loss = lines_of(run_dir, 'eval_loss')[at]
    assert report[key]['loss'] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert 'perplexity' not in report[key]
  card = (run_dir / 'adapter' / 'README.md').read_text()
  assert f'accuracy {accuracies[0]:.4f} -> 1.0000' in card
  assert verbs.cli(['inspect', str(run_dir)]) == 0
  assert 'accuracy' in capsys.readouterr().out


# --- rows


def test_batches_by_length_hold_every_row_once(root):
  cfg, rows = rows_of_run(root, data={'buckets': '10'})
  seen, lengths = [], set()
  for step in range(rows.buckets.n_batches):
    batch = rows.part(cfg, step, np.arange(4))
    lengths.add(batch['ids'].shape[-1])
    items, _ = rows.items_at(cfg, step)
    seen += items[items >= 0].tolist()
  assert sorted(seen) == list(range(40))
  assert lengths == {10, 64}
  held = list(rows.held_out(4))
  assert {b['ids'].shape[-1] for b in held} == {10, 64}
  assert sum(int((b['targets'][:, 0] >= 0).any(-1).sum()) for b in held) == 18
  assert {s['ids'].shape for s in rows.shapes(cfg, setup.make_mesh(cfg)).values()} == {(2, 4, 2, 10), (2, 4, 2, 64)}  # fmt: skip


def test_the_right_ones_can_be_learned_alone(root):
  cfg, rows = rows_of_run(root, train={'loss': 'tokens'})
  batch = rows.part(cfg, 0, np.arange(4))
  assert set(batch) == {'ids', 'labels'}
  items, _ = rows.items_at(cfg, 0)
  for ids, labels, (prompt, (right, _)) in zip(
    batch['ids'].reshape(-1, 64),
    batch['labels'].reshape(-1, 64),
    text_rows(rows.train_rows[items.ravel()]),
    strict=True,
  ):
    n = len(prompt + right)
    assert ids[:n].tolist() == prompt + right
    assert labels[:n].tolist() == [NONE] * len(prompt) + right
    assert (labels[n:] == NONE).all()
  assert set(next(rows.held_out(4))) == {'ids', 'targets', 'begins'}
  assert int(rows.tokens.sum()) == sum(
    len(p + t[0]) for p, t in text_rows(rows.train_rows)
  )


def test_a_sample_is_a_prompt_and_the_right_choice(root):
  _, rows = rows_of_run(root)
  (sample,) = samples.choose(rows, 1)
  number = int(rows.eval_rows[0])
  ((prompt, (right, _)),) = text_rows([number])
  assert sample.prompt == prompt
  assert sample.wanted == ' low.' if number % 2 else ' up'
  assert ids_of(sample.wanted) == right


PLAIN = {'template': '{text}{|} {label}'}
REFUSED = [
  ({'data': {'packing': True}}, ConfigError, 'data.packing: not with rows of choices'),
  ({'data': PLAIN, 'train': {'loss': 'choices'}}, ConfigError, 'train.loss=choices: these rows have none'),
  ({'data': {'rows': 43}}, DataError, 'data.rows=43 and eval.rows=18: there are 60 rows'),
]  # fmt: skip


@pytest.mark.parametrize(('sections', 'error', 'message'), REFUSED)
def test_what_choices_do_not_go_with(root, sections, error, message):
  with pytest.raises(error, match=message):
    rows_of_run(root, **sections)


def test_sources_with_and_without_choices(root):
  plain = {'path': str(root / 'rows.tsv'), **PLAIN}
  both = {'path': '', 'rows': 0, 'mixture': ({'path': plain['path']}, plain)}
  with pytest.raises(DataError, match='some have none'):
    rows_of_run(root, data=both)
  with pytest.raises(ConfigError, match=r'data\.rows goes with data\.path'):
    rows_of_run(root, data={**both, 'rows': 5})


def test_the_verbs_know_choices(root, capsys):
  argv = ['--model', str(root / 'model'), '--data', str(root / 'rows.tsv'),
          '--template', mapping_of(root)['data']['template']]  # fmt: skip
  assert verbs.cli(['data', *argv, '--rows', '1']) == 0
  out = capsys.readouterr().out
  assert 'A is⟦ up⟧\n  or: ⟦ low.⟧' in out
  assert '2 a row at most, 5 tokens at most; the commonest' in out
  assert 'that of 50.0 % of the rows' in out
  assert 'EOS' not in out
  assert verbs.cli(['eval', *argv]) == 0
  assert ', accuracy 0.' in capsys.readouterr().out
  checks = validate(config.from_mapping(mapping_of(root)))
  assert [c.name for c in checks if c.status in ('FAIL', 'skipped')] == []
