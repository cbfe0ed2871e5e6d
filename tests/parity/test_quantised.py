"""Quantised bases against transformers with bitsandbytes, both on a CPU.

Reference: transformers' own `from_pretrained` with a BitsAndBytesConfig, what
it writes, and the logits it computes; int8's by its weights made whole, for
bitsandbytes also rounds what they are multiplied with.
"""

import jax
import numpy as np
import pytest

pytest.importorskip('bitsandbytes')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from lorax_train.infer.load import load_params  # noqa: E402
from tests.formats.bitsandbytes_files import SIZES  # noqa: E402
from tests.toys import random_ids, write_model  # noqa: E402

KINDS = {
  'nf4': {'load_in_4bit': True, 'bnb_4bit_use_double_quant': True},
  'nf4, absmax in float32': {'load_in_4bit': True},
  'int8': {'load_in_8bit': True},
}
IDS = random_ids(shape=(2, 16))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  directory = tmp_path_factory.mktemp('model') / 'model'
  return write_model(directory, tokenizer=False, **SIZES)


def quantised(directory, kind):
  config = transformers.BitsAndBytesConfig(
    **KINDS[kind],
    bnb_4bit_quant_type='nf4',
    bnb_4bit_compute_dtype=torch.float32,
  )
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    quantization_config=config,
    dtype=torch.float32,
    device_map='cpu',
    attn_implementation='eager',
  ).eval()


def logits(model):
  with torch.no_grad():
    return model(torch.tensor(IDS)).logits.numpy()


def made_whole(model, directory):
  """The plain model with the weights that int8 ones stand for."""
  plain = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='eager'
  )
  for name, module in model.named_modules():
    if hasattr(module.__dict__.get('_parameters', {}).get('weight'), 'SCB'):
      w = module.weight
      whole = w.data.float() * w.SCB[:, None] / 127
      plain.get_submodule(name).weight.data = whole
  return plain.eval()


@pytest.mark.parametrize('kind', KINDS)
def test_its_checkpoints_load_and_compute_the_same(kind, source, tmp_path):
  model = quantised(source, kind)
  model.save_pretrained(tmp_path / 'theirs')
  apply, params = load_params(tmp_path / 'theirs')
  got = jax.jit(apply)(params, IDS)
  if kind == 'int8':
    model = made_whole(model, source)
  np.testing.assert_allclose(got, logits(model), atol=1e-4, rtol=1e-4)


def test_what_we_quantise_is_what_it_does(source, tmp_path):
  quantised(source, 'nf4').save_pretrained(tmp_path / 'theirs')
  _, theirs = load_params(tmp_path / 'theirs')
  _, ours = load_params(source, quant='nf4')
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if x.dtype == np.uint8:
      np.testing.assert_array_equal(x, y)
    else:  # the mean of the absmax is summed in another order there
      np.testing.assert_allclose(x, y, rtol=1e-6)
