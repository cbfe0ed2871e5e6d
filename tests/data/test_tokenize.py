"""Tokenizers against sentencepiece and transformers.

What can be told by hand is: the abc tokenizer of toys.py has the ids
<unk> 0, <s> 1, </s> 2, a 3, b 4, c 5, ab 6.
"""

import hashlib

import pytest
import sentencepiece
import tokenizers

from lorax_train.data import sentencepiece_json
from lorax_train.data.source import read_rows
from lorax_train.data.tokenize import (
  check_same_ids,
  check_vocabulary,
  load_tokenizer,
)
from lorax_train.errors import ModelError

from .toys import (
  ABC_CONFIG,
  abc_tokenizer,
  write_tokenizer,
)

HARD = [
  '',
  ' ',
  '\n',
  'a',
  ' lead',
  'trail ',
  'two  spaces   three',
  'line\n\nline\ttab\r\n',
  '</s>',
  'a</s> b<s>',
  '[INST] hi [/INST]',
  '<unk><0x0A>',
  '▁x',
  'é e\u0301 ﬁ ½',
  '日本語 한국어 العربية',
  '🙂👩‍👩‍👧',
  '\x00\x07',
  '1234567890 3.14',
  'x' * 300,
]
ADD_BOS = tokenizers.processors.TemplateProcessing(
  single='<s> $A', special_tokens=[('<s>', 1)]
)


def alpaca_texts(shared, n):
  rows = read_rows(str(shared / 'data' / 'alpaca_gpt4_999.json'))[:n]
  return [row.fields['output'] for row in rows]


def test_ids_of_the_small_tokenizer(abc_dir):
  tokenizer = load_tokenizer(str(abc_dir))
  texts = ['', 'abc', 'ca', 'bab', '</s>']
  assert tokenizer.encode(texts) == [[], [6, 5], [5, 3], [4, 6], [0] * 4]
  assert tokenizer.encode([]) == []
  assert tokenizer.decode([1, 6, 5, 2]) == 'abc'
  assert (tokenizer.size, tokenizer.piece(6)) == (7, 'ab')
  assert tokenizer.piece(7) == '<no piece 7>'


@pytest.mark.parametrize('kind', ['bytes_dir', 'sentencepiece_dir'])
def test_decode_undoes_encode(kind, request):
  tokenizer = load_tokenizer(request.getfixturevalue(kind))
  # The dummy space before a text can't be told from a space of its own.
  texts = [text for text in HARD if '▁' not in text]
  ids = tokenizer.encode(texts)
  assert [tokenizer.decode(row) for row in ids] == texts
  # special tokens, and embedding rows beyond the pieces, are no text
  extra = [tokenizer.bos_id, *tokenizer.encode(['a'])[0], 10**6, 2**31 - 1]
  assert tokenizer.decode([*extra, tokenizer.eos_id]) == 'a'
  assert tokenizer.decode([]) == ''
  special = {tokenizer.bos_id, tokenizer.eos_id}
  assert not special & {id for row in ids for id in row}


def test_a_lone_model_has_its_own_specials(sentencepiece_dir):
  tokenizer = load_tokenizer(sentencepiece_dir)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
  assert tokenizer.files == (sentencepiece_dir / 'tokenizer.model',)
  assert tokenizer.piece(1) == '<s>'
  assert tokenizer.piece(tokenizer.size) == f'<no piece {tokenizer.size}>'
  assert tokenizer.piece(-1) == '<no piece -1>'


@pytest.mark.parametrize(
  'config, special_map, model_config, post, bos, eos, pad',
  [
    # names: tokenizer_config, then the special map, then config.json's ids
    ({'bos_token': '<s>', 'eos_token': '</s>'}, {}, {}, True, 1, 2, 0),
    ({'bos_token': '<s>', 'eos_token': '</s>'}, {}, {}, False, None, 2, 0),
    ({'eos_token': {'content': '</s>'}}, {}, {}, True, None, 2, 0),
    ({}, {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}, {}, True, 1, 2, 0),
    ({}, {}, {'bos_token_id': 1, 'eos_token_id': 2}, True, 1, 2, 0),
    ({}, {}, {'bos_token_id': 1, 'eos_token_id': [6, 2]}, True, 1, 6, 0),
    ({'eos_token': '</s>'}, {'eos_token': 'a'}, {'eos_token_id': 5}, False, None, 2, 0),
    # add_bos_token is believed before the post-processor
    ({'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True}, {}, {}, False, 1, 2, 0),
    ({'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': False}, {}, {}, True, None, 2, 0),
    # padding: pad, else unk, else 0
    ({'eos_token': '</s>', 'pad_token': '</s>'}, {}, {}, False, None, 2, 2),
    ({'eos_token': '</s>', 'unk_token': 'b'}, {}, {}, False, None, 2, 4),
    ({'eos_token': '</s>', 'pad_token': None}, {'pad_token': 'c'}, {}, False, None, 2, 5),
  ],
)  # fmt: skip
def test_special_tokens(
  tmp_path, config, special_map, model_config, post, bos, eos, pad
):
  tokenizer = abc_tokenizer()
  if post:
    tokenizer.post_processor = ADD_BOS
  folder = write_tokenizer(
    tmp_path / 'm',
    tokenizer,
    tokenizer_config=config,
    special_tokens_map=special_map,
    config=model_config,
  )
  loaded = load_tokenizer(folder)
  assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (bos, eos, pad)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('tokenizer.json', None, '{dir}: no tokenizer; put tokenizer.json or tokenizer.model there'),
    ('tokenizer.json', '[', '{dir}/tokenizer.json: not a tokenizer (invalid type: sequence, expected struct Tokenizer at line 1 column 1); fetch the file again'),
    ('tokenizer.json', '', '{dir}/tokenizer.json: not a tokenizer (EOF while parsing a value at line 1 column 0); fetch the file again'),
    ('tokenizer_config.json', '{', '{dir}/tokenizer_config.json: not JSON (Expecting property name enclosed in double quotes: line 1...); fetch it again'),
    ('tokenizer_config.json', '[]', '{dir}/tokenizer_config.json: holds no JSON object; fetch it again'),
    ('tokenizer_config.json', '{}', '{dir}: no EOS token, so no answer could ever end; name it as "eos_token" in tokenizer_config.json'),
    ('tokenizer_config.json', '{"eos_token": "<end>"}', "{dir}: eos_token '<end>' is no piece of the vocabulary; use the tokenizer_config.json that belongs to the tokenizer"),
    ('tokenizer_config.json', '{"eos_token": "</s>", "add_bos_token": true}', '{dir}/tokenizer_config.json: add_bos_token is true but no BOS token is named; name it as "bos_token" there'),
    ('config.json', '{"eos_token_id": 99}', '{dir}/config.json: eos_token_id 99 is no id of the tokenizer; name eos_token in tokenizer_config.json'),
    ('config.json', '{"eos_token_id": -1}', '{dir}/config.json: eos_token_id -1 is no id of the tokenizer; name eos_token in tokenizer_config.json'),
    ('config.json', '{"eos_token_id": "x"}', "{dir}/config.json: eos_token_id 'x' is no id of the tokenizer; name eos_token in tokenizer_config.json"),
  ],
)  # fmt: skip
def test_refusals(tmp_path, name, content, message):
  if name != 'tokenizer.json':
    write_tokenizer(tmp_path, abc_tokenizer())
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(ModelError) as caught:
    load_tokenizer(tmp_path)
  assert str(caught.value) == message.replace('{dir}', str(tmp_path))


@pytest.mark.parametrize('content', [b'', b'no model' * 9])
def test_a_corrupt_model_file(tmp_path, content):
  (tmp_path / 'tokenizer.model').write_bytes(content)
  with pytest.raises(ModelError) as caught:
    load_tokenizer(tmp_path)
  message = str(caught.value)
  assert message.startswith(f'{tmp_path}/tokenizer.model: not a tokenizer (')
  assert len(message.splitlines()) == 1


def test_saved_padding_and_truncation_are_left_out(tmp_path):
  tokenizer = abc_tokenizer()
  tokenizer.enable_padding(length=9)
  tokenizer.enable_truncation(2)
  folder = write_tokenizer(
    tmp_path / 'm', tokenizer, tokenizer_config=ABC_CONFIG
  )
  assert load_tokenizer(folder).encode(['abcabc']) == [[6, 5, 6, 5]]


def test_files_and_fingerprint(tmp_path):
  folder = write_tokenizer(
    tmp_path / 'm', abc_tokenizer(), tokenizer_config=ABC_CONFIG
  )
  first = load_tokenizer(folder)
  names = ['tokenizer.json', 'tokenizer_config.json']
  digest = hashlib.sha256()
  for name in names:
    content = (folder / name).read_bytes()
    digest.update(f'{name} {len(content)}\n'.encode() + content)
  assert [path.name for path in first.files] == names
  assert first.fingerprint == digest.hexdigest()
  (folder / 'chat_template.jinja').write_text('{{ x }}')
  second = load_tokenizer(folder)
  assert [path.name for path in second.files] == [
    *names,
    'chat_template.jinja',
  ]
  assert second.fingerprint != first.fingerprint


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
  tokenizer = abc_tokenizer()
  tokenizer.add_special_tokens(['<end>'])  # id 7: an added token counts
  folder = write_tokenizer(
    tmp_path / 'm', tokenizer, tokenizer_config=ABC_CONFIG
  )
  loaded = load_tokenizer(folder)
  assert loaded.size == 8
  check_vocabulary(loaded, 8)
  check_vocabulary(loaded, 64)
  with pytest.raises(ModelError) as caught:
    check_vocabulary(loaded, 6)
  assert str(caught.value) == (
    f'{folder}/tokenizer.json: 2 ids have no row in the embedding of 6: 6'
    " 'ab', 7 '<end>'; use the tokenizer that belongs to the model"
  )


def test_two_files_that_agree_and_that_do_not(tmp_path, sentencepiece_dir):
  model = sentencepiece_dir / 'tokenizer.model'
  (tmp_path / 'tokenizer.model').write_bytes(model.read_bytes())
  texts = ['Once upon a time', '</s> and </s>', 'the ünknown\n']
  check_same_ids(tmp_path, texts)  # one file: nothing to compare
  write_tokenizer(tmp_path, sentencepiece_json.build(model))
  check_same_ids(tmp_path, texts)
  # The commonest fault of converted files: no dummy space before a text.
  converted = sentencepiece_json.build(model)
  converted.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  write_tokenizer(tmp_path, converted)
  with pytest.raises(ModelError) as caught:
    check_same_ids(tmp_path, ['', *texts])
  message = str(caught.value)
  assert message.startswith(
    f'{tmp_path}: tokenizer.json and tokenizer.model give different ids for 3'
    " of 4 texts, first 'Once upon a time': from id 0 on ["
  )
  assert len(message) < 400 + len(str(tmp_path))
  assert len(message.splitlines()) == 1


@pytest.mark.parametrize('version', ['mistral-v1', 'mistral-v3'])
def test_mistral_ids_are_those_of_sentencepiece(shared, version):
  folder = shared / 'tokenizers' / version
  reference = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / 'tokenizer.model')
  )
  tokenizer = load_tokenizer(folder)
  texts = HARD + alpaca_texts(shared, 100)
  ids = tokenizer.encode(texts)
  assert ids == [reference.encode(text) for text in texts]
  assert [tokenizer.decode(row) for row in ids] == [
    reference.decode(row) for row in ids
  ]
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.size == reference.get_piece_size()


def test_stories260k_has_two_files_that_agree(shared):
  folder = shared / 'models' / 'stories260K-mistral'
  texts = HARD + alpaca_texts(shared, 300)
  reference = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / 'tokenizer.model')
  )
  tokenizer = load_tokenizer(folder)
  assert [path.name for path in tokenizer.files] == [
    'tokenizer.json',
    'tokenizer.model',
    'tokenizer_config.json',
  ]
  assert tokenizer.encode(texts) == [reference.encode(t) for t in texts]
  check_same_ids(folder, texts)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.size) == (1, 2, 512)


def test_tinystories_ids_are_those_of_transformers(shared):
  transformers = pytest.importorskip('transformers')
  folder = shared / 'models' / 'tinystories-656k'
  reference = transformers.AutoTokenizer.from_pretrained(folder)
  tokenizer = load_tokenizer(folder)
  texts = alpaca_texts(shared, 100)
  expected = reference(texts)['input_ids']
  ids = [[tokenizer.bos_id, *row] for row in tokenizer.encode(texts)]
  # transformers 5 rebuilds this tokenizer without its unk and drops what it
  # does not know, where the file says <unk>: compare what is all known.
  unk = tokenizer.library.id_of('<unk>')
  known = [n for n, row in enumerate(ids) if unk not in row]
  assert len(known) > 50
  assert [ids[n] for n in known] == [expected[n] for n in known]
  assert tokenizer.eos_id == reference.eos_token_id == 2
  # BOS and EOS, which this file marks `normalized`, are still no text
  row = tokenizer.encode(['Once upon a time'])[0]
  assert tokenizer.decode([1, *row, 2]) == 'Once upon a time'
