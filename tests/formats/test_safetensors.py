"""Reading tensors by range, and refusing what is not a sound file.

Reference: the safetensors library's own reading (`safetensors.numpy`). What
must be refused, and what of an index, is row F8 and F9 of our fault list.
"""

import json
import os
import pathlib
import struct
import tempfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_train.errors import ModelError
from lorax_train.formats import safetensors as ours

from .refusals import refusal

GRID = np.arange(24).reshape(2, 3, 4)
TENSORS = {
  'f64': GRID / 7,
  'f32': (GRID / 7).astype(np.float32),
  'f16': (GRID / 7).astype(np.float16),
  'bf16': (GRID / 7).astype(ml_dtypes.bfloat16),
  'i64': GRID - 12,
  'i32': (GRID * 10**8 - 10**9).astype(np.int32),
  'i16': (GRID * 1000).astype(np.int16),
  'i8': (GRID - 12).astype(np.int8),
  'u8': GRID.astype(np.uint8),
  'bool': GRID % 3 == 0,
  'scalar': np.array(2.5, np.float32),
  'no rows': np.zeros((0, 3, 4), np.float32),
  'no columns': np.zeros((2, 0, 4), np.int64),
}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  path = tmp_path_factory.mktemp('good') / 'x.safetensors'
  safetensors.numpy.save_file(TENSORS, path, metadata={'format': 'pt'})
  return path


def assert_same(got, want):
  assert got.dtype == want.dtype
  assert got.shape == want.shape
  # Bytes, so that NaN equals NaN.
  assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize('name', TENSORS)
def test_whole_tensors_equal_the_librarys(name, good):
  want = safetensors.numpy.load_file(good)[name]
  refs = ours.open_file(good)
  assert refs.keys() == TENSORS.keys()
  ref = refs[name]
  assert (ref.name, ref.file, ref.nbytes) == (name, good, want.nbytes)
  assert_same(ref.read(), want)


@pytest.mark.parametrize('index', [
  np.s_[:, :, :],
  np.s_[1:2, :, :],
  np.s_[:, 1:3, :],
  np.s_[0:1, 2:3, 3:4],
  np.s_[:, 0:2, 1:4],
  np.s_[1:1, :, :],
])  # fmt: skip
@pytest.mark.parametrize('name', ['f32', 'bf16', 'i64', 'u8', 'no rows'])
def test_parts_equal_slices_of_the_librarys(name, index, good):
  want = safetensors.numpy.load_file(good)[name][index]
  assert_same(ours.open_file(good)[name].read(index), want)


def test_what_is_read_is_ones_own(good):
  ref = ours.open_file(good)['f32']
  ref.read()[:] = 0
  assert_same(ref.read(), TENSORS['f32'])


# Sizes around those of a tile, which is 128 x 512.
@pytest.mark.parametrize('shape', [
  (1, 1), (1, 700), (700, 1), (128, 512), (129, 511), (127, 513), (300, 1100)
])  # fmt: skip
@pytest.mark.parametrize(('stored', 'wanted'), [
  ('f4', 'f4'), ('f4', 'bf16'), ('f2', 'f4'), ('f8', 'f4'), ('f8', 'f8'),
  ('bf16', 'bf16'), ('bf16', 'f4'), ('bf16', 'f2'),
])  # fmt: skip
def test_parts_read_into_an_array_equal_slices_turned_and_cast(
  shape, stored, wanted, tmp_path
):
  bf16 = {'bf16': ml_dtypes.bfloat16}
  stored, wanted = (np.dtype(bf16.get(d, d)) for d in (stored, wanted))
  x = np.random.default_rng(0).standard_normal(shape).astype(stored)
  safetensors.numpy.save_file({'x': x}, tmp_path / 'x')
  ref = ours.open_file(tmp_path / 'x')['x']
  rows, columns = (slice(n // 3, n) for n in shape)
  for index in (
    (slice(0, shape[0]), slice(0, shape[1])),
    (rows, slice(0, shape[1])),
    (slice(0, shape[0]), columns),
    (rows, columns),
  ):
    want = x[index].astype(wanted)
    plain = np.empty(want.shape, wanted)
    turned = np.empty(want.shape[::-1], wanted)
    ref.read_into([(index, plain), (index, turned.T)])
    assert_same(plain, want)
    assert_same(turned, want.T)


@pytest.mark.parametrize('name', ['f32', 'bf16', 'scalar', 'no rows'])
def test_any_number_of_axes_is_read_into_an_array(name, good):
  ref = ours.open_file(good)[name]
  want = TENSORS[name]
  out = np.ones(want.shape, want.dtype)
  ref.read_into([(tuple(slice(0, n) for n in want.shape), out)])
  assert_same(out, want)


@pytest.mark.parametrize('shape', [(2, 3, 3), (2, 4, 3), (1,)])
def test_an_array_of_another_shape_is_not_filled_in_part(shape, good):
  ref = ours.open_file(good)['f32']
  with pytest.raises(AssertionError):
    ref.read_into([(np.s_[:, :, 0:4], np.empty(shape, np.float32))])


def test_data_need_not_be_aligned(tmp_path):
  # Compact headers of other writers put the data on any byte.
  path = tmp_path / 'odd.safetensors'
  entry = {'dtype': 'F32', 'shape': [6], 'data_offsets': [0, 24]}
  header = json.dumps({'w': entry}).encode()
  header += b' ' * (1 - len(header) % 2)
  assert len(header) % 2
  x = np.arange(6, dtype=np.float32)
  path.write_bytes(struct.pack('<Q', len(header)) + header + x.tobytes())
  ref = ours.open_file(path)['w']
  assert_same(ref.read([slice(2, 5)]), x[2:5])
  out = np.empty(3, np.float32)
  ref.read_into([([slice(2, 5)], out)])
  assert_same(out, x[2:5])


def entry(begin=0, end=16, shape=(4,), dtype='F32'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


def crafted(header, data=16, length=None):
  """A file of that header (JSON or bytes) and as many bytes of data."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  length = len(header) if length is None else length
  return struct.pack('<Q', length) + header + bytes(range(data))


GOOD = crafted({'w': entry()})
TWO = {'v': entry(0, 8, (2,)), 'w': entry(8, 16, (2,))}

# Bytes of the file -> what the message says of it.
DAMAGED = {
  'empty file': (b'', '0 bytes on disk'),
  'shorter than a length': (GOOD[:7], '7 bytes on disk'),
  'a length and nothing': (GOOD[:8], '8 bytes on disk'),
  'header past the end': (crafted({'w': entry()}, length=5000), 'damaged'),
  'header of 2^62 bytes': (crafted({'w': entry()}, length=2**62), 'damaged'),
  'header of 2^64 - 1 bytes': (crafted({}, length=2**64 - 1), 'damaged'),
  'header shorter than it is': (crafted({'w': entry()}, length=20), 'damaged'),
  'header of 0 bytes': (crafted(b''), 'damaged'),
  'header not JSON': (crafted(b'{"w": oops}'), 'damaged'),
  'header a list': (crafted([entry()]), 'damaged'),
  'header deeply nested': (crafted(b'[' * 100_000), 'damaged'),
  'header not UTF-8': (crafted(b'{"\xff\xfe": 1}'), 'damaged'),
  'two tensors overlap': (
    crafted({'v': entry(0, 12, (3,)), 'w': entry(8, 16, (2,))}),
    'damaged',
  ),
  'a tensor twice over the same bytes': (
    crafted({'v': entry(), 'w': entry()}),
    'damaged',
  ),
  'a hole between tensors': (
    crafted({**TWO, 'w': entry(12, 20, (2,))}, 20),
    'damaged',
  ),
  'a hole at the start': (crafted({'w': entry(4, 20)}, 20), 'damaged'),
  'junk after the data': (GOOD + b'junk', 'damaged'),
  'cut by one byte': (GOOD[:-1], f'{len(GOOD) - 1} bytes on disk'),
  'cut to half': (GOOD[: len(GOOD) // 2], 'damaged'),
  'cut before the data': (GOOD[:-16], 'damaged'),
  'negative dimension': (crafted({'w': entry(shape=(-4,))}), 'damaged'),
  'dimension of a half': (crafted({'w': entry(shape=(3.5,))}), 'damaged'),
  'dimension past 64 bits': (crafted({'w': entry(shape=(2**64,))}), 'damaged'),
  'product past 64 bits': (
    crafted({'w': entry(shape=(2**33, 2**33))}),
    'damaged',
  ),
  'product that wraps to 4': (
    crafted({'w': entry(shape=(2**62 + 1, 4))}),
    'damaged',
  ),
  'shape larger than the bytes': (crafted({'w': entry(shape=(5,))}), 'damaged'),
  'shape smaller than the bytes': (crafted({'w': entry(shape=(3,))}), 'damaged'),
  'offsets backwards': (crafted({'w': entry(16, 0)}), 'damaged'),
  'offsets past the end': (crafted({'w': entry(0, 1600, (400,))}), 'damaged'),
  'negative offset': (crafted({'w': entry(-16, 0)}), 'damaged'),
  'no offsets': (crafted({'w': {'dtype': 'F32', 'shape': [4]}}), 'damaged'),
  'unknown dtype': (crafted({'w': entry(dtype='F33')}), 'damaged'),
  'dtype that numpy has not': (
    crafted({'w': entry(shape=(16,), dtype='F8_E4M3')}),
    'w (F8_E4M3); supported: F64, F32',
  ),
  'no elements, but a dimension past any array': (
    crafted({'w': entry(0, 0, (0, 2**63))}, 0),
    'w has shape (0, 9223372036854775808)',
  ),
  'Git LFS pointer': (
    b'version https://git-lfs.github.com/spec/v1\n'
    b'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e23'
    b'93\nsize 12345\n',
    'Git LFS pointer',
  ),
  'a web page': (b'<!doctype html><html>' * 9, 'damaged'),
  'a zip, as torch.save writes': (b'PK\x03\x04' + bytes(60), 'damaged'),
}  # fmt: skip


def test_the_file_that_is_damaged_below_is_good(tmp_path):
  path = tmp_path / 'good.safetensors'
  path.write_bytes(GOOD)
  assert_same(
    ours.open_file(path)['w'].read(), np.frombuffer(GOOD[-16:], np.float32)
  )


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_refused_by_name(case, tmp_path):
  content, words = DAMAGED[case]
  path = tmp_path / 'bad.safetensors'
  path.write_bytes(content)
  message = refusal(ours.open_file, path)
  assert message.startswith(f'{path}: ')
  assert words in message


def test_exit_code_and_absent_files(tmp_path):
  assert ModelError.exit_code == 4
  path = tmp_path / 'absent.safetensors'
  assert refusal(ours.open_file, path) == f'{path}: no such file'


def test_a_directory_is_no_file(tmp_path):
  assert refusal(ours.open_file, tmp_path).startswith(f'{tmp_path}: ')


def test_of_two_entries_of_a_name_both_readers_take_the_same(tmp_path):
  path = tmp_path / 'twice.safetensors'
  v, w = (json.dumps(e) for e in (entry(0, 8, (2,)), entry(8, 16, (2,))))
  header = f'{{"x": {v}, "x": {w}}}'.encode()
  path.write_bytes(crafted(header))
  try:
    want = safetensors.numpy.load_file(path)['x']
  except safetensors.SafetensorError:
    refusal(ours.open_file, path)
  else:
    assert_same(ours.open_file(path)['x'].read(), want)


SEED = safetensors.numpy.save(
  {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'bb': np.arange(4, dtype=np.int32),
    'c': np.zeros((0, 5), np.float16),
  },
  metadata={'k': 'v'},
)
HEADER_END = 8 + struct.unpack('<Q', SEED[:8])[0]
EDITS = st.lists(
  st.tuples(
    st.sampled_from(['flip', 'insert', 'delete']),
    st.integers(0, HEADER_END + 4),
    st.integers(0, 255) | st.sampled_from(list(b'0123456789,[]{}":-eE. ')),
  ),
  min_size=1,
  max_size=4,
)


def mutated(edits):
  content = bytearray(SEED)
  for kind, at, byte in edits:
    if kind == 'flip':
      content[at] = byte
    elif kind == 'insert':
      content.insert(at, byte)
    else:
      del content[at]
  return bytes(content)


@settings(max_examples=300, deadline=None)
@given(edits=EDITS)
# Edits that leave a sound file: another name, other metadata, fewer spaces.
@example([('flip', SEED.index(b'"a"') + 1, ord('z'))])
@example([('flip', SEED.index(b'"k"') + 1, ord('j'))])
@example([('flip', SEED.index(b'[2,3]') + 1, ord('3')),
          ('flip', SEED.index(b'[2,3]') + 3, ord('2'))])  # fmt: skip
@example([('flip', SEED.index(b'F32') + 0, ord('I'))])
# One that makes a valid file of a dtype that we don't read.
@example([('flip', SEED.index(b'I32'), ord('U'))])
def test_mutated_headers_are_refused_or_read_as_the_library_does(edits):
  content = mutated(edits)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'mutated.safetensors'
    path.write_bytes(content)
    try:
      refs = ours.open_file(path)
    except ModelError:
      return
    got = {name: ref.read() for name, ref in refs.items()}
  want = safetensors.numpy.load(content)
  assert got.keys() == want.keys()
  for name, array in got.items():
    assert_same(array, want[name])


def test_the_examples_above_do_reach_the_comparison(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(mutated([('flip', SEED.index(b'"a"') + 1, ord('z'))]))
  assert ours.open_file(path).keys() == {'z', 'bb', 'c'}


# Directories of shards.

SHARDS = {
  'model-00001-of-00002.safetensors': {'a': TENSORS['f32'], 'b': TENSORS['i8']},
  'model-00002-of-00002.safetensors': {'c': TENSORS['bf16']},
}
WEIGHT_MAP = {name: file for file, of in SHARDS.items() for name in of}


def write_shards(directory, index=None):
  for file, tensors in SHARDS.items():
    safetensors.numpy.save_file(tensors, directory / file)
  index = {'metadata': {}, 'weight_map': WEIGHT_MAP} if index is None else index
  text = index if isinstance(index, bytes) else json.dumps(index).encode()
  (directory / 'model.safetensors.index.json').write_bytes(text)
  return directory


def test_an_index_brings_all_its_shards(tmp_path):
  refs = ours.open_dir(write_shards(tmp_path))
  assert {n: r.file.name for n, r in refs.items()} == WEIGHT_MAP
  for tensors in SHARDS.values():
    for name, want in tensors.items():
      assert_same(refs[name].read(), want)


def test_files_that_the_index_does_not_list_are_not_looked_at(tmp_path):
  directory = write_shards(tmp_path)
  # What Mistral's repositories ship beside the shards, and an odd stray one.
  safetensors.numpy.save_file(
    {'a': TENSORS['u8']}, directory / 'consolidated.safetensors'
  )
  (directory / 'model-00003-of-00002.safetensors').write_bytes(b'junk')
  (directory / 'pytorch_model.bin').write_bytes(b'junk')
  assert_same(ours.open_dir(directory)['a'].read(), TENSORS['f32'])


def test_one_file_without_an_index(tmp_path):
  safetensors.numpy.save_file(
    {'a': TENSORS['f32']}, tmp_path / 'model.safetensors'
  )
  (tmp_path / 'consolidated.safetensors').write_bytes(b'junk')
  assert ours.open_dir(tmp_path).keys() == {'a'}


def test_all_missing_shards_are_named_at_once(tmp_path):
  directory = write_shards(tmp_path)
  for file in SHARDS:
    (directory / file).unlink()
  message = refusal(ours.open_dir, directory)
  assert all(file in message for file in SHARDS)
  assert '2 of 2 shards missing' in message


def test_a_shard_cut_short_is_named(tmp_path):
  file = write_shards(tmp_path) / 'model-00002-of-00002.safetensors'
  os.truncate(file, file.stat().st_size - 1)
  assert str(file) in refusal(ours.open_dir, tmp_path)


def test_a_shard_may_be_a_link_as_in_the_hubs_cache(tmp_path):
  directory = write_shards(tmp_path)
  file = directory / 'model-00002-of-00002.safetensors'
  blob = tmp_path / 'blob'
  file.rename(blob)
  file.symlink_to(blob)
  assert_same(ours.open_dir(directory)['c'].read(), TENSORS['bf16'])


def with_file(file):
  return {'weight_map': {**WEIGHT_MAP, 'c': file}}


# Index -> words of the message.
BAD_INDEX = {
  'parent': (with_file('../model.safetensors'), '../model.safetensors'),
  'absolute': (with_file('/etc/passwd'), '/etc/passwd'),
  'below': (with_file('sub/x.safetensors'), 'sub/x.safetensors'),
  'dot dot': (with_file('..'), '..'),
  'dot': (with_file('.'), '.'),
  'empty name': (with_file(''), "''"),
  'a number': (with_file(5), '5'),
  'a list': (with_file(['a.safetensors']), "['a.safetensors']"),
  'null': (with_file(None), 'None'),
  'a null byte': (with_file('a\0b.safetensors'), '1 of 2 shards missing'),
  'a tensor that its shard has not': (
    {'weight_map': {**WEIGHT_MAP, 'd': WEIGHT_MAP['a'], 'e': WEIGHT_MAP['c']}},
    'does not hold: d, e',
  ),
  'a tensor in the other shard': (
    {'weight_map': {**WEIGHT_MAP, 'a': WEIGHT_MAP['c']}},
    'does not hold: a',
  ),
  'not JSON': (b'{"weight_map": ', 'not JSON'),
  'not UTF-8': (b'{"weight_map": {"\xff": "a"}}', 'not JSON'),
  'deeply nested': (b'[' * 100_000, 'not JSON'),
  'a list in its place': ([], 'not a JSON object'),
  'weight_map missing': ({'metadata': {}}, 'weight_map'),
  'weight_map empty': ({'weight_map': {}}, 'weight_map'),
  'weight_map a list': ({'weight_map': [1]}, 'weight_map'),
  'weight_map null': ({'weight_map': None}, 'weight_map'),
  'empty file': (b'', 'not JSON'),
}


@pytest.mark.parametrize('case', BAD_INDEX)
def test_indexes_that_are_refused(case, tmp_path):
  index, words = BAD_INDEX[case]
  message = refusal(ours.open_dir, write_shards(tmp_path, index))
  assert message.startswith(str(tmp_path))
  assert words in message


def test_a_fingerprint_is_of_the_tensors_and_not_of_the_files(tmp_path):
  tensors = {n: t for of in SHARDS.values() for n, t in of.items()}

  def of(**changes):
    path = tmp_path / 'x.safetensors'
    safetensors.numpy.save_file({**tensors, **changes}, path)
    return ours.fingerprint(ours.open_file(path))

  want = ours.fingerprint(ours.open_dir(write_shards(tmp_path)))
  a = tensors['a']
  assert of() == want
  assert of(a=np.where(a == a.max(), 0, a).astype(a.dtype)) != want
  assert of(a=a.reshape(3, 2, 4)) != want
  assert of(a=a.view(np.int32)) != want
  assert of(d=a) != want
  # Of a large one the first 64 KiB count.
  large = np.zeros(2**15, np.float32)
  first, last = large.copy(), large.copy()
  first[2**14 - 1] = last[2**14] = 1
  assert of(a=first) != of(a=large) == of(a=last)


# Names of files -> words of the message.
@pytest.mark.parametrize(('files', 'words'), [
  ([], 'no model.safetensors'),
  (['config.json', 'consolidated.safetensors'], 'no model.safetensors'),
  (['pytorch_model.bin'], 'pytorch_model.bin but no safetensors; pickles'),
  (['pytorch_model-00001-of-00002.bin', 'pytorch_model-00002-of-00002.bin'],
   'pytorch_model-00002-of-00002.bin but no safetensors; pickles'),
  (['model.pt'], 'pickles can run code and are never read'),
  (['consolidated.00.pth'], 'pickles can run code and are never read'),
])  # fmt: skip
def test_directories_without_safetensors(files, words, tmp_path):
  for file in files:
    (tmp_path / file).write_bytes(b'\x80\x04N.')
  message = refusal(ours.open_dir, tmp_path)
  assert message.startswith(str(tmp_path))
  assert words in message


@pytest.mark.parametrize(('names', 'want'), [
  ([], ''),
  (['a', 'b'], 'a, b'),
  (list('abcdefgh'), 'a, b, c, d, e, f, g, h'),
  (list('abcdefghij'), 'a, b, c, d, e, f, g, h and 2 more'),
])  # fmt: skip
def test_messages_name_the_first_of_many(names, want):
  assert ours.few(names) == want
