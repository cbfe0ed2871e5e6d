"""GGUF files turned into model directories, and what is refused of them.

Reference: the tensors and ids that the test itself wrote, with llama.cpp's
permutation spelled out here; for unpacking, the `gguf` package; for
sentencepiece, the library. For the real SmolLM2, llama.cpp's own token ids
(tests/golden/gguf, from scripts/golden/gguf_ids.py).
"""

import json
import struct
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from lorax_train.data.tokenize import load_tokenizer
from lorax_train.formats import gguf as ours
from lorax_train.formats import gguf_header, gguf_tokenizer, hf_config
from lorax_train.infer.load import load, load_params
from tests.toys import random_ids, write_model

from . import smollm2
from .refusals import refusal

gguf = pytest.importorskip('gguf')

F32 = gguf.GGMLQuantizationType.F32
# Rows in multiples of 32, so that they can be quantised.
DIMS = {
  'model_type': 'llama',
  'sliding_window': None,
  'hidden_size': 64,
  'intermediate_size': 96,
  'head_dim': 24,
  'vocab_size': 280,
}
HEADS = {'self_attn.q_proj': 4, 'self_attn.k_proj': 2}
NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ['h e', 'l l', 'he ll', 'hell o', 'Ġ t', '3 3', '33 3', 'Ġ 3']
TOKENS = [
  *LETTERS, *(m.replace(' ', '') for m in MERGES), 'zq', '<s>', '</s>', '<unk>',
  '<pad>', '<user>',
]  # fmt: skip
KINDS = {'<s>': 3, '</s>': 3, '<unk>': 3, '<pad>': 3, '<user>': 4}
FIELDS = {
  'llama.block_count': 3,
  'llama.context_length': 512,
  'llama.embedding_length': 64,
  'llama.feed_forward_length': 96,
  'llama.attention.head_count': 4,
  'llama.attention.head_count_kv': 2,
  'llama.attention.key_length': 24,
  'llama.attention.value_length': 24,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'llama.rope.dimension_count': 24,
  'llama.rope.freq_base': 10000.0,
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.token_type': [KINDS.get(t, 1) for t in TOKENS],
  'tokenizer.ggml.merges': MERGES,
  'tokenizer.ggml.bos_token_id': TOKENS.index('<s>'),
  'tokenizer.ggml.eos_token_id': TOKENS.index('</s>'),
  'tokenizer.ggml.unknown_token_id': TOKENS.index('<unk>'),
  'tokenizer.ggml.padding_token_id': TOKENS.index('<pad>'),
  'tokenizer.ggml.add_bos_token': True,
  'tokenizer.chat_template': '{{ messages }}',
}


def their_name(name):
  parts = name.removesuffix('.weight').split('.')
  if 'layers' in parts:
    return f'blk.{parts[2]}.{NAMES[".".join(parts[3:])]}.weight'
  return f'{NAMES[".".join(parts)]}.weight'


def permuted(name, weight):
  """llama.cpp's `permute`, row by row: halves become neighbours."""
  heads = next((n for part, n in HEADS.items() if part in name), None)
  if heads is None:
    return weight
  size = len(weight) // heads
  half = size // 2
  rows = [
    head * size + which * half + i
    for head in range(heads)
    for i in range(half)
    for which in (0, 1)
  ]
  return weight[rows]


def write_gguf(path, tensors, kind=F32, **changes):
  """A file of these tensors and FIELDS; a change to None drops a key."""
  fields = {**FIELDS, **{k: v for k, v in changes.items() if k != 'arch'}}
  writer = gguf.GGUFWriter(path, changes.get('arch', 'llama'))
  adders = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  for key, value in fields.items():
    if value is not None:
      adders[type(value)](key, value)
  for name, weight in tensors.items():
    rows = permuted(name, weight)
    name = their_name(name) if name.startswith(('model.', 'lm_')) else name
    if kind != F32 and weight.ndim == 2:
      writer.add_tensor(name, gguf.quantize(rows, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, rows)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  directory = tmp_path_factory.mktemp('original') / 'model'
  return write_model(directory, tokenizer=False, **DIMS)


@pytest.fixture(scope='module')
def tensors(original):
  return load_file(original / 'model.safetensors')


def logits(directory):
  apply, params = load_params(directory)
  ids = random_ids(1, (2, 16), DIMS['vocab_size'])
  return np.asarray(jax.jit(apply)(params, ids))


def test_float32_comes_back_bit_by_bit(original, tensors, tmp_path):
  made = ours.convert(write_gguf(tmp_path / 'x.gguf', tensors), tmp_path / 'hf')
  assert made == tmp_path / 'hf'
  assert hf_config.read_config(made) == hf_config.read_config(original)
  got = load_file(made / 'model.safetensors')
  assert got.keys() == tensors.keys()
  for name, want in tensors.items():
    assert got[name].dtype == want.dtype
    np.testing.assert_array_equal(got[name], want, name)
  np.testing.assert_array_equal(logits(made), logits(original))


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_1', 'Q4_0', 'BF16', 'F16'])
def test_quantised_ones_equal_the_packages(kind, tensors, tmp_path):
  kind = gguf.GGMLQuantizationType[kind]
  path = write_gguf(tmp_path / 'x.gguf', tensors, kind)
  got = load_file(ours.convert(path, tmp_path / 'hf') / 'model.safetensors')
  for name, weight in tensors.items():
    want = weight
    if weight.ndim == 2:
      # By rows: the permutation is of no matter to them.
      want = gguf.dequantize(gguf.quantize(weight, kind), kind)
    np.testing.assert_array_equal(got[name], want, name)


def test_large_tensors_go_a_few_heads_at_a_time(tensors, tmp_path, monkeypatch):
  monkeypatch.setattr(ours, '_CHUNK_VALUES', 64 * 30)
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  got = load_file(ours.convert(path, tmp_path / 'hf') / 'model.safetensors')
  for name, want in tensors.items():
    np.testing.assert_array_equal(got[name], want, name)


@pytest.mark.parametrize(
  ('dtype', 'numpy'),
  [('float16', np.float16), ('bfloat16', ml_dtypes.bfloat16)],
)
def test_weights_are_stored_as_asked(dtype, numpy, tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  made = ours.convert(path, tmp_path / 'hf', dtype)
  got = load_file(made / 'model.safetensors')
  for name, weight in tensors.items():
    assert got[name].dtype == numpy
    np.testing.assert_array_equal(
      got[name].astype(np.float32), weight.astype(numpy).astype(np.float32)
    )
  assert json.loads((made / 'config.json').read_text())['dtype'] == dtype


def test_without_a_head_the_embeddings_are_tied(tmp_path):
  directory = write_model(
    tmp_path / 'model', tokenizer=False, **DIMS, tie_word_embeddings=True
  )
  tensors = load_file(directory / 'model.safetensors')
  assert 'lm_head.weight' not in tensors
  made = ours.convert(write_gguf(tmp_path / 'x.gguf', tensors), tmp_path / 'hf')
  assert hf_config.read_config(made).tied
  np.testing.assert_array_equal(logits(made), logits(directory))


def test_what_files_may_leave_out(tensors, tmp_path):
  # As llama.cpp has it: theta 10000, as many key heads as heads, and heads
  # that share the hidden size.
  square = {
    n: np.ones((64, 64) if 'attn' in n else w.shape, np.float32)
    for n, w in tensors.items()
  }
  absent = (
    'llama.attention.head_count_kv', 'llama.attention.key_length',
    'llama.attention.value_length', 'llama.rope.dimension_count',
    'llama.rope.freq_base', 'tokenizer.ggml.add_bos_token',
    'tokenizer.chat_template',
  )  # fmt: skip
  path = write_gguf(tmp_path / 'x.gguf', square, **dict.fromkeys(absent))
  made = ours.convert(path, tmp_path / 'hf')
  cfg = hf_config.read_config(made)
  assert (cfg.kv_heads, cfg.head_dim, cfg.rope_theta) == (4, 16, 10000.0)
  assert load_tokenizer(made).bos_id is None
  config = json.loads((made / 'tokenizer_config.json').read_text())
  assert 'chat_template' not in config


# Text -> its pieces under each pre-tokenizer.
PRE = ('smollm', 'gpt-2', 'llama-bpe', 'tekken')
PIECES = [
  ('hello the', ['hello Ġt he'] * 4),
  ('3333', ['3 3 3 3', '33 33', '333 3', '3 3 3 3']),
  (' 3', ['Ġ 3', 'Ġ3', 'Ġ 3', 'Ġ 3']),
  ('½½', ['Â ½ Â ½'] * 4),
  ('zq', ['z q', 'z q', 'zq', 'zq']),
  ('</s>', ['< / s >'] * 4),
  ('a<user>', ['a <user>'] * 4),
]


@pytest.mark.parametrize('pre', PRE)
def test_byte_level_bpe_splits_as_its_name_says(pre, tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors, **{'tokenizer.ggml.pre': pre})
  tokenizer = load_tokenizer(ours.convert(path, tmp_path / 'hf'))
  for text, pieces in PIECES:
    [ids] = tokenizer.encode([text])
    assert ' '.join(map(tokenizer.piece, ids)) == pieces[PRE.index(pre)]
  texts = ['Zürich 2024 🦙\t\n  x', 'hello 33', '']
  assert [tokenizer.decode(i) for i in tokenizer.encode(texts)] == texts
  assert tokenizer.size == len(TOKENS)
  named = ('<s>', '</s>', '<pad>')
  ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
  assert ids == tuple(map(TOKENS.index, named))
  config = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
  assert config['chat_template'] == '{{ messages }}'
  assert (config['unk_token'], config['model_max_length']) == ('<unk>', 512)


def sentencepiece_fields(model):
  """A sentencepiece model as llama.cpp's converter puts it down."""
  ids = range(model.get_piece_size())
  kinds = [(2, model.is_unknown), (3, model.is_control), (5, model.is_unused)]
  kinds += [(6, model.is_byte)]
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.tokens': [model.id_to_piece(i) for i in ids],
    'tokenizer.ggml.scores': [model.get_score(i) for i in ids],
    'tokenizer.ggml.token_type': [
      next((kind for kind, has in kinds if has(i)), 1) for i in ids
    ],
    'tokenizer.ggml.merges': None,
    'tokenizer.ggml.bos_token_id': model.bos_id(),
    'tokenizer.ggml.eos_token_id': model.eos_id(),
    'tokenizer.ggml.unknown_token_id': model.unk_id(),
    'tokenizer.ggml.padding_token_id': None,
  }


def assert_same_ids(model, path, directory, vocab, texts):
  opened = gguf_header.read(path, gguf.GGML_QUANT_SIZES)
  directory.mkdir()
  for name, content in gguf_tokenizer.files(opened, vocab).items():
    (directory / name).write_bytes(content)
  tokenizer = load_tokenizer(directory)
  assert tokenizer.encode(texts) == model.encode(texts)
  special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
  assert special == (model.bos_id(), model.eos_id(), model.unk_id())


TEXTS = [
  'the cat sat', '  two  spaces\n', 'Zürich 🦙 2024', '', '</s>', 'hat\tthe hat',
]  # fmt: skip


def test_pieces_with_scores_become_the_sentencepiece_model(tmp_path):
  (tmp_path / 'x.txt').write_text('the cat sat on the mat\nthat hat\n' * 9)
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / 'x.txt'),
    model_prefix=str(tmp_path / 'x'),
    model_type='bpe',
    vocab_size=290,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  model = sentencepiece.SentencePieceProcessor(
    model_file=str(tmp_path / 'x.model')
  )
  path = write_gguf(tmp_path / 'x.gguf', {}, **sentencepiece_fields(model))
  assert len(model.encode('the cat')) == 2
  assert_same_ids(model, path, tmp_path / 'hf', 290, TEXTS)


@pytest.mark.parametrize('version', ['v1', 'v3'])
def test_mistrals_own_sentencepiece_models(version, shared, tmp_path):
  folder = shared / 'tokenizers' / f'mistral-{version}'
  [file] = [p for p in folder.iterdir() if '.model' in p.name]
  model = sentencepiece.SentencePieceProcessor(model_file=str(file))
  path = write_gguf(tmp_path / 'x.gguf', {}, **sentencepiece_fields(model))
  texts = (shared / 'data/tinystories_v2_1MB.txt').read_text('utf-8')
  texts = [*TEXTS, *texts[:100_000].split('\n')]
  vocab = model.get_piece_size()
  assert_same_ids(model, path, tmp_path / 'hf', vocab, texts)


def test_a_second_call_finds_the_first_ones_files(tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors)

  def state():
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in made.iterdir()}

  (tmp_path / 'hf').mkdir()  # an empty one is as good as none
  made = ours.convert(path, tmp_path / 'hf')
  before = state()
  source = json.loads((made / ours.SOURCE_FILE).read_text())
  assert (source['name'], source['size']) == ('x.gguf', path.stat().st_size)
  moved = path.rename(tmp_path / 'y.gguf')
  assert ours.convert(moved, made) == made
  assert state() == before
  assert {p.name for p in tmp_path.iterdir()} == {'y.gguf', 'hf'}


def test_another_who_comes_first_is_no_error(tensors, tmp_path, monkeypatch):
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  write_weights = ours._write_weights

  def second(*args):
    monkeypatch.setattr(ours, '_write_weights', write_weights)
    ours.convert(path, tmp_path / 'hf')
    write_weights(*args)

  monkeypatch.setattr(ours, '_write_weights', second)
  assert load_params(ours.convert(path, tmp_path / 'hf'))
  assert {p.name for p in tmp_path.iterdir()} == {'x.gguf', 'hf'}


def _other_dtype(path, made):
  return refusal(ours.convert, path, made, 'bfloat16')


def _other_file(path, made):
  path.write_bytes(path.read_bytes() + b'\0')
  return refusal(ours.convert, path, made)


def _lost(path, made):
  (made / 'tokenizer.json').unlink()
  return refusal(ours.convert, path, made)


def _foreign(path, made):
  (made / ours.SOURCE_FILE).unlink()
  return refusal(ours.convert, path, made)


def _no_dtype(path, made):
  return refusal(ours.convert, path, made, 'int8')


@pytest.mark.parametrize(('change', 'words'), [
  (_other_dtype, "was made from 'x.gguf' and differs in dtype; remove it"),
  (_other_file, 'differs in size, sha256'),
  (_lost, 'no longer as it was made (tokenizer.json)'),
  (_foreign, 'holds other files already'),
  (_no_dtype, "'int8' is none of float32"),
])  # fmt: skip
def test_directories_that_are_not_written_to(change, words, tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  made = ours.convert(path, tmp_path / 'hf')
  assert words in change(path, made)


# Changes to the fields -> words of the message.
REFUSED_FIELDS = [
  ({'arch': 'qwen2'}, "architecture 'qwen2' is not supported"),
  ({'llama.block_count': None}, 'llama.block_count is missing'),
  ({'llama.block_count': 10**9}, 'llama.block_count is 1000000000, but there'),
  ({'llama.block_count': 2}, 'such a model has not: blk.2.attn_norm.weight'),
  ({'llama.block_count': 4}, 'blk.3.attn_norm.weight is missing'),
  ({'llama.embedding_length': 32}, 'attn_q.weight has shape (96, 64), the'),
  ({'llama.embedding_length': 'x'}, "is 'x', not a positive integer"),
  ({'llama.attention.head_count': 0}, 'is 0, not a positive integer'),
  ({'llama.attention.head_count_kv': [2, 2, 1]}, 'is array([2, 2, 1], dtype=int32), not'),
  ({'llama.attention.head_count_kv': 3}, '4 is no multiple of'),
  ({'llama.attention.layer_norm_rms_epsilon': None}, 'epsilon is missing'),
  ({'llama.attention.layer_norm_rms_epsilon': float('nan')}, 'is nan, not a'),
  ({'llama.rope.dimension_count': 12}, 'dimension_count is 12, the heads have'),
  ({'llama.rope.scaling.type': 'yarn'}, "llama.rope.scaling.type 'yarn'"),
  ({'llama.rope.scale_linear': 4.0}, 'llama.rope.scale_linear 4.0'),
  ({'llama.expert_count': 8}, 'not supported: llama.expert_count 8'),
  ({'llama.attention.scale': 0.5}, 'not supported: llama.attention.scale'),
  ({'llama.vocab_size': 9}, 'is 9, token_embd.weight has 280 rows'),
  ({'split.count': 3}, 'one of 3 parts'),
  ({'tokenizer.ggml.model': 't5'}, "'t5' is not supported; supported: gpt2"),
  ({'tokenizer.ggml.pre': 'qwen2'}, "pre 'qwen2' is not supported; supported:"),
  ({'tokenizer.ggml.pre': 'default'}, "pre 'default' is not supported"),
  ({'tokenizer.ggml.pre': None}, 'tokenizer.ggml.pre is missing'),
  ({'tokenizer.ggml.tokens': None}, 'tokenizer.ggml.tokens is missing'),
  ({'tokenizer.ggml.tokens': ['a'] * 5}, "that are there twice: 'a'"),
  ({'tokenizer.ggml.tokens': ['a'] * 281}, '281 tokens for 280 embedding rows'),
  ({'tokenizer.ggml.tokens': [1, 2]}, 'not a list of strings'),
  ({'tokenizer.ggml.token_type': [1, 1]}, 'not an array of 270 numbers'),
  ({'tokenizer.ggml.token_type': [6] * 270}, 'tokens of types [6] in'),
  ({'tokenizer.ggml.merges': ['h e', 'he x']}, "not of two tokens: 'he x'"),
  ({'tokenizer.ggml.merges': ['h']}, "not of two tokens: 'h'"),
  ({'tokenizer.ggml.eos_token_id': None}, 'eos_token_id is missing'),
  ({'tokenizer.ggml.eos_token_id': 270}, 'is 270, not an id below 270'),
  ({'tokenizer.ggml.eos_token_id': 'x'}, "is 'x', not an id below 270"),
  ({'tokenizer.ggml.bos_token_id': None}, 'but none is named'),
  ({'tokenizer.ggml.add_bos_token': 1}, 'is 1, not true or false'),
  ({'tokenizer.chat_template': 3}, 'is 3, not a string'),
  ({'tokenizer.ggml.model': 'llama'}, 'tokenizer.ggml.scores is missing'),
  ({'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.scores': [0.5] * 270}, 'tokenizer: token types {1: '),
  ({'general.alignment': 0}, 'general.alignment is 0'),
]  # fmt: skip


@pytest.mark.parametrize(('changes', 'words'), REFUSED_FIELDS)
def test_what_the_metadata_may_not_say(changes, words, tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors, **changes)
  message = refusal(ours.convert, path, tmp_path / 'hf')
  assert message.startswith(str(path))
  assert words in message
  assert [p.name for p in tmp_path.iterdir()] == ['x.gguf']


@pytest.mark.parametrize(('changes', 'words'), [
  ({'model.norm.weight': None}, 'output_norm.weight is missing'),
  ({'blk.0.attn_q.bias': np.ones(96)}, 'has not: blk.0.attn_q.bias'),
  ({'rope_freqs.weight': np.ones(12)}, 'scaled RoPE, as of Llama 3.1'),
  ({'model.norm.weight': np.ones(63)}, 'output_norm.weight has shape (63,)'),
  ({'model.norm.weight': np.full(64, np.nan)}, 'is not finite in float32'),
  ({'model.norm.weight': np.ones(64, np.int32)}, 'cannot unpack: I32'),
  ({'model.embed_tokens.weight': None}, 'token_embd.weight is missing'),
])  # fmt: skip
def test_tensors_that_do_not_belong(changes, words, tensors, tmp_path):
  changed = {
    n: w.astype(np.float32) if w is not None and w.dtype == np.float64 else w
    for n, w in {**tensors, **changes}.items()
  }
  changed = {n: w for n, w in changed.items() if w is not None}
  path = write_gguf(tmp_path / 'x.gguf', changed)
  message = refusal(ours.convert, path, tmp_path / 'hf')
  assert message.startswith(str(path))
  assert words in message
  assert [p.name for p in tmp_path.iterdir()] == ['x.gguf']


def test_what_float16_cannot_hold(tensors, tmp_path):
  changed = {**tensors, 'model.norm.weight': np.full(64, 1e6, np.float32)}
  path = write_gguf(tmp_path / 'x.gguf', changed)
  message = refusal(ours.convert, path, tmp_path / 'hf', 'float16')
  assert 'output_norm.weight is not finite in float16' in message


def head(keys=b'', tensors=b'', key_count=1, tensor_count=0, version=3):
  counts = struct.pack('<IQQ', version, tensor_count, key_count)
  return b'GGUF' + counts + keys + tensors


def string(text):
  return struct.pack('<Q', len(text)) + text


def array(kind, count):
  return string(b'k') + struct.pack('<IIQ', 9, kind, count)


def tensor(name=b't', shape=(8,), kind=0, offset=0):
  dims = struct.pack(f'<I{len(shape)}Q', len(shape), *shape)
  return string(name) + dims + struct.pack('<IQ', kind, offset)


def file_of(*infos):
  return head(b'', b''.join(infos), 0, len(infos)) + b'\0' * 256


CRAFTED = [
  (b'', "not a GGUF file: begins with b''"),
  (b'PK\x03\x04' + b'\0' * 99, 'not a GGUF file: begins with'),
  (b'version https://git-lfs.github.com/spec/v1\n', 'is a Git LFS pointer'),
  (b'GGUF', 'cut off: wants 4 bytes at byte 4 of 4'),
  (head(version=1), 'version 1 is not supported'),
  (head(version=3 << 24), 'version 50331648 is not supported'),
  (head(key_count=2**63), 'claims 0 tensors, 9223372036854775808 keys'),
  (head(), 'cut off: wants 8 bytes at byte 24 of 24'),
  (head(struct.pack('<Q', 2**62)), 'cut off: wants 4611686018427387904 bytes'),
  (head(string(b'\xff') + b'\0' * 9), "b'\\xff' is not UTF-8"),
  (head(string(b'k') + struct.pack('<I', 13)), 'k: value type 13 is not known'),
  (head(string(b'a\nb') + b'\0' * 9), "'a\\nb' is no name of a key or tensor"),
  (head(string(b'a' * 129) + b'\0' * 9), 'is no name of a key or tensor'),
  # An array that claims more than there is keeps gguf's reader for ever.
  (head(array(4, 2**60)), 'cut off: wants 4611686018427387904 bytes'),
  (head(array(8, 2**60)), 'cut off inside k'),
  (head(array(9, 2**60)), 'array of type 9 is not supported'),
  (head((string(b'k') + struct.pack('<IB', 0, 1)) * 2, key_count=2),
   "the key 'k' is there twice"),
  (file_of(tensor(), tensor()), "the tensor 't' is there twice"),
  (file_of(tensor(kind=99)), 't: tensor type 99 is not known'),
  (file_of(tensor(shape=(2,) * 5)), 't: 5 dimensions'),
  (file_of(tensor(shape=())), 't: shape () is not possible'),
  (file_of(tensor(shape=(8, 0))), 't: shape (0, 8) is not possible'),
  (file_of(tensor(kind=8)), 't: shape (8,) is not possible'),
  (file_of(tensor(shape=(2**63, 2**63))), 'cut off: t ends at byte'),
  (file_of(tensor(offset=2**63)), 'cut off: t ends at byte'),
  (file_of(tensor(), tensor(b'u', offset=16)), 'u overlaps another tensor'),
]  # fmt: skip


@pytest.mark.parametrize(('content', 'words'), CRAFTED)
def test_crafted_files(content, words, tmp_path):
  path = tmp_path / 'x.gguf'
  path.write_bytes(content)
  begin = time.monotonic()
  message = refusal(ours.convert, path, tmp_path / 'hf')
  assert time.monotonic() - begin < 5
  assert message.startswith(str(path))
  assert words in message
  assert len(message) < 300 + len(str(path))
  assert [p.name for p in tmp_path.iterdir()] == ['x.gguf']


def test_files_cut_off_anywhere(tensors, tmp_path):
  whole = write_gguf(tmp_path / 'x.gguf', tensors).read_bytes()
  path = tmp_path / 'cut.gguf'
  for at in [*range(0, 3000, 97), *range(3000, len(whole), len(whole) // 20)]:
    path.write_bytes(whole[:at])
    assert str(path) in refusal(ours.convert, path, tmp_path / 'hf')
  assert not (tmp_path / 'hf').exists()


def test_heads_with_any_byte_changed(tensors, tmp_path):
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  outcomes = set()
  for n in range(150):
    changed = bytearray(whole)
    changed[rng.integers(0, 12000 if n % 2 else 1500)] = rng.integers(0, 256)
    path.write_bytes(changed)
    try:
      ours.convert(path, tmp_path / f'hf{n}')
      outcomes.add('made')
    except ours.ModelError as error:
      assert str(path) in str(error)
      assert str(error).isprintable()
      outcomes.add('refused')
  assert outcomes == {'made', 'refused'}


def test_no_file_and_no_package(tensors, tmp_path, monkeypatch):
  message = refusal(ours.convert, tmp_path / 'x.gguf', tmp_path / 'hf')
  assert message == f'{tmp_path}/x.gguf: no such file'
  path = write_gguf(tmp_path / 'x.gguf', tensors)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  message = refusal(ours.convert, path, tmp_path / 'hf')
  assert "pip install 'lorax-train[gguf]'" in message


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  """SmolLM2-135M-Instruct."""
  return ours.convert(
    smollm2.find(), tmp_path_factory.mktemp('smollm2') / 'hf', 'float16'
  )


def test_smollm2_has_llama_cpps_ids(real, golden):
  path = golden / 'gguf' / 'smollm2_ids.json'
  rows = json.loads(path.read_text('utf-8'))['texts']
  texts, want = map(list, zip(*rows, strict=True))
  assert len({*texts}) == 1000
  tokenizer = load_tokenizer(real)
  got = tokenizer.encode(texts)
  assert [r for r in zip(texts, got, want, strict=True) if r[1] != r[2]] == []
  assert [tokenizer.decode(ids) for ids in got] == texts


def test_smollm2_knows_the_capital_of_italy(real):
  apply, params, tokenizer = load(str(real))
  ids = tokenizer.encode(['The capital of Italy is'])
  next_id = int(jnp.argmax(apply(params, np.array(ids, np.int32))[0, -1]))
  assert tokenizer.decode([next_id]) == ' Rome'
