"""Generation: in a function, in texts, and as a verb.

References: argmax over repeated full forwards for greedy decoding, the exact
nucleus in numpy for draws. tests/parity/test_generate.py has transformers.
"""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import __main__, lora, parallel
from lorax_train.errors import ConfigError, DataError
from lorax_train.formats import hf_config, peft
from lorax_train.infer import complete as texts_room
from lorax_train.infer import generate as room
from lorax_train.infer.load import load_params
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from tests.formats.refusals import refusal
from tests.toys import write_model

PROMPTS = [[256, 5, 9, 77, 31, 8], [256], [256, 100, 3], [7] * 21]


def write_adapter(directory, params, cfg):
  """An adapter that changes what is generated, and its two halves."""
  spec = lora.LoraSpec('all-linear', rank=3, alpha=6)
  names = params_lib.module_names(cfg)
  frozen, trainable = lora.split(jax.random.key(2), params, spec, names)
  leaves, tree = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(3), len(leaves))
  trainable = tree.unflatten(
    x + 0.2 * jax.random.normal(key, x.shape)
    for x, key in zip(leaves, keys, strict=True)
  )
  peft.save_adapter(directory, frozen, trainable, names, spec, 'base')
  return frozen, trainable


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
  """{directory, adapter, cfg, params by kind} of a random model."""
  root = tmp_path_factory.mktemp('generate')
  directory = write_model(root / 'model')
  cfg = hf_config.read_config(directory)
  _, params = load_params(directory)
  frozen, trainable = write_adapter(root / 'adapter', params, cfg)
  return {
    'directory': str(directory),
    'adapter': str(root / 'adapter'),
    'cfg': cfg,
    'plain': params,
    'bound': lora.bind(frozen, trainable),
    'merged': lora.merge(frozen, trainable),
  }


def slow_greedy(model, params, prompt, n):
  """The oracle: a whole forward for each token."""
  ids = np.zeros((1, len(prompt) + n), np.int32)  # to the right: causal
  ids[0, : len(prompt)] = prompt
  apply = jax.jit(lambda params, ids: model.apply({'params': params}, ids))
  for at in range(len(prompt), ids.shape[1]):
    ids[0, at] = np.argmax(apply(params, ids)[0, at - 1])
  return ids[0, len(prompt) :].tolist()


@pytest.mark.compat
@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('window', [None, 5])
def test_greedy_is_argmax_of_whole_forwards(window, tied, toy):
  cfg = type(toy['cfg'])(
    **{**toy['cfg'].__dict__, 'window': window, 'tied': tied}
  )
  params = dict(toy['plain'])
  if tied:
    params.pop('lm_head')
  model = Decoder(cfg)
  got = room.generate(model, params, PROMPTS, 20)
  assert got == [slow_greedy(model, params, ids, 20) for ids in PROMPTS]
  assert len({tuple(ids) for ids in got}) == len(PROMPTS)


@pytest.mark.compat
@pytest.mark.usefixtures('strict')
def test_bound_and_merged_give_the_same_tokens(toy):
  model = Decoder(toy['cfg'])
  plain, bound, merged = (
    room.generate(model, toy[kind], PROMPTS, 30)
    for kind in ('plain', 'bound', 'merged')
  )
  assert bound == merged
  assert bound[0] == slow_greedy(model, toy['bound'], PROMPTS[0], 30)
  assert all(x != y for x, y in zip(bound, plain, strict=True))


@pytest.mark.compat
@pytest.mark.parametrize('size', [1, 3, 4, 9])
def test_batched_equals_one_by_one(size, toy):
  model, params = Decoder(toy['cfg']), toy['bound']
  # One prompt is past a bucket of lengths, so padding differs among batches.
  prompts = [*PROMPTS, list(range(70))]
  want = [room.generate(model, params, [ids], 25)[0] for ids in prompts]
  assert room.generate(model, params, prompts, 25, batch_size=size) == want


def test_on_eight_devices_it_gives_the_same(toy):
  mesh = parallel.make_mesh(data=1, fsdp=2, tensor=4)
  _, params = load_params(Path(toy['directory']), mesh, toy['adapter'])
  model = Decoder(toy['cfg'])
  want = room.generate(model, toy['bound'], PROMPTS, 12)
  with jax.set_mesh(mesh):
    assert room.generate(model, params, PROMPTS, 12) == want


def test_a_stop_ends_its_row_and_no_other(toy):
  model, params = Decoder(toy['cfg']), toy['plain']
  free = room.generate(model, params, PROMPTS, 40)
  stop = next(
    id for id in free[0][5:] if all(id not in other for other in free[1:])
  )
  at = free[0].index(stop)
  got = room.generate(model, params, PROMPTS, 40, stop_ids=(stop,))
  assert got == [free[0][: at + 1], *free[1:]]
  # All stop at once, and each at its own first.
  firsts = [ids[0] for ids in free]
  assert room.generate(model, params, PROMPTS, 40, stop_ids=firsts) == [
    [id] for id in firsts
  ]


def test_prompts_may_be_none(toy):
  assert room.generate(Decoder(toy['cfg']), toy['plain'], [], 4) == []


# --- draws

LOGITS = np.log([0.3, 0.22, 0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.01])


def exact(temperature, top_p):
  """The distribution after temperature and nucleus, by hand in float64."""
  p = np.exp(LOGITS / temperature)
  p /= p.sum()
  order = np.argsort(-p)
  size = 1 + int((np.cumsum(p[order]) < top_p).sum())
  kept = np.zeros_like(p)
  kept[order[:size]] = p[order[:size]]
  return kept / kept.sum()


@pytest.mark.compat
@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize(('temperature', 'top_p', 'size'), [
  (1.0, 1.0, 9),
  (1.0, 0.6, 3),  # 0.67 is the first sum past it
  (1.0, 0.29, 1),
  (0.5, 0.9, 4),
  (2.0, 0.9, 7),
  (1e-30, 1.0, 1),
])  # fmt: skip
def test_draws_have_the_distribution_of_the_nucleus(temperature, top_p, size):
  want = exact(max(temperature, 1e-2), top_p)
  assert (want > 1e-6).sum() == size
  n = 20_000
  shuffle = np.random.default_rng(1).permutation(len(LOGITS))
  rows = np.arange(n, dtype=np.int32)
  logits = np.broadcast_to(LOGITS[shuffle], (n, len(LOGITS)))
  for rows_at, step in ((rows, 3), (np.full_like(rows, 5), rows)):
    # Once over rows, and once over the steps of one row.
    draw = jax.vmap(
      lambda row, step, x: room.sample(
        jax.random.key(7), x[None], row[None], step,
        jnp.float32(temperature), jnp.float32(top_p),
      )[0]
    )  # fmt: skip
    tokens = jax.jit(draw)(
      rows_at, np.broadcast_to(np.int32(step), (n,)), logits.astype(np.float32)
    )
    got = np.bincount(shuffle[np.asarray(tokens)], minlength=len(LOGITS)) / n
    # 5 sigma of a binomial count; 0 where nothing may fall.
    sigma = np.sqrt(want * (1 - want) / n)
    assert (np.abs(got - want) <= 5 * sigma + 1e-9).all(), (got, want)


def test_a_cut_nucleus_keeps_what_ties():
  logits = jnp.asarray([[0.0, 1.0, 1.0, -2.0]], jnp.float32)
  got = room.nucleus(logits, 0.1)
  np.testing.assert_array_equal(got, [[-np.inf, 1.0, 1.0, -np.inf]])


@pytest.mark.compat
def test_draws_depend_on_seed_row_and_step_alone(toy):
  model, params = Decoder(toy['cfg']), toy['plain']

  def draw(prompts, seed=0, **kwargs):
    return room.generate(
      model, params, prompts, 16, temperature=1.3, top_p=0.95, seed=seed,
      **kwargs,
    )  # fmt: skip

  want = draw(PROMPTS)
  assert draw(PROMPTS) == want
  assert draw(PROMPTS, batch_size=3) == want
  others = draw([PROMPTS[0], [1, 2], [3] * 40, PROMPTS[3]])
  assert [others[0], others[3]] == [want[0], want[3]]
  assert others[1] != want[1]
  assert all(x != y for x, y in zip(draw(PROMPTS, 1), want, strict=True))
  # The same prompt in several rows: another draw in each.
  same = draw([PROMPTS[0]] * 4)
  assert len({tuple(ids) for ids in same}) == 4
  assert same[0] == want[0]


# --- refusals


@pytest.mark.parametrize(('changes', 'words'), [
  ({'max_new_tokens': 0}, 'max_new_tokens is 0: give 1 or more'),
  ({'temperature': -0.1}, 'temperature is -0.1: give 0 or more'),
  ({'temperature': float('nan')}, 'temperature is nan'),
  ({'top_p': 0.0}, 'top_p is 0.0: give above 0 and at most 1'),
  ({'top_p': 1.5}, 'top_p is 1.5'),
  ({'seed': -1}, 'seed is -1'),
  ({'batch_size': 0}, 'batch_size is 0'),
])  # fmt: skip
def test_options_that_are_refused(changes, words, toy):
  kwargs = {'max_new_tokens': 4, **changes}
  message = refusal(
    lambda: room.generate(Decoder(toy['cfg']), toy['plain'], PROMPTS, **kwargs),
    kind=ConfigError,
  )
  assert words in message


@pytest.mark.parametrize(('prompts', 'words'), [
  ([[1], []], 'prompt 2 is empty and the model has no BOS'),
  ([[1, 260]], 'prompt 1 has id 260; the model has 260 rows'),
  ([[-1]], 'prompt 1 has id -1'),
  ([[1] * 29], 'prompt 1 has 29 tokens, with max_new_tokens 4 that is 33 of'
   ' the 32'),
  ([[]] * 9, '(and 6 more)'),
])  # fmt: skip
def test_prompts_that_are_refused(prompts, words, toy):
  message = refusal(
    lambda: room.generate(
      Decoder(toy['cfg']), toy['plain'], prompts, 4, max_length=32
    ),
    kind=DataError,
  )
  assert words in message


# --- texts, and the verb


def run(capsys, *argv):
  code = __main__.cli(['generate', *argv])
  return code, *capsys.readouterr()


def test_the_verb_continues_each_prompt(toy, tmp_path, capsys, monkeypatch):
  tokenizer = texts_room.tokenize.load_tokenizer(toy['directory'])
  texts = ['a word', '', 'no end']
  ids = [[tokenizer.bos_id, *one] for one in tokenizer.encode(texts)]
  for kind, adapter in (
    ('plain', []),
    ('bound', ['--adapter', toy['adapter']]),
  ):
    want = room.generate(
      Decoder(toy['cfg']), toy[kind], ids, 9, stop_ids=(tokenizer.eos_id,)
    )
    options = ['--model', toy['directory'], *adapter, '--max-new-tokens', '9']
    prompts = ['--prompt', 'a word', '--prompt', '', '--prompt', 'no end']
    code, out, err = run(capsys, *options, *prompts, '--json')
    assert (code, err) == (0, '')
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row['prompt'] for row in rows] == texts
    assert [row['ids'] for row in rows] == want
    assert all(row['tokens_per_second'] > 0 for row in rows)
    code, out, _ = run(capsys, *options, *prompts)
    assert (code, out) == (0, ''.join(row['text'] + '\n' for row in rows))
    # The same from a file, and from stdin.
    path = tmp_path / 'prompts.txt'
    path.write_text('a word\n\nno end\n', 'utf-8')
    assert run(capsys, *options, '--prompts', str(path))[1] == out
    stdin = io.TextIOWrapper(io.BytesIO(path.read_bytes()))
    monkeypatch.setattr('sys.stdin', stdin)
    assert run(capsys, *options, '--prompts', '-')[1] == out


def test_prompt_and_text_make_the_whole(shared):
  """A first blank, which sentencepiece drops, is not lost."""
  model = shared / 'models' / 'stories260K-mistral'
  (row,) = texts_room.complete(
    str(model), ['Once upon a time'], room.Options(12)
  )
  assert row['text'] == ', there was a little girl named Lily. She'
  (row,) = texts_room.complete(str(model), ['Lily'], room.Options(12))
  assert row['text'].startswith(' and Tom')


def test_it_stops_where_the_model_says(toy, tmp_path):
  (row,) = texts_room.complete(toy['directory'], ['abc'], room.Options(20))
  stop = row['ids'][6]
  directory = write_model(tmp_path / 'model')
  path = directory / 'generation_config.json'
  for said in (stop, [257, stop]):
    path.write_text(json.dumps({'eos_token_id': said}))
    (got,) = texts_room.complete(str(directory), ['abc'], room.Options(20))
    assert got['ids'] == row['ids'][: row['ids'].index(stop) + 1]


def test_an_empty_prompt_wants_a_bos(tmp_path):
  directory = write_model(tmp_path / 'model')
  path = directory / 'tokenizer_config.json'
  path.write_text(
    json.dumps({**json.loads(path.read_text()), 'add_bos_token': False})
  )
  message = refusal(
    lambda: list(texts_room.complete(str(directory), [''], room.Options(2))),
    kind=DataError,
  )
  assert 'prompt 1 is empty and the model has no BOS' in message


def test_bfloat16_generates(toy, capsys):
  code, out, _ = run(
    capsys, '--model', toy['directory'], '--prompt', 'x', '--dtype', 'bfloat16',
    '--max-new-tokens', '4', '--json', '--temperature', '1', '--seed', '3',
  )  # fmt: skip
  assert code == 0
  assert len(json.loads(out)['ids']) <= 4


@pytest.mark.parametrize(('argv', 'code', 'words'), [
  (['--prompt', 'x'], 2, 'required: --model'),
  (['--model', 'm'], 2, 'no prompt: give --prompt TEXT or --prompts FILE'),
  (['--model', 'm', '--prompt', 'x', '--top-p', '2'], 2, 'top_p is 2.0'),
  (['--model', 'm', '--prompt', 'x', '--seed', 'a'], 2, 'invalid int value'),
  (['--model', 'm', '--prompts', 'none.txt'], 3, 'none.txt: no such file'),
  (['--model', './m', '--prompt', 'x'], 4, 'no such directory'),
  (['--model', 'MODEL', '--prompt', 'x', '--adapter', 'none'], 4,
   'is this an adapter?'),
  (['--model', 'MODEL', '--prompts', 'BINARY'], 3, 'line 2 is not UTF-8'),
  (['--model', 'MODEL', '--prompt', 'a\udcff'], 3, 'prompt 1 is not UTF-8'),
  (['--model', 'SHORT', '--prompt', 'four'], 3,
   'has 5 tokens, with max_new_tokens 128 that is 133 of the 64'),
])  # fmt: skip
def test_errors_of_the_verb(argv, code, words, toy, tmp_path, capsys):
  (tmp_path / 'binary').write_bytes(b'fine\n\xff\n')
  names = {'MODEL': toy['directory'], 'BINARY': str(tmp_path / 'binary')}
  if 'SHORT' in argv:
    short = write_model(tmp_path / 'short', max_position_embeddings=64)
    names['SHORT'] = str(short)
  got, out, err = run(capsys, *(names.get(word, word) for word in argv))
  assert (got, out) == (code, '')
  assert err.count('\n') == 1
  assert words in err
