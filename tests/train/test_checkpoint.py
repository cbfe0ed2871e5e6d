"""Checkpoints: whole or absent, on damaged disks and on full ones.

Reference: the state that was saved, bit for bit. Faults are made by hand:
flipped bits, cut, deleted and added files, a limit on the size of files.
Orbax alone would restore most of them without a word.
"""

import json
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train import parallel, together
from lorax_train.errors import ResumeError
from lorax_train.lora import Adapter
from lorax_train.train import checkpoint
from lorax_train.train.step import TrainState
from tests.toys import full_disk

DATA = 'state/d'


class Moments(NamedTuple):
  count: Any
  mu: Any
  nu: Any


def make_state(step, seed=None):
  """A state with all that ours have: pairs, None, counts, small floats."""
  rng = np.random.default_rng(step if seed is None else seed)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  factors = {
    'q_proj': Adapter(normal(3, 4, 16), normal(3, 4, 8)),
    'norm': None,
    'nested': {'v_proj': Adapter(normal(4, 16), normal(4, 8)), 'empty': None},
  }
  moments = Moments(
    jnp.asarray(step, jnp.int32),
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors),
    jax.tree.map(lambda x: x * 1e-30, factors),
  )
  return TrainState(jnp.asarray(step, jnp.int32), factors, (moments, (), None))


def like(state, shard=None):
  """The state as shapes, lying as it does, or as `shard` says."""

  def of(x):
    where = x.sharding if shard is None else shard(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(of, state)


def assert_same(got, want):
  """The same tree of the same types and dtypes, bit for bit."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def nothing_to_note(text):
  raise AssertionError(f'there was nothing to note: {text}')


def names(root):
  return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture
def two_steps(root):
  for step in (5, 10):
    checkpoint.save(root, step, make_state(step), keep=3)
  return root


def test_what_is_saved_comes_back(root):
  state = make_state(7)
  checkpoint.save(root, 7, state, keep=2)
  assert checkpoint.latest_step(root) == 7
  got = checkpoint.restore_latest(root, like(state), nothing_to_note)
  assert_same(got, state)


def test_special_numbers_come_back(root):
  odd = np.array(
    [np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max], np.float32
  )
  state = TrainState(
    jnp.asarray(2**31 - 1, jnp.int32),
    {'odd': jnp.asarray(odd), 'flags': jnp.array([True, False])},
    {'ids': jnp.arange(5, dtype=jnp.uint8)},
  )
  checkpoint.save(root, 1, state, keep=1)
  got = checkpoint.restore_latest(root, like(state), nothing_to_note)
  assert_same(got, state)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_a_state_comes_back_onto_another_mesh(root, sizes):
  state = make_state(3)
  checkpoint.save(root, 3, state, keep=1)
  mesh = parallel.make_mesh(*sizes)

  def shard(x):
    parts = [None] * x.ndim
    if parts and x.shape[-1] % 8 == 0:
      parts[-1] = ('fsdp', 'tensor')
    return NamedSharding(mesh, P(*parts))

  got = checkpoint.restore_latest(root, like(state, shard), nothing_to_note)
  assert_same(got, state)
  for x in jax.tree.leaves(got):
    assert x.sharding == shard(x)
  # and back again, from many devices onto one
  checkpoint.save(root, 4, got, keep=1)
  again = checkpoint.restore_latest(root, like(state), nothing_to_note)
  assert_same(again, state)
  assert len(jax.tree.leaves(again)[1].devices()) == 1


def test_without_a_checkpoint_there_is_nothing_to_restore(root):
  state = make_state(0)
  assert checkpoint.latest_step(root) is None
  assert checkpoint.restore_latest(root, like(state), nothing_to_note) is None
  root.mkdir()
  assert checkpoint.restore_latest(root, like(state), nothing_to_note) is None


@pytest.mark.parametrize(
  ('keep', 'left'), [(1, ['16']), (2, ['16', '8']), (9, ['16', '4', '8'])]
)
def test_the_oldest_steps_go(root, keep, left):
  # 16 after 8: by number, not by name.
  for step in (4, 8, 16):
    checkpoint.save(root, step, make_state(step), keep)
  assert names(root) == left
  got = checkpoint.restore_latest(root, like(make_state(0)), nothing_to_note)
  assert_same(got, make_state(16))


def test_a_step_saved_twice_is_the_second_one(root):
  checkpoint.save(root, 4, make_state(4, seed=1), keep=2)
  checkpoint.save(root, 4, make_state(4, seed=2), keep=2)
  got = checkpoint.restore_latest(root, like(make_state(4)), nothing_to_note)
  assert_same(got, make_state(4, seed=2))


def test_every_file_stands_in_the_manifest(two_steps):
  step = two_steps / '10'
  manifest = json.loads((step / checkpoint.MANIFEST).read_text())
  on_disk = {
    path.relative_to(step).as_posix()
    for path in step.rglob('*')
    if path.is_file()
  }
  assert manifest['step'] == 10
  assert set(manifest['files']) == on_disk - {checkpoint.MANIFEST}
  for name, entry in manifest['files'].items():
    assert entry['size'] == (step / name).stat().st_size


# --- damage: the step is set aside, the one before it is taken


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


def cut(path):
  path.write_bytes(path.read_bytes()[:-1])


def grow(path):
  path.write_bytes(path.read_bytes() + b'\0')


def files_of(step):
  return sorted(p for p in step.rglob('*') if p.is_file())


def check_fallback(root, name):
  """Step 10 is damaged: 5 comes back, and 10 is kept for a look at it."""
  notes = []
  got = checkpoint.restore_latest(root, like(make_state(5)), notes.append)
  assert_same(got, make_state(5))
  assert len(notes) == 1
  assert 'checkpoint 10 is damaged' in notes[0]
  assert '10.corrupt' in notes[0]
  assert name in notes[0]
  assert '\n' not in notes[0]
  assert names(root) == ['10.corrupt', '5']
  assert checkpoint.latest_step(root) == 5
  again = checkpoint.restore_latest(root, like(make_state(5)), nothing_to_note)
  assert_same(again, make_state(5))


@pytest.mark.parametrize('damage', [flip, cut, grow, os.unlink])
def test_damage_to_any_file_is_noticed(two_steps, tmp_path, damage):
  step = two_steps / '10'
  pristine = tmp_path / 'pristine'
  shutil.copytree(two_steps, pristine)
  targets = [
    path.relative_to(step) for path in files_of(step) if path.stat().st_size
  ]
  assert len(targets) >= 5
  assert any(
    t.as_posix().startswith('state/ocdbt.process_0/d') for t in targets
  )
  for target in targets:
    if target.name == checkpoint.MANIFEST and damage is not flip:
      continue  # cut and deleted manifests have tests of their own
    shutil.rmtree(two_steps)
    shutil.copytree(pristine, two_steps)
    damage(step / target)
    check_fallback(two_steps, '')


def test_an_extra_file_is_noticed(two_steps):
  (two_steps / '10' / 'state' / 'extra').write_text('x')
  check_fallback(two_steps, 'state/extra')


@pytest.mark.parametrize(
  'text',
  [
    '',
    '{',
    '[]',
    '{"step": 10}',
    '{"step": 10, "files": 3}',
    '{"step": 10, "files": {}}',
    '\0' * 100,
  ],
)
def test_a_damaged_manifest_is_a_damaged_step(two_steps, text):
  (two_steps / '10' / checkpoint.MANIFEST).write_text(text)
  check_fallback(two_steps, '')


def test_a_manifest_that_is_not_utf8_is_a_damaged_step(two_steps):
  (two_steps / '10' / checkpoint.MANIFEST).write_bytes(b'\xff\xfe{}')
  check_fallback(two_steps, checkpoint.MANIFEST)


def test_a_manifest_of_another_step_is_a_damaged_step(two_steps):
  # A copied directory would otherwise restore another step under this name.
  shutil.rmtree(two_steps / '10')
  shutil.copytree(two_steps / '5', two_steps / '10')
  check_fallback(two_steps, 'step')


def test_two_damaged_steps_fall_back_to_the_third(root):
  for step in (5, 10, 15):
    checkpoint.save(root, step, make_state(step), keep=3)
  for step in (10, 15):
    flip(root / str(step) / checkpoint.LEAVES)
  notes = []
  got = checkpoint.restore_latest(root, like(make_state(0)), notes.append)
  assert_same(got, make_state(5))
  assert [n.split(' is ')[0] for n in notes] == [
    'checkpoint 15',
    'checkpoint 10',
  ]
  # A step that is written again does not disturb the one set aside.
  checkpoint.save(root, 10, make_state(10), keep=3)
  assert names(root) == ['10', '10.corrupt', '15.corrupt', '5']


def test_no_good_step_left_never_means_from_scratch(two_steps):
  for step in (5, 10):
    flip(two_steps / str(step) / checkpoint.LEAVES)
  for _ in range(2):  # the second time only what was set aside is left
    with pytest.raises(ResumeError) as error:
      checkpoint.restore_latest(two_steps, like(make_state(0)), lambda _: None)
    assert error.value.exit_code == 5
    assert 'no valid checkpoint left' in str(error.value)
    assert '\n' not in str(error.value)
    assert names(two_steps) == ['10.corrupt', '5.corrupt']


def test_a_step_without_manifest_is_removed_and_does_not_count(two_steps):
  (two_steps / '10' / checkpoint.MANIFEST).unlink()
  (two_steps / '12' / 'state.orbax-checkpoint-tmp').mkdir(parents=True)
  assert checkpoint.latest_step(two_steps) == 5
  notes = []
  got = checkpoint.restore_latest(two_steps, like(make_state(5)), notes.append)
  assert_same(got, make_state(5))
  assert sorted(notes) == [
    'checkpoint 10 was not finished; removed',
    'checkpoint 12 was not finished; removed',
  ]
  assert names(two_steps) == ['5']


def test_an_unfinished_first_step_means_from_scratch(root):
  (root / '4' / 'state').mkdir(parents=True)
  notes = []
  like_state = like(make_state(4))
  assert checkpoint.restore_latest(root, like_state, notes.append) is None
  assert len(notes) == 1


def test_what_is_no_step_is_left_alone(two_steps):
  (two_steps / 'notes.txt').write_text('mine')
  (two_steps / 'best').mkdir()
  checkpoint.save(two_steps, 15, make_state(15), keep=1)
  got = checkpoint.restore_latest(
    two_steps, like(make_state(0)), nothing_to_note
  )
  assert_same(got, make_state(15))
  assert names(two_steps) == ['15', 'best', 'notes.txt']


# --- another state than the one that is asked for


def with_q(state, change):
  factors = dict(state.trainable)
  factors['q_proj'] = change(factors['q_proj'])
  return state._replace(trainable=factors)


def reshaped(x, shape=None, dtype=None):
  return jax.ShapeDtypeStruct(
    shape or x.shape, dtype or x.dtype, sharding=x.sharding
  )


OTHERS = {
  'another rank': (
    lambda q: Adapter(reshaped(q.a, (3, 2, 16)), reshaped(q.b, (3, 2, 8))),
    ["q_proj'].a is float32[3, 4, 16], not float32[3, 2, 16]", "q_proj'].b"],
  ),
  'more layers': (
    lambda q: Adapter(reshaped(q.a, (4, 4, 16)), reshaped(q.b, (4, 4, 8))),
    ['float32[4, 4, 16]'],
  ),
  # Orbax would cast, pad or leave out without a word (faults.md M7).
  'another dtype': (
    lambda q: Adapter(reshaped(q.a, dtype=jnp.bfloat16), q.b),
    ['is float32[3, 4, 16], not bfloat16[3, 4, 16]'],
  ),
  'an integer for a float': (
    lambda q: Adapter(reshaped(q.a, dtype=jnp.int32), q.b),
    ['not int32[3, 4, 16]'],
  ),
  'a part left out': (lambda q: Adapter(q.a, None), ["q_proj'].b", 'absent']),
  'all of it left out': (lambda q: None, ["q_proj'].a", 'not absent']),
  'another container': (
    lambda q: {'a': q.a, 'b': q.b},
    ["q_proj']['a'] is absent"],
  ),
}


@pytest.mark.parametrize('case', OTHERS)
def test_another_state_is_refused_not_bent(root, case):
  change, words = OTHERS[case]
  state = make_state(5)
  checkpoint.save(root, 5, state, keep=1)
  with pytest.raises(ResumeError) as error:
    checkpoint.restore_latest(
      root, with_q(like(state), change), nothing_to_note
    )
  text = str(error.value)
  for word in [str(root / '5'), 'give another run_dir', *words]:
    assert word in text
  assert '\n' not in text
  assert len(text) < 600
  # It is the configuration that is wrong: the checkpoint stays as it was.
  assert names(root) == ['5']
  assert_same(
    checkpoint.restore_latest(root, like(state), nothing_to_note), state
  )


def test_a_part_more_than_was_saved_is_refused(root):
  state = make_state(5)
  checkpoint.save(root, 5, state, keep=1)
  asked = like(state)
  factors = {**asked.trainable, 'norm': reshaped(asked.step, (8,), jnp.float32)}
  with pytest.raises(ResumeError, match=r"norm'\] is absent, not float32\[8\]"):
    checkpoint.restore_latest(
      root, asked._replace(trainable=factors), nothing_to_note
    )


# --- writing fails


def check_step_5_is_intact(root):
  assert names(root) == ['5']
  got = checkpoint.restore_latest(root, like(make_state(5)), nothing_to_note)
  assert_same(got, make_state(5))


def test_a_full_disk_leaves_the_earlier_step(root, capfd):
  checkpoint.save(root, 5, make_state(5), keep=1)
  rng = np.random.default_rng(0)  # random: it must not compress
  big = {'w': jnp.asarray(rng.standard_normal(2**17), jnp.float32)}
  with (
    full_disk(2**16),
    pytest.raises(OSError, match='checkpoint not written') as error,
  ):
    checkpoint.save(root, 10, TrainState(jnp.int32(10), big, ()), keep=1)
  assert str(root / '10') in str(error.value)
  assert 'File too large' in str(error.value)
  assert '\n' not in str(error.value)
  check_step_5_is_intact(root)
  # Our one line is all there is to say; orbax's tracebacks are kept back.
  assert capfd.readouterr().err == ''


@pytest.mark.parametrize('call', ['replace', 'fsync'])
def test_a_manifest_that_cannot_be_written_leaves_the_earlier_step(
  root, monkeypatch, call
):
  checkpoint.save(root, 5, make_state(5), keep=1)
  real = getattr(os, call)

  def fail(*args, **kwargs):
    if call == 'fsync' or checkpoint.MANIFEST in str(args[0]):
      raise OSError(28, 'No space left on device')
    return real(*args, **kwargs)

  monkeypatch.setattr(checkpoint.os, call, fail)
  with pytest.raises(OSError, match=r'not written.*No space left') as error:
    checkpoint.save(root, 10, make_state(10), keep=1)
  assert str(root / '10') in str(error.value)
  monkeypatch.undo()
  check_step_5_is_intact(root)


def test_an_interrupt_while_writing_leaves_the_earlier_step(root, monkeypatch):
  checkpoint.save(root, 5, make_state(5), keep=1)

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint, '_digests', interrupt)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.save(root, 10, make_state(10), keep=1)
  monkeypatch.undo()
  check_step_5_is_intact(root)


# --- one of several processes; runs of real ones are in test_hosts


@pytest.fixture
def others(two_steps, monkeypatch):
  """This is process 0 of two; the other has nothing to tell."""
  monkeypatch.setattr(together, 'several', lambda: True)
  monkeypatch.setattr(together, 'gather', lambda own: [own, None])


def failing(error):
  def fail(*_):
    raise error

  return fail


LOST = jax.errors.JaxRuntimeError('UNAVAILABLE: heartbeat')
OF_ORBAX = TimeoutError('waiting for async_write_complete barrier')
OF_ORBAX.__cause__ = LOST


@pytest.mark.parametrize('error', [LOST, OF_ORBAX])
def test_a_process_that_is_gone_is_no_full_disk(
  error, root, others, monkeypatch
):
  monkeypatch.setattr(checkpoint, '_save_state', failing(error))
  with pytest.raises(type(error)) as caught:
    checkpoint.save(root, 15, make_state(15), keep=3)
  assert caught.value is error
  assert names(root) == ['10', '5']


def test_what_fails_while_all_restore_is_not_put_to_the_vote(
  root, others, monkeypatch
):
  """The others would take the vote for their next message of the state."""
  error = OSError('cannot be read')
  monkeypatch.setattr(
    checkpoint.ocp.StandardCheckpointer, 'restore', failing(error)
  )
  with pytest.raises(OSError, match='cannot be read') as caught:
    checkpoint.restore_latest(root, like(make_state(10)), nothing_to_note)
  assert caught.value is error


def test_another_state_is_refused_by_all(root, others):
  with pytest.raises(together.FailedError, match='another state') as caught:
    checkpoint.restore_latest(root, like({'w': jnp.ones(3)}), nothing_to_note)
  assert caught.value.code == ResumeError.exit_code


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  checkpoint.write_atomically(path, 'old')

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint.os, 'fsync', fail)
  with pytest.raises(OSError, match='No space left'):
    checkpoint.write_atomically(path, 'new' * 1000)
  monkeypatch.undo()
  assert path.read_text() == 'old'
  checkpoint.write_atomically(path, 'new')
  assert path.read_text() == 'new'
  assert names(tmp_path) == ['config.json']
