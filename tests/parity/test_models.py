"""Our logits against transformers', live, on models made there.

Reference: MistralForCausalLM and LlamaForCausalLM of transformers on torch,
eager attention.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train.infer.load import load_params

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytest.importorskip('peft')

from . import reference  # noqa: E402

ATOL = 1e-4


def our_logits(directory, ids, mask=None, **kwargs):
  apply, params = load_params(directory, **kwargs)
  return np.asarray(jax.jit(apply)(params, ids, None, mask))


def rope(theta, rope_type='default', **scaling):
  return {
    'rope_parameters': {'rope_theta': theta, 'rope_type': rope_type, **scaling}
  }


# Family, config, options of save_pretrained.
MODELS = {
  'a window and grouped heads': ('mistral', {'sliding_window': 5}, {}),
  'heads wider than hidden, one key': (
    'mistral',
    {
      'num_key_value_heads': 1,
      'head_dim': 20,
      'sliding_window': None,
      **rope(1e6),
    },
    {},
  ),
  'heads narrower than hidden, tied': (
    'mistral',
    {'head_dim': 6, 'tie_word_embeddings': True, 'sliding_window': 3},
    {},
  ),
  'two and more shards': (
    'mistral',
    {'num_hidden_layers': 4, 'sliding_window': 16, **rope(1e8)},
    {'max_shard_size': '40KB'},
  ),
  'llama, every head its own key': (
    'llama',
    {'num_key_value_heads': 4, 'rms_norm_eps': 1e-6, **rope(5e5)},
    {},
  ),
  'llama 3.1, tied': (
    'llama',
    {
      'tie_word_embeddings': True,
      **rope(
        1e4,
        'llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
      ),
    },
    {'max_shard_size': '60KB'},
  ),
  'llama, stretched': ('llama', rope(1e4, 'linear', factor=2.5), {}),
}


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('case', MODELS)
def test_logits(case, seed, tmp_path):
  family, config, saving = MODELS[case]
  model = reference.make_model(seed, family, **config)
  reference.save_model(model, tmp_path, **saving)
  shards = len(list(tmp_path.glob('*.safetensors')))
  assert (shards > 1) == bool(saving)
  ids = reference.random_ids(seed)
  np.testing.assert_allclose(
    our_logits(tmp_path, ids), reference.logits(model, ids), atol=ATOL, rtol=0
  )


@pytest.mark.parametrize('window', [None, 4])
def test_logits_under_a_mask(window, tmp_path):
  model = reference.make_model(2, sliding_window=window)
  reference.save_model(model, tmp_path)
  ids = reference.random_ids(2)
  mask = np.ones(ids.shape, bool)
  mask[0, :5] = mask[1, -6:] = mask[2, 7:9] = False
  want = reference.logits(model, ids, mask)
  got = our_logits(tmp_path, ids, mask)
  # What is hidden has no logits that mean anything.
  np.testing.assert_allclose(got[mask], want[mask], atol=ATOL, rtol=0)


# Directory below ../shared/models, vocabulary.
@pytest.mark.parametrize(('name', 'vocab'), [
  ('tinystories-656k', 2048), ('stories260K-mistral', 512),
])  # fmt: skip
def test_real_weights(name, vocab, shared):
  directory = shared / 'models' / name
  if not directory.is_dir():
    pytest.skip(f'no {directory}')
  ids = reference.random_ids(3, vocab, (2, 64))
  want = reference.logits(reference.load_model(directory), ids)
  np.testing.assert_allclose(
    our_logits(directory, ids), want, atol=ATOL, rtol=0
  )


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_bfloat16_costs_what_it_costs_torch(seed, tmp_path):
  """The distance of both bfloat16 logits from the same float32 logits.

  Every product, norm, activation and sum is rounded to 8 bits, in the same
  places here and there, and over 10,000 logits the mean square of these
  errors says how many roundings there are. Ours must be no more than torch's,
  which rounds the logits too, and not so few that something was computed in
  float32 after all.
  """
  # Weights of a size that keeps activations near 1, exact in bfloat16.
  model = reference.make_model(
    seed, vocab_size=128, hidden_size=64, head_dim=16, intermediate_size=128
  )
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'norm' not in name:
        weight.mul_(4 * weight.shape[-1] ** -0.5)
  reference.save_model(model.to(torch.bfloat16), tmp_path)
  ids = reference.random_ids(seed, 128, (4, 24))
  exact = reference.logits(reference.load_model(tmp_path), ids)
  theirs = reference.logits(reference.load_model(tmp_path, 'bfloat16'), ids)
  np.testing.assert_allclose(our_logits(tmp_path, ids), exact, atol=ATOL)
  ours = our_logits(tmp_path, ids, dtype=jnp.bfloat16)

  def error(x):
    return np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2))

  assert 0.8 * error(theirs) < error(ours) < 1.1 * error(theirs)
  assert 2**-8 < error(theirs) < 2**-5
