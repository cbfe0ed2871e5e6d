"""config.json of either age of transformers as our configuration.

Reference: MistralConfig and LlamaConfig of transformers reading the same
mapping (left out where transformers is not installed), and for sizes the
published numbers of parameters.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_train import lora
from lorax_train.errors import ModelError
from lorax_train.formats import hf_config
from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig, RopeScaling

from .refusals import refusal

MISTRAL = {
  'model_type': 'mistral',
  'vocab_size': 61,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
  'rms_norm_eps': 1e-5,
  'rope_theta': 5000.0,
  'sliding_window': 6,
}
LLAMA = {**MISTRAL, 'model_type': 'llama'}
WANT = DecoderConfig(
  vocab=61, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=40,
  norm_eps=1e-5, rope_theta=5000.0, window=6,
)  # fmt: skip
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
LLAMA3_SCALING = RopeScaling('llama3', 8.0, 1.0, 4.0, 64)
# In the mapping of changes: take the key away.
ABSENT = object()


def changed(raw, changes):
  return {k: v for k, v in {**raw, **changes}.items() if v is not ABSENT}


# name -> base, changes of config.json, changes of our configuration.
ACCEPTED = {
  'theta of v4': (MISTRAL, {}, {}),
  'theta of v5': (
    MISTRAL,
    {
      'rope_theta': ABSENT,
      'rope_parameters': {'rope_theta': 7000.0, 'rope_type': 'default'},
    },
    {'rope_theta': 7000.0},
  ),
  'theta inside and outside': (
    MISTRAL,
    {'rope_parameters': {'rope_theta': 7000.0, 'rope_type': 'default'}},
    {'rope_theta': 7000.0},
  ),
  'theta outside, parameters without it': (
    MISTRAL,
    {'rope_parameters': {'rope_type': 'default'}},
    {},
  ),
  'theta a whole number': (
    MISTRAL,
    {'rope_theta': 1000000},
    {'rope_theta': 1e6},
  ),
  'no theta': (MISTRAL, {'rope_theta': ABSENT}, {'rope_theta': 10000.0}),
  'rope_scaling null': (MISTRAL, {'rope_scaling': None}, {}),
  'rope_parameters null': (MISTRAL, {'rope_parameters': None}, {}),
  'linear of v4': (
    LLAMA,
    {'rope_scaling': {'type': 'linear', 'factor': 4.0}},
    {'window': None, 'rope_scaling': RopeScaling('linear', 4.0)},
  ),
  'linear of v5': (
    LLAMA,
    {
      'rope_theta': ABSENT,
      'rope_parameters': {
        'rope_type': 'linear',
        'rope_theta': 5000.0,
        'factor': 4.0,
      },
    },
    {'window': None, 'rope_scaling': RopeScaling('linear', 4.0)},
  ),
  'llama3 of v4': (
    LLAMA,
    {'rope_scaling': LLAMA3},
    {'window': None, 'rope_scaling': LLAMA3_SCALING},
  ),
  'llama3 of v5': (
    LLAMA,
    {
      'rope_theta': ABSENT,
      'rope_parameters': {**LLAMA3, 'rope_theta': 5e5},
    },
    {'window': None, 'rope_theta': 5e5, 'rope_scaling': LLAMA3_SCALING},
  ),
  'llama3 with the length outside': (
    LLAMA,
    {'rope_scaling': LLAMA3, 'original_max_position_embeddings': 32},
    {
      'window': None,
      'rope_scaling': dataclasses.replace(
        LLAMA3_SCALING, original_max_positions=32
      ),
    },
  ),
  'rope_type beats type': (
    LLAMA,
    {'rope_scaling': {**LLAMA3, 'type': 'linear'}},
    {'window': None, 'rope_scaling': LLAMA3_SCALING},
  ),
  'rope_scaling beats rope_parameters': (
    LLAMA,
    {
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 9.0},
      'rope_scaling': {'rope_type': 'linear', 'factor': 4.0},
    },
    {'window': None, 'rope_scaling': RopeScaling('linear', 4.0)},
  ),
  'head_dim null': (MISTRAL, {'head_dim': None}, {}),
  'head_dim explicit, as in Nemo': (MISTRAL, {'head_dim': 6}, {'head_dim': 6}),
  'kv heads null': (
    LLAMA,
    {'num_key_value_heads': None},
    {'kv_heads': 4, 'window': None},
  ),
  'kv heads absent, Mistral': (
    MISTRAL,
    {'num_key_value_heads': ABSENT, 'num_attention_heads': 16},
    {'heads': 16, 'kv_heads': 8, 'head_dim': 2},
  ),
  'kv heads absent, Llama': (
    LLAMA,
    {'num_key_value_heads': ABSENT},
    {'kv_heads': 4, 'window': None},
  ),
  'window null': (MISTRAL, {'sliding_window': None}, {'window': None}),
  'window absent': (MISTRAL, {'sliding_window': ABSENT}, {'window': 4096}),
  'window 4096': (MISTRAL, {'sliding_window': 4096}, {'window': 4096}),
  'window of 1': (MISTRAL, {'sliding_window': 1}, {'window': 1}),
  'window on Llama is ignored': (LLAMA, {}, {'window': None}),
  'layers all slide': (
    MISTRAL,
    {'layer_types': ['sliding_attention'] * 2},
    {},
  ),
  'layers all full': (
    MISTRAL,
    {'layer_types': ['full_attention'] * 2, 'sliding_window': None},
    {'window': None},
  ),
  'layers of Llama all full': (
    LLAMA,
    {'layer_types': ['full_attention'] * 2},
    {'window': None},
  ),
  'tied': (MISTRAL, {'tie_word_embeddings': True}, {'tied': True}),
  'tied is false': (MISTRAL, {'tie_word_embeddings': False}, {}),
  'tied is absent': (LLAMA, {}, {'window': None}),
  'eps absent': (MISTRAL, {'rms_norm_eps': ABSENT}, {'norm_eps': 1e-6}),
  'init': (MISTRAL, {'initializer_range': 0.1}, {'init_std': 0.1}),
  'biases off': (
    LLAMA,
    {'attention_bias': False, 'mlp_bias': False},
    {'window': None},
  ),
  'what changes no maths': (
    MISTRAL,
    {
      'architectures': ['Odd'],
      'auto_map': {'AutoModel': 'x.py'},
      'torch_dtype': 'bfloat16',
      'dtype': 'float16',
      'use_cache': False,
      'attention_dropout': 0.0,
      'max_position_embeddings': 128,
      'quantization_config': None,
      'partial_rotary_factor': 1.0,
      'of_tomorrow': [1],
    },
    {},
  ),
}


@pytest.mark.parametrize('case', ACCEPTED)
def test_config_json_becomes_our_configuration(case, tmp_path):
  base, changes, ours = ACCEPTED[case]
  raw = changed(base, changes)
  want = dataclasses.replace(WANT, **ours)
  assert hf_config.config_from_hf(raw) == want
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  assert hf_config.read_config(tmp_path) == want


@pytest.mark.parametrize('case', ACCEPTED)
def test_transformers_reads_the_same_numbers(case):
  transformers = pytest.importorskip('transformers')
  base, changes, _ = ACCEPTED[case]
  raw = changed(base, changes)
  of = {
    'mistral': transformers.MistralConfig,
    'llama': transformers.LlamaConfig,
  }[raw['model_type']]
  # A deep copy, as transformers writes into the mappings it is given.
  theirs = of.from_dict(json.loads(json.dumps(raw)))
  theirs.standardize_rope_params()  # as its model does before it reads them
  ours = hf_config.config_from_hf(raw)
  rope, scaling = theirs.rope_parameters, ours.rope_scaling
  # Llama's modelling code never looks at a window.
  window = theirs.sliding_window if raw['model_type'] == 'mistral' else None
  want = {
    'vocab': theirs.vocab_size,
    'hidden': theirs.hidden_size,
    'layers': theirs.num_hidden_layers,
    'heads': theirs.num_attention_heads,
    'kv_heads': theirs.num_key_value_heads,
    'head_dim': theirs.head_dim,
    'mlp': theirs.intermediate_size,
    'norm_eps': theirs.rms_norm_eps,
    'rope_theta': rope['rope_theta'],
    'window': window,
    'tied': theirs.tie_word_embeddings,
    'init_std': theirs.initializer_range,
  }
  assert {k: getattr(ours, k) for k in want} == want
  assert rope['rope_type'] == ('default' if scaling is None else scaling.kind)
  if scaling is not None:
    assert scaling.factor == rope['factor']
  if rope['rope_type'] == 'llama3':
    names = ('low_freq_factor', 'high_freq_factor')
    assert {n: getattr(scaling, n) for n in names} == {
      n: rope[n] for n in names
    }
    original = rope['original_max_position_embeddings']
    assert scaling.original_max_positions == original


# name -> base, changes of config.json, words of the message.
REFUSED = {
  'rope of a kind unknown to all': (
    MISTRAL, {'rope_scaling': {'type': 'wibble'}}, "rope_type 'wibble'",
  ),
  'yarn': (
    MISTRAL,
    {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0}},
    'supported: default, linear, llama3',
  ),
  'dynamic': (
    LLAMA, {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "'dynamic'",
  ),
  'rope type a list': (MISTRAL, {'rope_scaling': {'type': []}}, 'rope_type []'),
  'rope type null': (
    MISTRAL, {'rope_scaling': {'rope_type': None}}, 'rope_type None',
  ),
  'linear without a factor': (
    LLAMA, {'rope_scaling': {'type': 'linear'}}, 'wants positive numbers for',
  ),
  'linear by 0': (
    LLAMA, {'rope_scaling': {'type': 'linear', 'factor': 0}}, 'factor',
  ),
  'llama3 without its length': (
    LLAMA,
    {'rope_scaling': changed(
      LLAMA3, {'original_max_position_embeddings': ABSENT})},
    'original_max_position_embeddings',
  ),
  'llama3 with equal factors': (
    LLAMA, {'rope_scaling': {**LLAMA3, 'low_freq_factor': 4.0}},
    'low_freq_factor is not below high_freq_factor',
  ),
  'llama3 with words': (
    LLAMA, {'rope_scaling': {**LLAMA3, 'factor': '8'}}, 'for factor',
  ),
  'rope by layer type': (
    MISTRAL,
    {'rope_parameters': {'sliding_attention': {'rope_theta': 1e6}}},
    'not one set for all layers',
  ),
  'rope a list': (MISTRAL, {'rope_parameters': [1]}, 'not one set'),
  'theta 0': (MISTRAL, {'rope_theta': 0}, 'rope_theta is 0'),
  'theta a word': (MISTRAL, {'rope_theta': 'big'}, "rope_theta is 'big'"),
  'theta infinite': (MISTRAL, {'rope_theta': math.inf}, 'rope_theta is inf'),
  'theta past any float': (MISTRAL, {'rope_theta': 10**400}, 'rope_theta is 1'),
  'half of each head turns': (
    MISTRAL, {'partial_rotary_factor': 0.5}, 'partial_rotary_factor 0.5',
  ),
  'gelu': (MISTRAL, {'hidden_act': 'gelu'}, "'gelu' is not supported"),
  'no activation': (MISTRAL, {'hidden_act': None}, 'hidden_act None'),
  'attention_bias': (LLAMA, {'attention_bias': True}, 'attention_bias is not'),
  'mlp_bias': (LLAMA, {'mlp_bias': True}, 'mlp_bias is not supported'),
  'another family': (
    MISTRAL, {'model_type': 'mixtral'},
    "model_type 'mixtral' is not supported; supported: mistral, llama",
  ),
  'no family': (MISTRAL, {'model_type': ABSENT}, 'model_type None'),
  'layers of two kinds': (
    MISTRAL,
    {'layer_types': ['full_attention', 'sliding_attention']},
    "layer_types ['full_attention']",
  ),
  'full layers beside a window': (
    MISTRAL, {'layer_types': ['full_attention'] * 2}, 'beside sliding',
  ),
  'sliding layers without a window': (
    MISTRAL,
    {'layer_types': ['sliding_attention'] * 2, 'sliding_window': None},
    'beside full_attention',
  ),
  'sliding layers of Llama': (
    LLAMA, {'layer_types': ['sliding_attention'] * 2}, 'beside full_attention',
  ),
  'layer_types a number': (MISTRAL, {'layer_types': 5}, "['5']"),
  'window of 0': (MISTRAL, {'sliding_window': 0}, 'sliding_window is 0'),
  'window a word': (
    MISTRAL, {'sliding_window': '4096'}, "sliding_window is '4096'",
  ),
  'window true': (MISTRAL, {'sliding_window': True}, 'sliding_window is True'),
  'window a fraction': (MISTRAL, {'sliding_window': 4.5}, 'is 4.5'),
  'GPTQ': (
    MISTRAL,
    {'quantization_config': {'quant_method': 'gptq', 'bits': 4}},
    'quantised (gptq)',
  ),
  'quantised without a method': (
    MISTRAL, {'quantization_config': {'bits': 4}}, 'quantised (in some way)',
  ),
  'quantised, a word': (MISTRAL, {'quantization_config': 'fp8'}, 'quantised'),
  'kv heads that do not divide': (
    MISTRAL, {'num_key_value_heads': 3},
    'num_attention_heads 4 is no multiple of num_key_value_heads 3',
  ),
  'more kv heads than heads': (
    MISTRAL, {'num_key_value_heads': 8}, 'is no multiple of',
  ),
  'head_dim odd': (MISTRAL, {'head_dim': 7}, 'head_dim 7 is odd'),
  'head_dim 0': (MISTRAL, {'head_dim': 0}, 'head_dim is 0'),
  'hidden a word': (MISTRAL, {'hidden_size': '32'}, "hidden_size is '32'"),
  'hidden a float': (MISTRAL, {'hidden_size': 32.0}, 'hidden_size is 32.0'),
  'layers true': (MISTRAL, {'num_hidden_layers': True}, 'is True'),
  'layers negative': (MISTRAL, {'num_hidden_layers': -2}, 'is -2'),
  'vocab 0': (MISTRAL, {'vocab_size': 0}, 'vocab_size is 0'),
  'eps negative': (MISTRAL, {'rms_norm_eps': -1e-5}, 'rms_norm_eps is -1e-05'),
  'eps a word': (MISTRAL, {'rms_norm_eps': '1e-5'}, "rms_norm_eps is '1e-5'"),
  'eps null': (MISTRAL, {'rms_norm_eps': None}, 'rms_norm_eps is None'),
  'tied a word': (
    MISTRAL, {'tie_word_embeddings': 'false'}, "tie_word_embeddings is 'false'",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_we_do_not_compute_is_refused_by_name(case):
  base, changes, words = REFUSED[case]
  message = refusal(hf_config.config_from_hf, changed(base, changes))
  assert message.startswith('config.json: ')
  assert words in message


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inside: (
    st.lists(inside, max_size=2)
    | st.dictionaries(
      st.sampled_from([*LLAMA3, 'rope_theta', 'type', 'quant_method', 'x']),
      inside,
      max_size=3,
    )
  ),
  max_leaves=4,
)
KEYS = [
  *LLAMA,
  *('head_dim', 'hidden_act', 'attention_bias', 'mlp_bias', 'layer_types'),
  *('rope_scaling', 'rope_parameters', 'partial_rotary_factor'),
  *('tie_word_embeddings', 'quantization_config', 'initializer_range'),
]


@settings(max_examples=300, deadline=None)
@given(
  base=st.sampled_from([MISTRAL, LLAMA]),
  changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2),
)
def test_any_value_is_understood_or_refused(base, changes):
  try:
    cfg = hf_config.config_from_hf({**base, **changes})
  except ModelError:
    return
  assert isinstance(cfg, DecoderConfig)
  for field in ('vocab', 'hidden', 'layers', 'heads', 'kv_heads', 'head_dim'):
    assert type(getattr(cfg, field)) is int
    assert getattr(cfg, field) > 0
  assert 0 < cfg.rope_theta < math.inf
  assert type(cfg.tied) is bool


def test_everything_wrong_is_listed_at_once():
  message = refusal(
    hf_config.config_from_hf, {'hidden_act': 'gelu', 'mlp_bias': True}
  )
  for words in (
    'model_type None',
    "hidden_act 'gelu'",
    'mlp_bias',
    'vocab_size is missing',
    'hidden_size is missing',
    'num_hidden_layers is missing',
    'num_attention_heads is missing',
    'intermediate_size is missing',
  ):
    assert words in message


# Bytes of config.json -> words of the message.
@pytest.mark.parametrize(('content', 'words'), [
  (None, 'no such file: is this a model?'),
  (b'', 'not JSON'),
  (b'{"model_type": "mistral"', 'not JSON'),
  (b'{"model_type": "mistr\xff"}', 'not JSON'),
  (b'[' * 100_000, 'not JSON'),
  (b'["mistral"]', 'not a JSON object'),
  (b'null', 'not a JSON object'),
])  # fmt: skip
def test_files_that_are_no_config(content, words, tmp_path):
  path = tmp_path / 'config.json'
  if content is not None:
    path.write_bytes(content)
  message = refusal(hf_config.read_config, tmp_path)
  assert message.startswith(f'{path}: ')
  assert words in message


# The published models: D, L, N, K, H, F, V, theta, window, parameters.
MODELS = {
  '7B v0.1': (4096, 32, 32, 8, 128, 14336, 32000, 1e4, 4096, 7_241_732_096),
  '7B v0.2': (4096, 32, 32, 8, 128, 14336, 32000, 1e6, None, 7_241_732_096),
  '7B v0.3': (4096, 32, 32, 8, 128, 14336, 32768, 1e6, None, 7_248_023_552),
  'Nemo': (5120, 40, 32, 8, 128, 14336, 131072, 1e6, None, 12_247_782_400),
  'Ministral': (4096, 36, 32, 8, 128, 12288, 131072, 1e8, 32768, 8_019_808_256),
  'Small': (5120, 40, 32, 8, 128, 32768, 131072, 1e8, None, 23_572_403_200),
  'TinyLlama': (2048, 22, 32, 4, 64, 5632, 32000, 1e4, None, 1_100_048_384),
}


def published(name):
  hidden, layers, heads, kv_heads, head_dim, mlp, vocab, theta, window, _ = (
    MODELS[name]
  )
  return hf_config.config_from_hf(
    {
      'model_type': 'llama' if name == 'TinyLlama' else 'mistral',
      'hidden_size': hidden,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'num_key_value_heads': kv_heads,
      'head_dim': head_dim,
      'intermediate_size': mlp,
      'vocab_size': vocab,
      'rope_theta': theta,
      'sliding_window': window,
    }
  )


@pytest.mark.parametrize('name', MODELS)
def test_numbers_of_parameters_of_published_models(name):
  assert params_lib.total(published(name)) == MODELS[name][-1]


# Model, targets, r -> trainable parameters, as published or by hand.
@pytest.mark.parametrize(('name', 'targets', 'rank', 'want'), [
  ('7B v0.1', 'q_proj,v_proj', 64, 27_262_976),
  ('7B v0.1', 'q_proj,v_proj', 8, 3_407_872),
  ('7B v0.1', 'all-linear', 16, 41_943_040),
  ('7B v0.1', 'all-linear', 64, 167_772_160),
  ('Nemo', 'q_proj,v_proj', 64, 39_321_600),
  ('Small', 'q_proj,v_proj', 64, 39_321_600),
  ('Ministral', 'q_proj,v_proj', 64, 30_670_848),
  ('Nemo', 'all-linear', 64, 228_065_280),
  ('Ministral', 'all-linear', 64, 174_587_904),
  ('Small', 'all-linear', 64, 369_623_040),
])  # fmt: skip
def test_numbers_of_trainable_parameters(name, targets, rank, want):
  cfg = published(name)
  frozen, trainable = jax.eval_shape(
    lambda key, params: lora.split(
      key, params, lora.LoraSpec(targets, rank), params_lib.module_names(cfg)
    ),
    jax.random.key(0),
    params_lib.abstract(cfg, jnp.bfloat16),
  )
  assert lora.count(frozen) == (want, MODELS[name][-1])
  assert sum(x.size for x in jax.tree.leaves(trainable)) == want
