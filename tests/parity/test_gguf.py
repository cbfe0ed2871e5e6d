"""A real GGUF file: our logits against transformers', which reads it itself.

Reference: AutoModelForCausalLM.from_pretrained(..., gguf_file=...) on torch,
float32, eager attention; for the directory, AutoTokenizer.
"""

import json

import jax
import numpy as np
import pytest

from lorax_train.data.tokenize import load_tokenizer
from lorax_train.formats.gguf import convert
from lorax_train.infer.load import load_params
from tests.formats import smollm2

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('peft')
pytest.importorskip('gguf')


ATOL = 1e-3  # of logits up to 30


@pytest.fixture(scope='module')
def file():
  return smollm2.find()


@pytest.fixture(scope='module')
def made(file, tmp_path_factory):
  return convert(file, tmp_path_factory.mktemp('smollm2') / 'hf')


def their_logits(directory, ids, **kwargs):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager', **kwargs
  )
  with torch.no_grad():
    return model.eval()(torch.tensor(ids)).logits.numpy()


def test_logits_of_a_real_file(file, made):
  vocab = 49152
  ids = np.random.default_rng(0).integers(0, vocab, (2, 48), np.int32)
  want = their_logits(file.parent, ids, gguf_file=file.name)
  apply, params = load_params(made)
  got = np.asarray(jax.jit(apply)(params, ids))
  assert np.abs(want).max() > 10
  np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)
  # Whoever reads our directory instead has the very same weights.
  np.testing.assert_array_equal(their_logits(made, ids), want)


def test_transformers_reads_our_tokenizer(made, golden):
  rows = json.loads((golden / 'gguf' / 'smollm2_ids.json').read_text('utf-8'))[
    'texts'
  ]
  tokenizer = transformers.AutoTokenizer.from_pretrained(made)
  for text, ids in rows:
    got = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    assert got.input_ids == ids
  chat = [{'role': 'user', 'content': 'hi'}]
  [ours] = load_tokenizer(made).encode(['hi'])
  assert ours[0] in tokenizer.apply_chat_template(chat)['input_ids']
