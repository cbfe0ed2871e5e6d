"""The order of a run's rows on any number of hosts, and after any stop.

References: sha256 of the numbers that one host reads, and of the uninterrupted
walk; for placed arrays those of one process; for runs with mixtures and buckets
the uninterrupted run.
"""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from lorax_train import config, parallel
from lorax_train.data.tokenized import Report
from lorax_train.errors import DataError, ResumeError
from lorax_train.formats import hf_config
from lorax_train.train import evaluate, inspection, loop, reading
from lorax_train.train.rows import arrange, banner_lines
from tests.train.test_loop import make_config, metrics

STEPS = 500
SHAPE = 2, 16  # micro-batches, rows
KINDS = {
  'rows': {},
  'packs': {'packing': True},
  'mixture': {
    'mixture': (
      {'path': 'a', 'weight': 0.7},
      {'path': 'b', 'weight': 0.25},
      {'path': 'a', 'weight': 0.05, 'template': 'text'},
    )
  },
  'mixture of packs': {
    'mixture': ({'path': 'a'}, {'path': 'b'}),
    'packing': True,
  },
  'buckets': {'buckets': '64,128,256'},
  'mixture in buckets': {
    'mixture': ({'path': 'a'}, {'path': 'b'}),
    'buckets': '64,128,256',
  },
}
# Rows of each source; the second is smaller than a batch everywhere.
SIZES = {'alpaca': (51_924, 20, 999), 'small': (700, 5, 60), 'tiny': (9, 3, 12)}

GOLDEN = {
  'rows': 'a16f1ea0b7efaca7bef16ffa8269588022d5d99fcec405979dea85317ceb6cd8',
  'packs': 'e75b2995456561b4a7704b3cfc765d6222f55e85f70ce3c1db6792169bd79cd2',
  'mixture': 'b2ce74961ac741737b8bec10e9e86b0efcceedc931328a1c68b0b2d0d4067244',
  'mixture of packs': 'd7e928fb066e3611f5eb109fa7dd283c85a97e99f1b11e9db49ac71517fbec03',
  'buckets': '1e75abffdf77230ac7d9cfddd86b7f68f6f836d9d39eca110963cdc192318636',
  'mixture in buckets': 'd19c4a21015f165dae047497f4332a71f883a0275bfe3601674455e893ed993c',
}  # fmt: skip


NO_REPORT = Report(0, 0, {}, 0, 0, 0, 0, 0, 0)


@dataclasses.dataclass
class Lengths:
  """All that an order may depend on: rows without their tokens."""

  lengths: np.ndarray
  where: list[str]
  fingerprint: str = 'of nothing'
  ids: tuple = ()
  labels: tuple = ()
  report: Report = NO_REPORT


def rows_of(kind, sizes, seed=0):
  """`Rows` of sources of so many rows, made from nothing."""
  mapping = config.defaults()
  mapping['model']['path'] = 'unused'
  data = KINDS[kind]
  if 'mixture' not in data:
    data = {**data, 'path': 'a'}
  mapping['data'].update(data, max_length=256)
  mapping['train'].update(
    grad_accum=SHAPE[0], batch_size=SHAPE[1], seed=seed, steps=STEPS
  )
  cfg = config.from_mapping(mapping)
  sources = config.sources(cfg.data)
  given = [
    Lengths(9 + np.arange(n) * 7919 % 241, [f'{s.path}:{i}' for i in range(n)])
    for s, n in zip(sources, SIZES[sizes], strict=False)
  ]
  return cfg, arrange(cfg, given, None, None)


def read_by(kind, sizes, hosts, steps=range(STEPS)):
  """Numbers of the rows in each batch [steps, ...], each host its own part."""
  of_hosts = []
  cfg, rows = rows_of(kind, sizes)
  for index in range(hosts):
    of_hosts.append(
      [np.split(rows.items_at(cfg, s)[0], hosts, axis=1)[index] for s in steps]
    )
  return np.concatenate(of_hosts, axis=2)


def digest(numbers):
  return hashlib.sha256(numbers.astype('<i8').tobytes()).hexdigest()


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('kind', KINDS)
def test_the_order_is_one_on_any_number_of_hosts_and_after_any_stop(
  kind, sizes
):
  whole = read_by(kind, sizes, 1)
  assert whole.shape == (STEPS, *SHAPE)
  assert {digest(read_by(kind, sizes, n)) for n in (2, 4, 8)} == {digest(whole)}
  cfg, rows = rows_of(kind, sizes)
  for stop in np.random.default_rng(0).integers(1, STEPS, 20):
    if 'pack' not in kind or sizes != 'alpaca':  # those take a while to make
      cfg, rows = rows_of(kind, sizes)
    tail = [rows.items_at(cfg, s)[0] for s in range(stop, STEPS)]
    assert digest(np.array(tail)) == digest(whole[stop:])


@pytest.mark.parametrize(('kind', 'want'), GOLDEN.items())
def test_the_order_never_changes(kind, want):
  """Written out once: a resumed run must meet it on any machine or numpy."""
  cfg, rows = rows_of(kind, 'small')
  numbers = []
  for step in range(STEPS):
    items, length = rows.items_at(cfg, step)
    numbers += [*items.ravel(), length]
  assert digest(np.array(numbers)) == want


@pytest.mark.parametrize('kind', ['rows', 'buckets'])
def test_every_row_is_seen_once_an_epoch(kind):
  cfg, rows = rows_of(kind, 'small')
  n_rows = len(rows.train_rows)
  assert n_rows == 700 - 64
  seen = np.concatenate([
    rows.items_at(cfg, step)[0].ravel() for step in range(60)
  ])  # fmt: skip
  epoch = seen[: 20 * 32] if kind == 'buckets' else seen[:n_rows]
  assert sorted(epoch[epoch >= 0]) == list(range(n_rows))


def test_rows_are_held_out_of_each_source_by_its_weight():
  cfg, rows = rows_of('mixture', 'small')
  starts = np.array([0, 700, 705, 765])
  held = rows.eval_rows
  counts = np.histogram(held, starts)[0]
  # 64 by 0.7, 0.25, 0.05; of 5 rows a tenth is none.
  assert counts.tolist() == [45, 0, 3]
  assert not set(held) & set(rows.train_rows)
  assert held[0] < 700 <= held[1]  # a first of each
  # Sources 0 and 2 are two templates of a file: no row is learned in one and
  # held out in the other.
  held_places = {rows.eval_set.where[i] for i in held}
  learned = {rows.train_set.where[i] for i in rows.train_rows}
  assert len(held_places) >= 45
  assert not held_places & learned
  n_left = [s.n_items for s in rows.sources]
  assert n_left[1] == 5
  assert sum(n_left) == len(rows.train_rows)
  # What is given as held out is all of it; nothing is taken from the sources.
  own = Lengths(np.full(7, 9), [''] * 7)
  given = [s.rows for s in rows.sources]
  rows = arrange(cfg, given, own, None)
  assert rows.eval_rows.tolist() == list(range(7))
  assert len(rows.train_rows) == 765


# Of one file: (a source, another).
SAME_ROWS = [
  ('d/rows.json', './d/rows.json'),
  ('d/rows.json', '{here}/d/rows.json'),
  ('d/rows.json', 'link.json'),
  ('d', 'd/rows.json'),
  ('./d/', 'd'),
]


@pytest.mark.parametrize('spelt', SAME_ROWS)
def test_no_row_is_held_out_and_learned_however_its_file_is_called(
  spelt, rows_file, tmp_path, monkeypatch, tiny_model
):
  (tmp_path / 'd').mkdir()
  rows_file.rename(tmp_path / 'd' / 'rows.json')
  (tmp_path / 'link.json').symlink_to('d/rows.json')
  monkeypatch.chdir(tmp_path)
  one, other = (path.format(here=tmp_path) for path in spelt)
  cfg = make_config(
    tiny_model, '', 'unused',
    data={'mixture': ({'path': one}, {'path': other, 'template': 'uno_reverse'})},
  )  # fmt: skip
  rows = reading.read_rows(cfg, tiny_model, hf_config.read_config(tiny_model))
  held, learned = (
    [of.where[i].rpartition(' ')[2] for i in numbers]
    for of, numbers in (
      (rows.eval_set, rows.eval_rows),
      (rows.train_set, rows.train_rows),
    )
  )
  assert len(held) == 4
  assert not {*held} & {*learned}
  # Each of the 40 rows twice, less what is held out.
  assert len(learned) == 2 * (40 - len({*held}))


def test_nothing_may_be_held_out_whole():
  cfg, rows = rows_of('mixture', 'small')
  held = rows.eval_set.where[rows.eval_rows[0]]
  given = [s.rows for s in rows.sources]
  given[2] = Lengths(np.array([9]), [held])
  with pytest.raises(DataError, match='a: each of its rows is held out'):
    arrange(cfg, given, None, None)


# --- arrays on devices

# (mesh, the host of each of its devices in order, the rows that each has)
HOSTS = [
  ((8, 1, 1), '00112233', ['01', '23', '45', '67']),
  ((2, 4, 1), '00001111', ['0123', '4567']),
  ((1, 8, 1), '01234567', '01234567'),
  ((2, 1, 4), '00112233', ['0123', '0123', '4567', '4567']),  # two share theirs
  ((1, 1, 8), '00001111', ['01234567'] * 2),
  ((4, 2, 1), '00000000', ['01234567']),
  # As jax.make_mesh puts the devices of a v5e 4x4, of its 16 every second ...
  ((1, 8, 1), '00110221', ['014', '237', '56']),
  # ... and of a v4 2x2x4, whose hosts take turns.
  ((1, 8, 1), '01230123', ['04', '15', '26', '37']),
]


@pytest.mark.parametrize(('sizes', 'layout', 'want'), HOSTS)
def test_hosts_put_their_parts_together(
  sizes,
  layout,
  want,
  tiny_model,
  tokens_file,
):
  cfg = make_config(
    tiny_model, tokens_file, 'unused',
    data={'template': 'tokens', 'packing': True, 'max_length': 100},
    train={'grad_accum': 2},
  )  # fmt: skip
  rows = reading.read_rows(cfg, tiny_model, hf_config.read_config(tiny_model))
  mesh = parallel.make_mesh(*sizes)
  host_of = dict(zip(mesh.devices.flat, map(int, layout), strict=True))
  of_hosts = [
    parallel.rows_of(mesh, 8, host, host_of.__getitem__)
    for host in range(len(want))
  ]
  assert [''.join(map(str, own)) for own in of_hosts] == [*want]
  placed, _ = rows.batch(cfg, mesh, 3)
  read = [rows.part(cfg, 3, own) for own in of_hosts]
  for name, array in placed.items():
    # Each device holds what its host has read, at the place it has there.
    for shard in array.addressable_shards:
      host = host_of[shard.device]
      of_device = np.arange(8)[shard.index[1]]
      own = read[host][name][:, np.isin(of_hosts[host], of_device)]
      np.testing.assert_array_equal(shard.data, own, strict=True)
      assert own.shape[1] == len(of_device)


@pytest.mark.parametrize('own', [[0, 1, 4, 5], [2, 3, 6, 7], [*range(8)]])
def test_rows_find_their_devices_from_where_a_host_has_them(own, monkeypatch):
  """jax asks for the rows of devices; a host has only its own to give."""
  asked = {}

  def callback(shape, where, give):
    begins = [b for b in range(0, 8, 2) if b in own]
    for begin in begins:
      asked[begin] = give((slice(None), slice(begin, begin + 2)))
    return shape, where

  monkeypatch.setattr(jax, 'make_array_from_callback', callback)
  whole = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  own = np.array(own)
  shape, where = parallel.put_rows(own, whole[:, own], 8, 'where')
  assert (shape, where) == (whole.shape, 'where')
  assert len(asked) == len(own) // 2
  for begin, got in asked.items():
    np.testing.assert_array_equal(got, whole[:, begin : begin + 2])


def test_shapes_are_those_of_the_batches(
  tiny_model,
  tokens_file,
):
  mesh = parallel.make_mesh(2, 4, 1)
  for data in ({}, {'packing': True}, {'buckets': '16,32'}):
    cfg = make_config(
      tiny_model, tokens_file, 'unused', data={'template': 'tokens', **data}
    )
    rows = reading.read_rows(cfg, tiny_model, hf_config.read_config(tiny_model))
    shapes = rows.shapes(cfg, mesh)
    lengths = set()
    for step in range(20):
      batch, tokens = rows.batch(cfg, mesh, step)
      length = batch['ids'].shape[-1]
      lengths.add(length)
      for name, want in shapes[length].items():
        got = batch[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding == want.sharding
      assert batch.keys() == shapes[length].keys()
      items = rows.items_at(cfg, step)[0]
      assert tokens == sum(rows.tokens[i] for i in items.ravel() if i >= 0)
    assert lengths == set(shapes)


# --- runs


@pytest.fixture
def chat_file(tmp_path):
  """20 longer rows of other columns."""
  path = tmp_path / 'chat.jsonl'
  rows = [
    {'prompt': f'And {i}? ', 'completion': 'z' * (30 + i)} for i in range(20)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def config_of(model, rows_file, chat_file, run_dir, steps=6, data=None, **more):
  mixture = (
    {'path': str(rows_file), 'weight': 3},
    {'path': str(chat_file), 'weight': 1.0, 'template': 'prompt_completion'},
  )
  return make_config(
    model, '', run_dir,
    data={'mixture': mixture, 'max_length': 300, **(data or {})},
    train={'steps': steps}, **more,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  'data',
  [
    {'packing': True},
    {'buckets': '64,128'},
  ],
)
def test_a_run_on_a_mixture_learns_resumes_and_says_what_it_reads(
  data, tiny_model, rows_file, chat_file, tmp_path, capsys
):
  args = tiny_model, rows_file, chat_file
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  loop.run(config_of(*args, whole, data=data, lora={'dropout': 0.1}))
  said = capsys.readouterr().out
  assert f'75 % {rows_file}, alpaca: 40 of 40 rows kept' in said
  assert f'25 % {chat_file}, prompt_completion: 20 of 20 rows kept' in said
  # A tenth of 20 rows, and 3 of 4 of the first, which has a tenth to spare.
  assert 'data       56 rows of 2 sources; 4 others held out' in said
  loop.run(config_of(*args, parts, 2, data, lora={'dropout': 0.1}))
  with pytest.raises(ResumeError, match=r"data\.mixture was .*'weight': 3\.0"):
    other = {**data, 'mixture': ({'path': str(rows_file)},)}
    loop.run(config_of(*args, parts, 6, other, lora={'dropout': 0.1}))
  loop.run(config_of(*args, parts, 6, data, lora={'dropout': 0.1}))
  kind = 'packs' if 'packing' in data else 'rows'
  assert f'6 of 8 {kind}, learning' in inspection.inspect(str(parts))[1]
  for key in ('loss', 'grad_norm', 'eval_loss'):
    assert metrics(parts, key) == metrics(whole, key)
  name = 'adapter/adapter_model.safetensors'
  assert (parts / name).read_bytes() == (whole / name).read_bytes()
  held_out = metrics(whole, 'eval_loss')
  assert held_out[-1][1] < held_out[0][1]
  assert '1 x 8 ' in said
  assert 'a step, padding included; 6 steps are 48 ' in said
  card = (whole / 'adapter' / 'README.md').read_text()
  assert 'template `alpaca`, `prompt_completion`' in card


@pytest.mark.slow
def test_other_verbs_read_a_run_on_a_mixture(
  tiny_model, rows_file, chat_file, tmp_path
):
  run_dir = tmp_path / 'run'
  loop.run(
    config_of(tiny_model, rows_file, chat_file, run_dir, 2, eval={'samples': 2})
  )
  report = evaluate.evaluate_run(str(run_dir))
  first, *_, last = (loss for _, loss in metrics(run_dir, 'eval_loss'))
  assert report['base']['loss'] == pytest.approx(first, rel=1e-5)
  assert report['adapted']['loss'] == pytest.approx(last, rel=1e-5)
  assert report['data'] == f'{rows_file}, {chat_file}'
  assert report['template'] == 'alpaca, prompt_completion'
  _, text = inspection.inspect(str(run_dir))
  assert (
    f'3 x {rows_file}, template alpaca; 1 x {chat_file}, template'
    ' prompt_completion'
  ) in text
  assert 'steps       2 of 8 rows,' in text
  samples = (run_dir / 'samples.md').read_text()
  assert f'## {rows_file}: row ' in samples
  assert f'## {chat_file}:' in samples
  rows_file.write_text(rows_file.read_text().replace('Say', 'Tell'))
  with pytest.raises(ResumeError, match=r'the data of .*chat\.jsonl are not'):
    evaluate.evaluate_run(str(run_dir))


@pytest.mark.slow
def test_a_step_is_compiled_for_each_bucket_ahead_of_the_loop(
  tiny_model,
  tokens_file,
  tmp_path,
  capsys,
):
  compiled = []

  def listen(event, _seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  def count(steps):
    compiled.clear()
    loop.run(
      make_config(
        tiny_model, tokens_file, tmp_path / f'run{steps}',
        data={'template': 'tokens', 'buckets': '16,24,40'},
        train={'steps': steps}, checkpoint={'every': 50}, eval={'every': 50},
      )
    )  # fmt: skip
    return len(compiled)

  jax.monitoring.register_event_duration_secs_listener(listen)
  count(1)  # fills the caches of what is shared between runs
  assert count(21) == count(3)
  said = capsys.readouterr().out
  assert '(for 16, 24, 40 tokens)' in said
  assert '1 x 8 rows of 16, 24 or 40 tokens: at most 320 a step' in said
  # 56 rows in batches of 8, the last of them not full.
  assert '21 steps are 3.00 epochs of 56 rows' in said
  assert len(metrics(tmp_path / 'run21', 'loss')) == 21


def test_buckets_hold_less_padding_and_the_same_rows(
  tiny_model,
  tokens_file,
):
  model_cfg = hf_config.read_config(tiny_model)
  mesh = parallel.make_mesh(8, 1, 1)
  room, learned = {}, {}
  for name in ('', '16,24,40'):
    cfg = make_config(
      tiny_model, tokens_file, 'unused',
      data={'template': 'tokens', 'buckets': name},
    )  # fmt: skip
    rows = reading.read_rows(cfg, tiny_model, model_cfg)
    epoch = [rows.batch(cfg, mesh, step)[0] for step in range(7)]
    room[name] = sum(batch['ids'].size for batch in epoch)
    learned[name] = sorted(
      tuple(row[row != -100].tolist())
      for batch in epoch
      for row in np.asarray(batch['labels'])[0]
    )
  assert learned[''] == learned['16,24,40']
  assert room['16,24,40'] < 0.6 * room['']


def test_the_banner_tells_shares_of_any_weights(monkeypatch):
  monkeypatch.setitem(
    KINDS,
    'heavy',
    {'mixture': tuple({'path': p, 'weight': 1e308} for p in 'abcd')},
  )
  monkeypatch.setitem(SIZES, 'four', (100, 100, 100, 100))
  cfg, rows = rows_of('heavy', 'four')
  monkeypatch.setattr('lorax_train.train.rows.summary', lambda _: '')
  # 500 steps of 32 rows, a quarter of them of each source.
  lines = banner_lines(cfg, rows)['sources'].splitlines()
  n_left = 100 - 10  # a tenth at most is held out
  for line in lines:
    assert '25 % ' in line
    assert f'; {n_left} rows an epoch, {4000 / n_left:.2f} epochs' in line


@pytest.mark.parametrize(
  ('kind', 'want'),
  [
    ('rows', '2 x 16 rows of 256 tokens: 8,192 a step, padding included; 500'
     ' steps are 25.16 epochs of 636 rows'),
    ('buckets', '2 x 16 rows of 64, 128 or 256 tokens: at most 8,192 a step,'
     ' padding included; 500 steps are 25.00 epochs of 636 rows'),
  ],
)  # fmt: skip
def test_the_banner_says_how_often_rows_are_seen(kind, want, monkeypatch):
  cfg, rows = rows_of(kind, 'small')
  monkeypatch.setattr('lorax_train.train.rows.summary', lambda _: '')
  assert banner_lines(cfg, rows)['batch'] == want
