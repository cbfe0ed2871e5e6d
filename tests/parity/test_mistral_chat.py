"""Mistral's chat formats: our ids and learned tokens against mistral-common's.

Reference: mistral-common 1.9.1 in its mode for fine-tuning, with the tokenizers
in its own package; Tekken's rewritten as a tokenizer.json.
"""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorax_train.data.encode import encode_rows
from lorax_train.data.encoded import NO_LOSS
from lorax_train.data.mistral_chat import FORMATS
from lorax_train.data.tokenize import load_tokenizer
from tests.data.toys import rows_of

pytest.importorskip('mistral_common')

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'golden' / 'mistral_chat.py'
SPEC = importlib.util.spec_from_file_location('golden_mistral_chat', SCRIPT)
theirs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(theirs)

CONVERSATIONS = [*theirs.CASES.values(), *theirs.by_chance(300)]


def as_json(file):
  """Tekken's file, a list of byte strings by rank, for `tokenizers`."""
  content = json.loads(file.read_text('utf-8'))
  special = theirs.tokenizer('mistral_v3_tekken').instruct_tokenizer.tokenizer
  n_special = content['config']['default_num_special_tokens']
  size = content['config']['default_vocab_size'] - n_special
  tokens = [
    base64.b64decode(entry['token_bytes']) for entry in content['vocab'][:size]
  ]
  ranks = {token: rank for rank, token in enumerate(tokens)}
  letters = [bytes_to_unicode()[b] for b in range(256)]
  name = lambda token: ''.join(letters[b] for b in token)  # noqa: E731
  merges = [
    (name(token[:cut]), name(token[cut:]))
    for token in tokens
    for cut in range(1, len(token))
    if token[:cut] in ranks and token[cut:] in ranks
  ]
  spelled = [special.id_to_piece(id) for id in range(n_special)]
  vocab = {piece: id for id, piece in enumerate(spelled)}
  vocab |= {name(token): rank + n_special for token, rank in ranks.items()}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab, merges, ignore_merges=True)
  )
  pattern = tokenizers.Regex(content['config']['pattern'])
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(pattern, 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.add_special_tokens(spelled)
  return tokenizer


def directory(name, folder):
  """A model directory with mistral-common's tokenizer of a format."""
  folder.mkdir()
  file = theirs.DATA / theirs.FILES[name]
  if name != 'mistral_v3_tekken':
    shutil.copy(file, folder / 'tokenizer.model')
    return folder
  as_json(file).save(str(folder / 'tokenizer.json'))
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize('name', FORMATS)
def test_ids_and_what_is_learned(name, tmp_path):
  tokenizer = load_tokenizer(directory(name, tmp_path / name))
  rows = rows_of(*map(theirs.row, CONVERSATIONS))
  reference = theirs.tokenizer(name)
  for (row, ours), messages in zip(
    encode_rows(rows, name, tokenizer), CONVERSATIONS, strict=True
  ):
    ids, learned = theirs.reference(reference, messages)
    assert ours.ids == ids, row.fields
    assert [label != NO_LOSS for label in ours.labels] == learned
    assert all(a in (b, NO_LOSS) for a, b in zip(ours.labels, ids, strict=True))
    assert (ours.bos, ours.prompt) == (1, learned.index(True) - 1)


@pytest.mark.parametrize('messages', [
  [('a', 'One.'), ('s', 'Be brief.'), ('a', 'Two.')],
  [('u', 'One.'), ('a', '')],
])  # fmt: skip
@pytest.mark.parametrize('name', FORMATS[:2])
def test_what_mistral_common_refuses_is_refused(name, messages, tmp_path):
  from mistral_common.exceptions import MistralCommonException

  tokenizer = load_tokenizer(directory(name, tmp_path / name))
  with pytest.raises(MistralCommonException):
    theirs.reference(theirs.tokenizer(name), messages)
  [(_, ours)] = encode_rows(rows_of(theirs.row(messages)), name, tokenizer)
  assert isinstance(ours, ValueError)
