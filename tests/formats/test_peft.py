"""Adapters in PEFT's format: which modules, how strong, to disk and back.

Reference: adapters, logits and the table of matching rules that PEFT itself
wrote (tests/golden, from scripts/make_golden.py). tests/parity asks PEFT live.
"""

import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorax_train import lora, parallel
from lorax_train.errors import ModelError
from lorax_train.formats import hf, hf_config, peft, peft_config
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.models.params import DecoderConfig

from .refusals import refusal

ADAPTERS = [
  'adapter_default',
  'adapter_patterns',
  'adapter_layers',
  'adapter_head',
  'train_end',
]


@pytest.fixture(scope='module')
def base(golden):
  """(cfg, params, names) of the golden model that the adapters are for."""
  directory = golden / 'mistral_window' / 'model'
  cfg = hf_config.read_config(directory)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = hf.load_params(directory, cfg, jnp.float32, mesh)
  return cfg, params, params_lib.module_names(cfg)


def attach(directory, base):
  """(loaded, frozen, trainable) of an adapter on the base."""
  _, params, names = base
  loaded = peft.load_adapter(directory)
  placed = peft.placement(loaded, names)
  frozen, trainable = lora.split(jax.random.key(0), params, placed, names)
  return loaded, frozen, peft.fill(loaded, frozen, trainable, names)


def same_trees(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize('name', ADAPTERS)
def test_logits_under_an_adapter_equal_pefts(name, base, golden):
  cfg, _, _ = base
  want = load_file(golden / 'mistral_window' / 'reference.safetensors')
  _, frozen, trainable = attach(golden / 'mistral_window' / name, base)
  logits = jax.jit(Decoder(cfg).apply)(
    {'params': lora.bind(frozen, trainable)}, want['ids']
  )
  np.testing.assert_allclose(logits, want[f'logits_{name}'], atol=1e-4, rtol=0)


# What a config says of the adapter; the rest says what it is not.
MEANING = [
  'alpha_pattern',
  'base_model_name_or_path',
  'bias',
  'fan_in_fan_out',
  'inference_mode',
  'layers_to_transform',
  'lora_alpha',
  'lora_dropout',
  'modules_to_save',
  'peft_type',
  'r',
  'rank_pattern',
  'task_type',
  'use_dora',
  'use_rslora',
]


@pytest.mark.parametrize('name', ADAPTERS)
def test_what_is_saved_again_is_what_peft_saved(name, base, golden, tmp_path):
  _, _, names = base
  source = golden / 'mistral_window' / name
  loaded, frozen, trainable = attach(source, base)
  peft.save_adapter(
    tmp_path / 'new', frozen, trainable, names, loaded.spec, loaded.base
  )
  assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == [
    'adapter_config.json',
    'adapter_model.safetensors',
  ]
  theirs = load_file(source / 'adapter_model.safetensors')
  ours = load_file(tmp_path / 'new' / 'adapter_model.safetensors')
  # Where the head is adapted, PEFT also writes the base's head.
  theirs.pop('base_model.model.lm_head.base_layer.weight', None)
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    assert ours[key].dtype == np.float32
    np.testing.assert_array_equal(ours[key], tensor)

  theirs = json.loads((source / 'adapter_config.json').read_text())
  text = (tmp_path / 'new' / 'adapter_config.json').read_text()
  ours = json.loads(text)
  assert {k: ours[k] for k in MEANING} == {k: theirs[k] for k in MEANING}
  for key in ('target_modules', 'exclude_modules'):
    assert sorted(ours[key] or []) == sorted(theirs[key] or [])
  # As PEFT writes JSON, so that the files differ in what they lack alone.
  assert text == json.dumps(ours, indent=2, sort_keys=True) + '\n'
  assert ours.keys() <= theirs.keys()

  again, _, trainable_again = attach(tmp_path / 'new', base)
  assert (again.spec, again.base) == (loaded.spec, 'golden/mistral_window')
  same_trees(trainable_again, trainable)


def test_the_frozen_half_may_be_shapes(base, tmp_path):
  cfg, params, names = base
  spec = lora.LoraSpec('q_proj', rank=2)
  _, trainable = lora.split(jax.random.key(1), params, spec, names)
  shapes, _ = jax.eval_shape(
    lambda key, params: lora.split(key, params, spec, names),
    jax.random.key(1),
    params_lib.abstract(cfg, jnp.float32),
  )
  peft.save_adapter(tmp_path, shapes, trainable, names, spec, 'b')
  _, _, again = attach(tmp_path, base)
  same_trees(again, trainable)


# The matching rules, as PEFT answered them.

TINY = DecoderConfig(16, 8, 3, 2, 1, 4, 8)
NAMES = params_lib.module_names(TINY)
FLAT = [name for of_stack in NAMES.values() for name in of_stack]
NORMS = [n for names in params_lib.norm_names(TINY).values() for n in names]

# Where we answer otherwise than PEFT, and why we may.
DIFFERENT = {
  'a norm is no linear': 'PEFT refuses; we know matrices only and pass it over,'
  ' as no such adapter exists (a spec of ours is strict, and refused)',
  'regex that takes a block': 'PEFT refuses; we take the linears in it, and'
  ' name each in full when we save',
  'tokens of a saved embedding': 'refused; PEFT wraps one in the other',
  'layers with a pattern': 'refused: layers_pattern is for models whose layers'
  ' are not called layers',
}


def matching_cases(golden):
  return json.loads((golden / 'peft_matching.json').read_text())['cases']


def write_config(directory, config):
  directory.mkdir(exist_ok=True)
  text = json.dumps({'peft_type': 'LORA', **config})
  (directory / 'adapter_config.json').write_text(text)
  return directory / 'adapter_config.json'


def ours_of(config, tmp_path):
  """({module: [rank, scale]}, {module: which rows are trained, None for all})."""
  spec = peft_config.read_config(write_config(tmp_path, config)).spec
  placed = lora.resolve(spec, FLAT, strict=False, others=NORMS)
  adapted = lora.adapted(placed)
  return (
    {name: [p.rank, p.scale] for name, p in adapted.items()},
    {name: p.rows for name, p in placed.items() if name not in adapted},
  )


def test_peft_matching_rules(golden, tmp_path):
  cases = {c['name']: c for c in matching_cases(golden)}
  assert len(cases) > 40
  assert DIFFERENT.keys() <= cases.keys()
  wrong = {}
  for name, case in cases.items():
    if name in DIFFERENT:
      continue
    whole = case.get('whole', {})
    want = (
      case.get('modules'),
      {name: rows and tuple(sorted(rows)) for name, rows in whole.items()},
    )
    try:
      got = ours_of(case['config'], tmp_path)
    except ValueError:
      got = None, {}
    if got != want:
      wrong[name] = (got, want, case.get('error'))
  assert not wrong


def test_where_we_differ_from_peft(golden, tmp_path):
  cases = {c['name']: c for c in matching_cases(golden)}

  def ours(name):
    return ours_of(cases[name]['config'], tmp_path)

  both = refusal(ours, 'tokens of a saved embedding', kind=ValueError)
  assert 'embed_tokens: trained by more than one entry of' in both
  assert "layers_pattern='layers'" in refusal(ours, 'layers with a pattern')
  assert cases['a norm is no linear']['error'] == 'ValueError'
  assert list(ours('a norm is no linear')[0]) == [
    f'model.layers.{i}.self_attn.q_proj' for i in range(3)
  ]
  assert cases['regex that takes a block']['error'] == 'ValueError'
  assert list(ours('regex that takes a block')[0]) == [
    n for n in FLAT if '.layers.1.' in n
  ]


# What a spec of ours may not do silently -> words of the message.
@pytest.mark.parametrize(('spec', 'words'), [
  ({'targets': 'q_proj,w1'}, "target 'w1'"),
  ({'targets': 'proj'}, "target 'proj'"),
  ({'targets': 'self_attn'}, "target 'self_attn'"),
  ({'targets': 'q_proj,norm'}, "target 'norm' (which modules_to_save could"),
  ({'modules_to_save': 'lm_head,w1'}, "modules_to_save 'w1'"),
  ({'trainable_token_indices': {'wte': (1,)}}, "trainable_token_indices 'wte'"),
  ({'targets': r'q_\w+'}, r"target 'q_\\w+'"),
  ({'exclude': 'proj'}, "exclude 'proj'"),
  ({'exclude': r'q_\w+'}, r"exclude 'q_\\w+'"),
  ({'exclude': 'q_proj'}, "targets 'q_proj' less exclusions"),
  ({'layers_to_transform': (1, 3)}, 'layer 3 of layers_to_transform'),
  ({'rank_pattern': {'v_proj': 2}}, "rank_pattern 'v_proj'"),
  ({'rank_pattern': {'layers.1': 2}}, "rank_pattern 'layers.1'"),
  ({'alpha_pattern': {'^layers.0.self_attn.q_proj': 2}}, 'alpha_pattern'),
])  # fmt: skip
def test_strict_refuses_what_has_no_effect(spec, words):
  spec = lora.LoraSpec(**{'targets': 'q_proj', **spec})
  message = refusal(lora.resolve, spec, FLAT, True, NORMS, kind=ValueError)
  assert words in message
  assert 'q_proj, k_proj, v_proj' in message


SPECS = {
  'list': {'targets': 'v_proj, q_proj'},
  'regex': {'targets': r'.*\.(q|v)_proj'},
  'regex like a name': {'targets': r'(?:model.layers.0.self_attn.q_proj)'},
  'all-linear': {'targets': 'all-linear', 'exclude': 'up_proj,k_proj'},
  'exclude a regex': {'targets': 'all-linear', 'exclude': r'.*\.mlp\..*'},
  'layers': {'targets': 'q_proj', 'layers_to_transform': (0, 2)},
  'the head': {'targets': 'q_proj,lm_head'},
  'rslora': {'variant': 'rslora', 'rank': 3, 'alpha': 5.0},
  'patterns': {
    'targets': 'all-linear',
    'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 6},
    'alpha_pattern': {'v_proj': 3.0},
  },
  # In order of the alphabet these two would be the other way round.
  'overlapping ranks': {
    'targets': 'q_proj,k_proj',
    'rank_pattern': {'q_proj': 2, 'layers.1.self_attn.q_proj': 6},
  },
  'overlapping alphas': {
    'targets': 'q_proj,k_proj',
    'alpha_pattern': {'k_proj': 6.0, '.*_proj': 2.0},
  },
  'overlapping, rslora': {
    'targets': 'q_proj,k_proj',
    'variant': 'rslora',
    'rank': 3,
    'rank_pattern': {'q_proj': 5, 'layers.1.self_attn.q_proj': 6},
    'alpha_pattern': {'q_proj': 7.0},
  },
  'regex over blocks': {'targets': r'.*layers\.1\..*'},
  'regex over everything': {'targets': '.*', 'exclude': 'lm_head'},
  'regex over norms': {'targets': r'.*(up_proj|norm)'},
  'the embedding': {'targets': 'v_proj,embed_tokens', 'variant': 'dora'},
  'trained whole': {
    'targets': r'.*_proj',
    'modules_to_save': 'norm,lm_head,model.layers.1.mlp.up_proj',
  },
  'tokens': {'trainable_token_indices': {'embed_tokens': (7, 1)}},
}


@pytest.mark.parametrize('case', SPECS)
def test_a_spec_survives_the_file(case, tmp_path):
  spec = lora.LoraSpec(**SPECS[case])
  want = lora.resolve(spec, FLAT, others=NORMS)
  others = params_lib.norm_names(TINY)
  config = peft_config.to_config(spec, NAMES, 'some/base', others)
  # PEFT writes the keys in order of the alphabet; ours must not need theirs.
  config = json.loads(json.dumps(config, sort_keys=True))
  again, name, _ = peft_config.read_config(write_config(tmp_path, config))
  assert name == 'some/base'
  got = lora.resolve(again, FLAT, strict=False, others=NORMS)
  assert got.keys() == want.keys()
  for module, place in want.items():
    if isinstance(place, lora.Whole):
      assert got[module] == place
      continue
    assert got[module].rank == place.rank
    assert got[module].dropout == place.dropout
    # alpha is scale * r again where modules are named in full: one rounding.
    assert got[module].scale == pytest.approx(place.scale, rel=1e-15)


# What PEFT's rules do with a regex that we write: see `DIFFERENT`.
@pytest.mark.parametrize(('targets', 'want'), [
  (r'.*\.[qv]_proj', r'.*\.[qv]_proj'),
  (r'.*layers\.1\..*', [n for n in sorted(FLAT) if '.layers.1.' in n]),
  ('all-linear', 'all-linear'),
  ('q_proj', ['q_proj']),
])  # fmt: skip
def test_a_regex_is_kept_where_peft_would_take_it(targets, want):
  config = peft_config.to_config(lora.LoraSpec(targets), NAMES, '')
  assert config['target_modules'] == want


@pytest.mark.parametrize(('alpha', 'want'), [
  (16.0, '16'), (16, '16'), (0.5, '0.5'), (1e9, '1000000000'),
])  # fmt: skip
def test_a_whole_alpha_is_written_as_one(alpha, want):
  config = peft_config.to_config(
    lora.LoraSpec('q_proj', alpha=alpha), NAMES, ''
  )
  assert json.dumps(config['lora_alpha']) == want


def test_a_list_of_targets_is_literal(tmp_path):
  config = {
    'target_modules': ['q_proj', '[kv]_proj', 'k_proj,v_proj', ' o_proj']
  }
  placed, _ = ours_of(config, tmp_path)
  assert {n.rpartition('.')[2] for n in placed} == {'q_proj'}


# Refusals.

KEY = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight'


@pytest.fixture
def adapter(tmp_path, golden):
  """A copy of a golden adapter, to be damaged."""
  directory = tmp_path / 'adapter'
  source = golden / 'mistral_window' / 'adapter_default'
  shutil.copytree(source, directory)
  return directory


def edit_config(directory, **changes):
  path = directory / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Changes of adapter_config.json -> words of the message.
@pytest.mark.parametrize(('changes', 'words'), [
  ({'use_qalora': True}, 'use_qalora=True'),
  ({'lora_bias': True}, 'lora_bias=True'),
  ({'bias': 'all'}, "bias='all'"),
  ({'bias': 'lora_only'}, "bias='lora_only'"),
  ({'modules_to_save': ['head[']}, "modules_to_save 'head['"),
  ({'modules_to_save': 'lm_head'}, "wrong kind: modules_to_save='lm_head'"),
  ({'fan_in_fan_out': True}, 'fan_in_fan_out=True'),
  ({'use_qalora': True}, 'use_qalora=True'),
  ({'use_bdlora': {'nblocks': 2}}, 'use_bdlora='),
  ({'trainable_token_indices': [1, 1]}, '(1, 1) is no list of different'),
  ({'trainable_token_indices': {'embed_tokens': 1}}, 'not iterable'),
  ({'trainable_token_indices': [[1]]}, 'is no list of different token ids'),
  ({'target_parameters': ['mlp.experts.down_proj']}, 'target_parameters='),
  ({'layer_replication': [[0, 2], [1, 2]]}, 'layer_replication='),
  ({'layers_pattern': 'h'}, "layers_pattern='h'"),
  ({'alora_invocation_tokens': [5]}, 'alora_invocation_tokens=[5]'),
  ({'arrow_config': {'top_k': 1}}, 'arrow_config='),
  ({'kasa_config': {'beta': 1e-4}}, 'kasa_config='),
  ({'monteclora_config': {'a': 1}}, 'monteclora_config='),
  ({'init_lora_weights': 'pissa'}, "'pissa', which changes the base"),
  ({'init_lora_weights': 'pissa_niter_4'}, "init_lora_weights='pissa_niter_4'"),
  ({'init_lora_weights': 'OLoRA'}, "init_lora_weights='OLoRA'"),
  ({'init_lora_weights': 'corda'}, "init_lora_weights='corda'"),
  ({'init_lora_weights': 'loftq'}, "init_lora_weights='loftq'"),
  ({'init_lora_weights': 'lora_ga'}, "init_lora_weights='lora_ga'"),
  ({'use_qalora': True, 'bias': 'all'}, "use_qalora=True, bias='all'"),
  ({'peft_type': 'LOHA'}, 'peft_type is not LORA'),
  ({'peft_type': None}, 'peft_type is not LORA'),
  ({'r': 0}, 'a rank of 0 is no integer above 0'),
  ({'r': '4'}, "wrong kind: r='4'"),
  ({'r': 4.0}, 'wrong kind: r=4.0'),
  ({'r': True}, 'wrong kind: r=True'),
  ({'r': None}, 'wrong kind: r=None'),
  ({'lora_alpha': '8'}, "lora_alpha='8'"),
  ({'lora_alpha': float('nan')}, 'lora_alpha=nan'),
  ({'lora_dropout': 'none'}, "lora_dropout='none'"),
  ({'lora_dropout': -0.1}, 'dropout -0.1 is outside'),
  ({'use_rslora': 'yes'}, "use_rslora='yes'"),
  ({'target_modules': 5}, 'target_modules=5'),
  ({'target_modules': [5]}, 'target_modules=[5]'),
  ({'target_modules': {'q_proj': 1}}, 'target_modules={'),
  ({'target_modules': '('}, 'no regular expression'),
  ({'exclude_modules': ['q_proj', None]}, 'exclude_modules='),
  ({'rank_pattern': ['q_proj']}, 'rank_pattern='),
  ({'rank_pattern': {'q_proj': '8'}}, 'rank_pattern='),
  ({'rank_pattern': {'q_proj(': 8}}, 'no regular expression'),
  ({'alpha_pattern': {'q_proj': [8]}}, 'alpha_pattern='),
  ({'alpha_pattern': {'q_proj': float('inf')}}, 'alpha_pattern='),
  ({'r': 10**400}, 'wrong kind: r=1'),
  ({'alpha_pattern': {'q_proj': 10**400}}, 'alpha_pattern='),
  ({'layers_to_transform': '1'}, "layers_to_transform='1'"),
  ({'layers_to_transform': ['1']}, "layers_to_transform=['1']"),
  ({'layers_to_transform': True}, 'layers_to_transform=True'),
  ({'base_model_name_or_path': 5}, 'base_model_name_or_path=5'),
])  # fmt: skip
def test_configs_that_are_refused(changes, words, adapter):
  edit_config(adapter, **changes)
  message = refusal(peft.load_adapter, adapter)
  assert message.startswith(f'{adapter / "adapter_config.json"}: ')
  assert words in message


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inside: (
    st.lists(inside, max_size=2)
    | st.dictionaries(st.text(max_size=3), inside, max_size=2)
  ),
  max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
  changes=st.dictionaries(
    st.sampled_from(
      [*peft_config._KINDS, *peft_config.MUST_BE_OFF, 'init_lora_weights']
    ),
    JSON,
    min_size=1,
    max_size=2,
  )
)
def test_any_value_is_understood_or_refused(changes):
  config = {'target_modules': ['q_proj'], 'r': 4, 'lora_alpha': 8, **changes}
  with tempfile.TemporaryDirectory() as directory:
    path = write_config(pathlib.Path(directory), config)
    try:
      spec = peft_config.read_config(path).spec
    except ModelError:
      return
    try:
      placed = lora.resolve(spec, FLAT, strict=False)
    except ValueError:
      return
  for place in lora.adapted(placed).values():
    assert type(place.rank) is int
    assert place.rank > 0
    assert np.isfinite(place.scale)
    assert 0 <= place.dropout < 1


# What PEFT writes where it is off, and what it does not matter for.
@pytest.mark.parametrize('changes', [
  {'use_bdlora': None, 'lora_bias': False, 'target_parameters': None},
  {'modules_to_save': [], 'layer_replication': [], 'layers_pattern': []},
  {'init_lora_weights': False},
  {'init_lora_weights': 'gaussian'},
  {'init_lora_weights': 'orthogonal'},
  {'init_lora_weights': 'eva'},
  {'loftq_config': {}, 'megatron_config': None, 'revision': 'main'},
  {'base_model_name_or_path': None},
  {'of_tomorrow': 1},
])  # fmt: skip
def test_configs_that_change_nothing(changes, adapter, base):
  want, _, _ = attach(adapter, base)
  edit_config(adapter, **changes)
  got, _, _ = attach(adapter, base)
  assert got.spec == want.spec


def test_what_has_no_effect_is_no_error_in_an_adapter_made_elsewhere(
  adapter, base
):
  _, _, want = attach(adapter, base)
  edit_config(
    adapter,
    target_modules=['q_proj', 'v_proj', 'w1'],
    exclude_modules=['x'],
    rank_pattern={'k_proj': 2},
  )
  _, _, got = attach(adapter, base)
  same_trees(got, want)


# File, bytes (None: take it away) -> words of the message.
@pytest.mark.parametrize(('file', 'content', 'words'), [
  ('adapter_config.json', None, 'no such file: is this an adapter?'),
  ('adapter_config.json', b'{"peft_type": ', 'not JSON'),
  ('adapter_config.json', b'\xff\xfe', 'not JSON'),
  ('adapter_config.json', b'[' * 100_000, 'not JSON'),
  ('adapter_config.json', b'[]', 'not a JSON object'),
  ('adapter_config.json', b'{}', 'peft_type is not LORA'),
  ('adapter_model.safetensors', None, 'no such file'),
  ('adapter_model.safetensors', b'', 'damaged or not complete'),
  ('adapter_model.safetensors', b'version https://git-lfs.github.com/spec/v1',
   'Git LFS pointer'),
])  # fmt: skip
def test_files_that_are_no_adapter(file, content, words, adapter):
  path = adapter / file
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  message = refusal(peft.load_adapter, adapter)
  assert message.startswith(f'{path}: ')
  assert words in message


def test_an_adapter_cut_short(adapter):
  path = adapter / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  assert f'{path}: damaged' in refusal(peft.load_adapter, adapter)


def edit_tensors(directory, change):
  path = directory / 'adapter_model.safetensors'
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


def drop(key):
  return lambda tensors: tensors.pop(key)


def put(key, value):
  return lambda tensors: tensors.update({key: value})


def poke(key, value):
  return lambda tensors: tensors[key].__setitem__((1, 2), value)


A0, B0, A1, B1 = (KEY.format(i, half) for i in (0, 1) for half in 'AB')
Q1 = 'model.layers.1.self_attn.q_proj'


# What is done to the tensors -> words of the message.
@pytest.mark.parametrize(('change', 'words'), [
  (drop(B1), f'{Q1}: lora_B is missing'),
  (drop(A1), f'{Q1}: lora_A is missing'),
  (lambda t: t.clear(), 'no adapter in it'),
  (put(A1, np.zeros((3, 32), np.float32)), f'{Q1}: A (3, 32) and B (32, 4) do'),
  (poke(A1, np.nan), f'{Q1}: not finite'),
  (poke(B1, np.inf), f'{Q1}: not finite'),
  (put(A1, np.zeros((4, 32), np.int8)), f'{A1} int8[4, 32]'),
  (put(A1, np.zeros((4, 32, 1), np.float32)), f'{A1} float32[4, 32, 1]'),
  (put('x.lora_A.weight', np.zeros((4, 32), np.float32)),
   'not parts of a LoRA adapter: x.lora_A.weight'),
  (put(A0.replace('.weight', '.default.weight'), np.zeros((4, 32), np.float32)),
   'lora_A.default.weight'),
  (put(B0.replace('.weight', '.bias'), np.zeros(32, np.float32)), 'lora_B.bias'),
  (put(A0.replace('lora_A.weight', 'lora_magnitude_vector'),
       np.zeros(32, np.float32)), 'lora_magnitude_vector is there, but not by'),
  (put('base_model.model.model.embed_tokens.lora_embedding_A',
       np.zeros((4, 61), np.float32)), 'embed_tokens: lora_B is missing'),
  (put('base_model.model.lm_head.weight', np.zeros((61, 32), np.float32)),
   'that neither modules_to_save nor trainable_token_indices name (of a'),
])  # fmt: skip
def test_tensors_that_are_no_adapter(change, words, adapter):
  edit_tensors(adapter, change)
  message = refusal(peft.load_adapter, adapter)
  assert message.startswith(f'{adapter / "adapter_model.safetensors"}: ')
  assert words in message


def test_all_damaged_factors_are_listed_at_once(adapter):
  edit_tensors(adapter, lambda t: (t.pop(B0), t[A1].fill(np.nan)))
  message = refusal(peft.load_adapter, adapter)
  assert 'layers.0.self_attn.q_proj: lora_B is missing' in message
  assert f'{Q1}: not finite' in message


def add_module(name, r=4, n_in=32, n_out=32):
  key = f'base_model.model.{name}.lora_'
  return lambda tensors: tensors.update({
    f'{key}A.weight': np.zeros((r, n_in), np.float32),
    f'{key}B.weight': np.zeros((n_out, r), np.float32),
  })  # fmt: skip


# An adapter that is sound but not for this model -> words of the message.
@pytest.mark.parametrize(('config', 'change', 'words'), [
  ({}, add_module('model.layers.2.self_attn.q_proj'),
   'not targets: model.layers.2.self_attn.q_proj'),
  ({}, add_module('model.layers.0.self_attn.k_proj', n_out=16),
   'not targets: model.layers.0.self_attn.k_proj'),
  ({}, add_module('model.layers.0.mlp.experts.base_layer'), 'not targets'),
  ({}, lambda t: (t.pop(A1), t.pop(B1)),
   f'{Q1} has rank 4 by adapter_config.json, but 0'),
  ({'r': 8}, lambda t: None, f'{Q1} has rank 8 by adapter_config.json, but 4'),
  # Nothing of that size may be made before it is refused.
  ({'r': 10**12}, lambda t: None, 'has rank 1000000000000 by'),
  ({'rank_pattern': {'q_proj': 2}}, lambda t: None, f'{Q1} has rank 2 by'),
  ({}, add_module(Q1, n_in=40), f'{Q1} wants A and B^T [(4, 32), (4, 32)], got [(4, 40), (4, 32)]'),
  ({}, add_module(Q1, n_out=16), f'{Q1} wants'),
  ({'target_modules': ['w1']}, lambda t: None, 'matched no module'),
])  # fmt: skip
def test_adapters_of_another_model(config, change, words, adapter, base):
  edit_config(adapter, **config)
  edit_tensors(adapter, change)
  message = refusal(attach, adapter, base)
  assert message.startswith('adapter does not fit the model: ')
  assert words in message


@pytest.mark.parametrize('stored', ['float16', 'bfloat16', 'float64'])
def test_factors_in_other_floats_become_float32(stored, adapter, base):
  _, _, want = attach(adapter, base)
  dtype = jnp.dtype(stored)
  edit_tensors(
    adapter, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()})
  )
  _, _, got = attach(adapter, base)
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(dtype).astype(np.float32), want
  )
  same_trees(got, rounded)


def test_ranks_that_differ_within_a_stack_are_padded_and_cut(base, tmp_path):
  _, params, names = base
  spec = lora.LoraSpec(
    'q_proj', rank=3, rank_pattern={'layers.1.self_attn.q_proj': 5}
  )
  frozen, trainable = lora.split(jax.random.key(2), params, spec, names)
  peft.save_adapter(tmp_path, frozen, trainable, names, spec, '')
  tensors = load_file(tmp_path / 'adapter_model.safetensors')
  shapes = {k: v.shape for k, v in tensors.items()}
  assert shapes == {A0: (3, 32), B0: (32, 3), A1: (5, 32), B1: (32, 5)}
  _, _, again = attach(tmp_path, base)
  same_trees(again, trainable)


def test_a_head_that_peft_saved_along_must_be_the_models(
  base, golden, tmp_path
):
  source = golden / 'mistral_window' / 'adapter_head'
  directory = tmp_path / 'adapter'
  shutil.copytree(source, directory)
  loaded, _, _ = attach(directory, base)
  assert list(loaded.carried) == ['lm_head']
  file = directory / 'adapter_model.safetensors'
  tensors = load_file(file)
  tensors['base_model.model.lm_head.base_layer.weight'][0, 0] += 1
  save_file(tensors, file)
  with pytest.raises(ModelError, match='made on another lm_head'):
    attach(directory, base)
