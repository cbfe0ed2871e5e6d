"""Embeddings, heads, and what is trained whole, against PEFT.

Reference: PEFT on torch from its own initial state, float32: logits, gradients,
ten steps of AdamW, and both read what the other wrote. On bases that tie the
head to the embedding too.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_train import lora, parallel
from lorax_train.errors import ModelError
from lorax_train.formats import hf, hf_config, hf_save, peft
from lorax_train.infer.load import load_model, load_params
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.train import step as step_lib

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from . import reference  # noqa: E402

pytestmark = [
  pytest.mark.filterwarnings('ignore:Model has `tie_word_embeddings'),
  pytest.mark.filterwarnings('ignore:Model with `tie_word_embeddings'),
]
STEPS, LEARNING_RATE, DECAY = 10, 1e-2, 0.01
PATTERNS = {
  'rank_pattern': {'embed_tokens': 2, 'lm_head': 6},
  'alpha_pattern': {'embed_tokens': 3},
}
# name: (base ties its head, LoraConfig keywords)
CASES = {
  'head': (False, {'target_modules': ['q_proj', 'lm_head']}),
  'embedding': (False, {'target_modules': ['q_proj', 'embed_tokens']}),
  'embedding, dora': (
    False,
    {'target_modules': ['q_proj', 'embed_tokens'], 'use_dora': True},
  ),
  'both, patterns, rslora': (
    False,
    {
      'target_modules': ['q_proj', 'embed_tokens', 'lm_head'],
      'use_rslora': True,
      **PATTERNS,
    },
  ),
  'saved head': (False, {'modules_to_save': ['lm_head']}),
  'saved norms': (False, {'modules_to_save': ['norm']}),
  'saved norm of one layer': (
    False,
    {'modules_to_save': ['layers.1.input_layernorm', 'model.norm']},
  ),
  'saved embedding and head': (
    False,
    {'modules_to_save': ['embed_tokens', 'lm_head']},
  ),
  'saved linear of two layers': (
    False,
    {'modules_to_save': ['layers.0.mlp.up_proj', 'layers.2.mlp.up_proj']},
  ),
  'tokens': (False, {'trainable_token_indices': [7, 3, 80]}),
  'tokens and norms': (
    False,
    {
      'modules_to_save': ['norm'],
      'trainable_token_indices': {'embed_tokens': [3, 7]},
    },
  ),
  'tied, embedding alone': (
    True,
    {'target_modules': ['q_proj', 'embed_tokens']},
  ),
  'tied, head alone': (True, {'target_modules': ['q_proj', 'lm_head']}),
  'tied, both as one': (
    True,
    {
      'target_modules': ['q_proj', 'embed_tokens'],
      'ensure_weight_tying': True,
    },
  ),
  'tied, both as one, patterns': (
    True,
    {
      'target_modules': ['q_proj', 'embed_tokens'],
      'ensure_weight_tying': True,
      'rank_pattern': {'embed_tokens': 2, 'lm_head': 2},
      'alpha_pattern': {'embed_tokens': 5, 'lm_head': 5},
    },
  ),
  'tied, saved head alone': (True, {'modules_to_save': ['lm_head']}),
  'tied, saved as one': (
    True,
    {'modules_to_save': ['embed_tokens'], 'ensure_weight_tying': True},
  ),
  'tied, tokens': (True, {'trainable_token_indices': [7, 3]}),
}
IDS = np.concatenate(
  [reference.random_ids(5, shape=(2, 12)), [[3, 7] * 6]]
).astype(np.int32)


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  """{whether the head is tied: a base}."""

  def base(tied):
    model = reference.make_model(11, sliding_window=5, tie_word_embeddings=tied)
    return reference.save_model(model, tmp_path_factory.mktemp('base'))

  return {tied: base(tied) for tied in (False, True)}


def their_adapter(directory, config):
  """PEFT's model at its start."""
  keywords = {'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj'], **config}
  torch.manual_seed(3)
  return their_peft.get_peft_model(
    reference.load_model(directory),
    their_peft.LoraConfig(task_type='CAUSAL_LM', **keywords),
  )


def key_of(name):
  """What PEFT calls a parameter in its files."""
  name = name.replace('.modules_to_save.default', '').replace('.default', '')
  return name.removesuffix('.weight') if 'magnitude_vector' in name else name


def named(model, value):
  """{key: array} of what is trained."""
  found = {}
  for name, weight in model.named_parameters():
    if weight.requires_grad:
      found[key_of(name)] = value(weight).detach().numpy()
  return found


class Ours:
  """Our model under the adapter that PEFT began with."""

  def __init__(self, directory, adapter):
    loaded = peft.load_adapter(adapter)
    cfg = hf_config.read_config(directory)
    self.cfg, self.loaded, placed = peft.on_model(loaded, cfg)
    self.names = params_lib.module_names(self.cfg)
    self.norms = params_lib.norm_names(self.cfg)
    self.params = hf.load_params(
      directory,
      self.cfg,
      jnp.float32,
      parallel.make_mesh(devices=jax.devices()[:1]),
    )
    self.every = {**self.names, **self.norms}
    self.frozen, self.trainable = peft.attach(
      self.loaded, placed, self.cfg, self.params
    )
    model = Decoder(self.cfg)
    self.apply = lambda params, ids: model.apply({'params': params}, ids)

  def named(self, trainable):
    return peft.to_tensors(self.frozen, trainable, self.every)

  def loss(self, trainable):
    params = lora.bind(self.frozen, trainable)
    total, n = step_lib.next_token_loss(self.apply(params, IDS), IDS)
    return total / n


def save(model, directory):
  """PEFT's files."""
  model.save_pretrained(directory)
  return directory


@pytest.mark.parametrize('case', CASES)
def test_it_computes_and_learns_as_pefts(case, directories, tmp_path):
  tied, config = CASES[case]
  model = their_adapter(directories[tied], config)
  ours = Ours(directories[tied], save(model, tmp_path / 'start'))
  as_one = tied and ours.cfg.tied

  # --- the function and its gradients
  step = jax.jit(jax.value_and_grad(ours.loss))
  logits = ours.apply(lora.bind(ours.frozen, ours.trainable), IDS)
  np.testing.assert_allclose(
    logits, reference.logits(model, IDS), atol=1e-4, rtol=0
  )
  reference.loss(model, IDS).backward()
  want = named(model, lambda w: w.grad)
  if as_one:
    want = sum_of_tied(want)
  got = ours.named(step(ours.trainable)[1])
  if tokens := config.get('trainable_token_indices'):
    tokens = tokens if isinstance(tokens, list) else tokens['embed_tokens']
    rows = next(key for key in want if 'trainable_tokens' in key)
    want[rows] = want[rows][np.argsort(tokens)]
  assert got.keys() == want.keys()
  for name in want:
    error = np.linalg.norm(got[name] - want[name])
    assert error <= 1e-4 * np.linalg.norm(want[name]) + 1e-7, name
  if as_one:
    return  # torch keeps two moments of the same number, and steps twice

  # --- ten steps
  reference.train(model, IDS, STEPS, LEARNING_RATE, DECAY)
  tx = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
  trainable, state = ours.trainable, tx.init(ours.trainable)
  for _ in range(STEPS):
    _, grads = step(trainable)
    updates, state = tx.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
  want, got = named(model, lambda w: w), ours.named(trainable)
  if tokens:
    want[rows] = want[rows][np.argsort(tokens)]
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-3, err_msg=name)

  # --- the function of where theirs ended
  end = Ours(directories[tied], save(model, tmp_path / 'end'))
  want = reference.logits(model, IDS)
  for how in (lora.bind, lora.merge):
    got = end.apply(how(end.frozen, end.trainable), IDS)
    np.testing.assert_allclose(got, want, atol=1e-4)


def sum_of_tied(grads):
  """Gradients of the head's part added to those of the embedding's."""
  one = {k: v for k, v in grads.items() if 'lm_head' not in k}
  swapped = {'lora_A.weight': 'embedding_B', 'lora_B.weight': 'embedding_A'}
  for key, value in grads.items():
    if 'lm_head' in key:
      end = next((e for e in swapped if key.endswith(e)), None)
      other = next(
        k for k in one if 'embed_tokens' in k and swapped.get(end, '') in k
      )
      one[other] = one[other] + (value.T if end else value)
  return one


@pytest.mark.parametrize('case', CASES)
def test_each_reads_what_the_other_wrote(case, directories, tmp_path):
  tied, config = CASES[case]
  base = directories[tied]
  model = their_adapter(base, config)
  ours = Ours(base, save(model, tmp_path / 'start'))
  grads = jax.grad(ours.loss)(ours.trainable)
  moved = jax.tree.map(lambda x, g: x - 0.5 * g, ours.trainable, grads)
  moved = jax.tree.map(lambda x, g: x + 0.1 * jnp.sign(g), moved, grads)
  want = ours.apply(lora.bind(ours.frozen, moved), IDS)
  assert np.abs(want - ours.apply(ours.params, IDS)).max() > 0.1

  # --- PEFT reads ours
  written = tmp_path / 'ours'
  peft.save_adapter(
    written,
    ours.frozen,
    moved,
    ours.names,
    ours.loaded.spec,
    str(base),
    ours.norms,
    tied=ours.cfg.tied,
  )
  theirs = their_peft.PeftModel.from_pretrained(
    reference.load_model(base), written
  ).eval()
  np.testing.assert_allclose(reference.logits(theirs, IDS), want, atol=1e-4)

  # --- we read ours, and what PEFT writes of it
  for adapter in (written, save(theirs, tmp_path / 'theirs')):
    loaded = load_model(base, adapter=str(adapter))
    np.testing.assert_allclose(
      loaded.apply(loaded.params, IDS), want, atol=1e-4
    )
    assert loaded.cfg.tied == ours.cfg.tied

  # --- merged into a directory, which says whether its head is tied
  hf_save.save_params(tmp_path / 'merged', base, loaded.params)
  apply, params = load_params(tmp_path / 'merged')
  np.testing.assert_allclose(apply(params, IDS), want, atol=1e-4)
  again = reference.load_model(tmp_path / 'merged')
  np.testing.assert_allclose(reference.logits(again, IDS), want, atol=1e-4)
  said = json.loads((tmp_path / 'merged/config.json').read_text())
  assert said.get('tie_word_embeddings', False) == ours.cfg.tied


def test_a_pattern_of_a_tied_embedding_is_the_heads_too(directories, tmp_path):
  base, cfg = directories[True], hf_config.read_config(directories[True])
  names, spec = params_lib.module_names(cfg), lora.LoraSpec(
    'q_proj,embed_tokens',
    rank=4,
    rank_pattern={'embed_tokens': 2},
    alpha_pattern={'embed_tokens': 9.0},
  )  # fmt: skip
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = hf.load_params(base, cfg, jnp.float32, mesh)
  frozen, trainable = lora.split(
    jax.random.key(0), params, spec, names, params_lib.layout(cfg)
  )
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)
  peft.save_adapter(
    tmp_path, frozen, trainable, names, spec, str(base), tied=True
  )
  theirs = their_peft.PeftModel.from_pretrained(
    reference.load_model(base), tmp_path
  ).eval()
  loaded = load_model(base, adapter=str(tmp_path))
  assert loaded.cfg.tied
  want = reference.logits(theirs, IDS)
  np.testing.assert_allclose(loaded.apply(loaded.params, IDS), want, atol=1e-4)


def test_a_tied_head_of_another_scale_is_refused(directories, tmp_path):
  model = their_adapter(
    directories[True],
    {
      'target_modules': ['q_proj', 'embed_tokens'],
      'ensure_weight_tying': True,
      'alpha_pattern': {'lm_head': 32},
    },
  )
  with pytest.raises(ModelError, match='lm_head is tied to model'):
    load_model(directories[True], adapter=str(save(model, tmp_path)))


@pytest.mark.parametrize(('config', 'words'), [
  (
    {'target_modules': ['q_proj', 'lm_head'], 'trainable_token_indices': [3]},
    'rows of embed_tokens are trained beside a lm_head',
  ),
  ({'trainable_token_indices': {'lm_head': [3]}}, 'rows of lm_head alone'),
])  # fmt: skip
def test_what_pefts_wrappers_do_to_each_other_is_refused(
  config, words, directories, tmp_path
):
  model = their_adapter(directories[True], config)
  with pytest.raises(ModelError, match=words):
    load_model(directories[True], adapter=str(save(model, tmp_path)))
