"""tokenizer.json made of tokenizer.model, against sentencepiece itself.

The reference is sentencepiece on the very file: ids and decoded texts of whole
lists. Models are trained here, with user-defined pieces or without, or edited
field by field to what no trainer gives; Mistral's own are used where they lie.
transformers' AutoTokenizer reads what is put into a directory.
"""

import itertools
import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb

from lorax_train.data import sentencepiece_json
from lorax_train.data.model_proto import parse
from lorax_train.data.source import read_rows
from lorax_train.data.tokenize import check_same_ids, load_tokenizer
from lorax_train.errors import ModelError

from .toys import TEXTS, sentencepiece_model

MINE = [
  '[INST]', '[IN', 'the dog', '▁cat', 'the ', '▁▁', 'ab', 'bc', '\n', 'ü', ' ',
  '▁girl x', '<0x0A>x',
]  # fmt: skip
WORDS = [
  '', ' ', '  ', '   ', '▁', '\n', '\t', '\0', '\x07', 'a', 'b', 'c', 'e', 'xx',
  'the', 'the cat', 'Once upon', 'little girl', '</s>', '<s>', '<unk>', '<0x0A>',
  '<0xE2>', 'é', 'e\u0301', 'ﬁ', '日本', '🙂', '👩‍👩‍👧', '\u200b', '\ufffd', '\ufeff',
]  # fmt: skip
KINDS = {
  'plain': {},
  'no byte fallback': {'byte_fallback': False, 'vocab_size': 90},
  'no dummy prefix': {'add_dummy_prefix': False},
  'user-defined': {'user_defined_symbols': MINE},
  'user-defined, no dummy prefix': {
    'user_defined_symbols': MINE,
    'add_dummy_prefix': False,
  },
  'user-defined, no byte fallback': {
    'user_defined_symbols': MINE,
    'byte_fallback': False,
    'vocab_size': 90,
  },
  'control pieces, other names': {
    'user_defined_symbols': MINE,
    'control_symbols': ['<a>', '[x]'],
    'unk_surface': '?',
    'unk_piece': '<what>',
  },
}


def pair_of(path):
  """(sentencepiece, ours as it would be read off the disk)."""
  ours = tokenizers.Tokenizer.from_str(sentencepiece_json.build(path).to_str())
  ours.encode_special_tokens = True  # no control piece out of a text
  return sentencepiece.SentencePieceProcessor(model_file=str(path)), ours


def check(reference, ours, texts):
  wanted = reference.encode(texts, out_type=int)
  made = ours.encode_batch_fast(texts, add_special_tokens=False)
  given = [encoding.ids for encoding in made]
  assert [
    t for t, a, b in zip(texts, given, wanted, strict=True) if a != b
  ] == []
  told = reference.decode(wanted)
  decoded = ours.decode_batch(wanted)
  assert [a for a, b in zip(decoded, told, strict=True) if a != b] == []


def mixed(words, count, longest=12):
  rng = random.Random(0)
  return [
    ''.join(rng.choice(words) for _ in range(rng.randrange(longest)))
    for _ in range(count)
  ]


@pytest.fixture(scope='module', params=KINDS)
def toy(request, tmp_path_factory):
  path = tmp_path_factory.mktemp('toy') / 'tokenizer.model'
  path.write_bytes(sentencepiece_model(**KINDS[request.param]))
  return pair_of(path)


def test_ids_and_texts_of_words_pieces_and_runs(toy):
  reference, ours = toy
  pieces = [reference.id_to_piece(id) for id in range(len(reference))]
  between = [
    ''.join(t) for t in itertools.product(MINE[:7], pieces, ('ab', ''))
  ]
  runs = [c * n for c in ' ae日' for n in range(40)]
  words = [*WORDS, *MINE, *pieces]
  texts = [*words, *between, *runs, *mixed(words, 3000), *TEXTS]
  check(reference, ours, [*texts, 'x' * 50_000, ' a' * 50_000])


@settings(max_examples=300, deadline=None)
@given(
  st.lists(st.one_of(st.sampled_from(WORDS + MINE), st.text(max_size=5))).map(
    ''.join
  )
)
def test_ids_and_texts_of_any_unicode(toy, text):
  check(*toy, [text])


@pytest.mark.parametrize(
  'version', ['mistral-v1', pytest.param('mistral-v3', marks=pytest.mark.slow)]
)
def test_mistral(shared, version):
  pair = pair_of(shared / 'tokenizers' / version / 'tokenizer.model')
  rows = read_rows(str(shared / 'data' / 'alpaca_gpt4_999.json'))
  real = [value for row in rows for value in row.fields.values()]
  stories = (shared / 'data' / 'tinystories_v2_1MB.txt').read_text('utf-8')
  runs = [f'{a}{" " * n}{b}' for n in range(200) for a in 'x ' for b in 'x\n']
  texts = [*real, *stories.split('\n')[:2000], *runs, ' ' * 20_000]
  check(*pair, [*texts, *mixed(WORDS, 3000, 30)])
  strings = st.lists(st.text(max_size=8), max_size=8).map(''.join)

  @settings(max_examples=200, deadline=None, database=None)
  @given(strings)
  def any_unicode(text):
    check(*pair, [text])

  any_unicode()


def test_the_proto_reads_as_protobuf_reads_it():
  data = sentencepiece_model(user_defined_symbols=MINE, control_symbols=['<a>'])
  theirs = pb.ModelProto.FromString(data)
  ours = parse(data)
  assert [(p.text, p.score, p.kind) for p in ours.pieces] == [
    (p.piece, p.score, p.type) for p in theirs.pieces
  ]
  rules = theirs.normalizer_spec
  assert ours.dummy_prefix == rules.add_dummy_prefix
  assert ours.remove_extra_whitespaces == rules.remove_extra_whitespaces
  assert ours.escape_whitespaces == rules.escape_whitespaces
  assert ours.charsmap == bool(rules.precompiled_charsmap)
  assert ours.byte_fallback == theirs.trainer_spec.byte_fallback
  assert ours.unk_surface == theirs.trainer_spec.unk_surface
  # what is not set has the defaults of sentencepiece_model.proto
  bare = parse(b'')
  empty = pb.ModelProto()
  assert bare.kind == 'unigram'
  assert empty.trainer_spec.model_type == empty.trainer_spec.UNIGRAM
  assert bare.dummy_prefix == empty.normalizer_spec.add_dummy_prefix
  assert bare.remove_extra_whitespaces and bare.escape_whitespaces
  assert bare.unk_surface == empty.trainer_spec.unk_surface


@pytest.mark.parametrize(
  'data', [b'\x80', b'\xff' * 11, b'\x0a\x05ab', b'\x0b', b'\x0d\x00']
)
def test_bytes_that_are_no_proto(data):
  with pytest.raises(ValueError, match=r'past its message|wire type|64 bits'):
    parse(data)


def edited(edit):
  model = pb.ModelProto.FromString(sentencepiece_model())
  edit(model)
  return model.SerializeToString()


def piece(model, text):
  return next(p for p in model.pieces if p.piece == text)


def flag(name):
  return lambda model: setattr(model.normalizer_spec, name, True)


def _no_space(model):
  piece(model, '▁').piece = 'Ω'


def _no_character(model):
  piece(model, 'h').piece = 'Ω'


def _one_score(model):
  for p in model.pieces:
    p.score = 0.0


def _many_scores(model):
  for n in range(17):
    letter = chr(0x4E00 + n)
    for size in (1, 2, 3):
      model.pieces.add(piece=letter * size, score=-1000.0 - n, type=1)


def _some(**options):
  return lambda: sentencepiece_model(**options)


def _edit(change):
  return lambda: edited(change)


@pytest.mark.parametrize(
  'make, why',
  [
    (_some(model_type='unigram', vocab_size=60, byte_fallback=False), 'a unigram model, not BPE'),
    (_some(normalization_rule_name='nmt_nfkc'), 'a normalizer that replaces characters'),
    (_edit(flag('remove_extra_whitespaces')), 'remove_extra_whitespaces'),
    (_some(treat_whitespace_as_suffix=True), 'treat_whitespace_as_suffix'),
    (_edit(lambda m: setattr(m.normalizer_spec, 'escape_whitespaces', False)), 'no escape_whitespaces'),
    (_edit(lambda m: setattr(piece(m, 'he'), 'type', 5)), 'unused pieces'),
    (_edit(lambda m: setattr(piece(m, 'he'), 'score', float('nan'))), 'scores that are not finite'),
    (_edit(lambda m: setattr(piece(m, 'he'), 'piece', 'h' * 999)), 'a piece of more than 512 characters'),
    (_edit(lambda m: setattr(piece(m, '<s>'), 'piece', '$')), 'a control piece of one character'),
    (_edit(_no_space), 'no piece for a space'),
    (_edit(_no_character), 'has a character that is no piece'),
    (_edit(_one_score), 'pieces have one score, such as '),
    (_edit(_many_scores), 'scores that several pieces have'),
  ],
)  # fmt: skip
def test_what_cannot_be_made_equal_is_refused(tmp_path, make, why):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(make())
  with pytest.raises(ModelError) as caught:
    sentencepiece_json.build(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: no tokenizer.json can be made of it: ')
  assert why in message
  assert message.endswith('; use the tokenizer.json that belongs to the model')
  assert len(message.splitlines()) == 1
  # and a directory of it is left as it is
  assert sentencepiece_json.missing_files(tmp_path) == ({}, message)


def _runs_of_spaces(model, lengths):
  for n in lengths:
    model.pieces.add(piece='▁' * n, score=-1e9, type=1)


@pytest.mark.parametrize('lengths', [(2, 3, 4), (2, 3, 4, 5, 6, 7, 8, 14, 16)])
def test_runs_of_spaces_of_one_score_as_mistral_has(tmp_path, lengths):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(edited(lambda model: _runs_of_spaces(model, lengths)))
  check(*pair_of(path), [f'a{" " * n}the' for n in range(200)])


@pytest.mark.parametrize('content', [b'', b'no model' * 9])
def test_a_file_that_is_no_model(tmp_path, content):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(content)
  with pytest.raises(ModelError, match='not a tokenizer'):
    sentencepiece_json.build(path)


@pytest.mark.parametrize(
  'config, begins',
  [
    (None, True),
    ({'tokenizer_class': 'LlamaTokenizer', 'legacy': True, 'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'add_bos_token': True, 'chat_template': 'x'}, True),
    ({'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': False}, False),
    ({'eos_token': None, 'pad_token': None, 'add_eos_token': False}, True),
  ],
)  # fmt: skip
@pytest.mark.parametrize('model_type', [None, 'mistral', 'llama'])
def test_transformers_reads_it_as_sentencepiece_does(
  tmp_path, sentencepiece_dir, config, begins, model_type
):
  transformers = pytest.importorskip('transformers')
  model = tmp_path / 'tokenizer.model'
  shutil.copyfile(sentencepiece_dir / 'tokenizer.model', model)
  if config is not None:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  if model_type:
    (tmp_path / 'config.json').write_text(f'{{"model_type": "{model_type}"}}')
  before = load_tokenizer(tmp_path)
  files, lacking = sentencepiece_json.missing_files(tmp_path)
  assert sorted(files) == ['tokenizer.json', 'tokenizer_config.json']
  assert lacking == ''
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  assert sentencepiece_json.missing_files(tmp_path) == ({}, '')

  reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  texts = ['', ' ', 'a', '  lead', 'Once upon', '▁x', '日本\n', 'x  y   z ']
  ids = reference.encode(texts, out_type=int)
  first = [1] if begins else []
  assert theirs(texts)['input_ids'] == [first + row for row in ids]
  assert [theirs.decode(row) for row in ids] == reference.decode(ids)
  assert [theirs.decode(row, True) for row in ids] == reference.decode(ids)
  assert (theirs.eos_token_id, len(theirs)) == (2, len(reference))
  written = json.loads(files['tokenizer_config.json'])
  assert {'chat_template', 'legacy'} & {*(config or {})} <= {*written}

  # what we read of the directory is what it was
  after = load_tokenizer(tmp_path)
  for name in ('bos_id', 'eos_id', 'pad_id', 'size'):
    assert getattr(after, name) == getattr(before, name)
  assert after.encode(texts) == ids
  check_same_ids(tmp_path, texts)


def test_a_directory_that_lacks_nothing(tmp_path, abc_dir):
  assert sentencepiece_json.missing_files(abc_dir) == ({}, '')
  assert sentencepiece_json.missing_files(tmp_path) == ({}, '')
