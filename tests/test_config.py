"""TrainConfig from mappings: what passes, and what each mistake is told.

Reference: the dataclasses themselves (round trip and introspection) and
tables of mistakes with the words that the one error line must hold.
"""

import copy
import dataclasses
import json
import re

import pytest

from lorax_train import config
from lorax_train.data import template
from lorax_train.errors import ConfigError
from lorax_train.train import optim

REQUIRED = {'model.path': 'some/model', 'data.path': 'rows.json'}
MIXTURE = (
  {'path': 'a.json', 'weight': 7},
  {'path': 'b.jsonl', 'template': 'Q: {a}{|} {b}'},
)
SECTIONS = {
  f.name: f.default_factory
  for f in dataclasses.fields(config.TrainConfig)
  if f.default_factory is not dataclasses.MISSING
}


def mapping(**changes):
  """defaults() with the required keys and changes, both by dotted key."""
  out = config.defaults()
  for key, value in {**REQUIRED, **changes}.items():
    *sections, last = key.split('.')
    where = out
    for section in sections:
      where = where[section]
    where[last] = value
  return out


def complaint(wrong):
  with pytest.raises(ConfigError) as error:
    config.from_mapping(wrong)
  text = str(error.value)
  assert '\n' not in text
  assert text.startswith('config: ')
  return text


def test_defaults_and_the_required_keys_make_a_configuration():
  given = mapping()
  cfg = config.from_mapping(given)
  assert config.to_mapping(cfg) == given
  assert config.from_mapping(config.to_mapping(cfg)) == cfg
  assert config.from_mapping(json.loads(json.dumps(given))) == cfg


def test_every_number_survives_the_round_trip():
  given = mapping()
  for name, keys in given.items():
    if name == 'mezo':  # refused beside another method
      continue
    for key, value in keys.items() if isinstance(keys, dict) else ():
      if isinstance(value, bool):
        keys[key] = not value
      elif isinstance(value, int):
        keys[key] = value + 2
      elif isinstance(value, float):
        keys[key] = value / 2 + 0.25
  assert config.to_mapping(config.from_mapping(given)) == given


def test_the_mapping_given_is_not_changed():
  given = mapping(**{'lora.alpha': 4})
  before = copy.deepcopy(given)
  config.from_mapping(given)
  assert given == before


@pytest.mark.parametrize(
  'partial',
  [
    {'model': {'path': 'some/model'}, 'data': {'path': 'rows.json'}},
    mapping(**{'lora.rank': None, 'train.clip_norm': None, 'method': None}),
    {**mapping(), 'lora': None, 'mesh': {}},
  ],
  ids=['left out', 'None', 'sections'],
)
def test_what_is_left_out_or_none_takes_its_default(partial):
  assert config.from_mapping(partial) == config.from_mapping(mapping())


def test_an_integer_is_taken_for_a_float_and_becomes_one():
  cfg = config.from_mapping(mapping(**{'lora.alpha': 32}))
  assert cfg.lora.alpha == 32.0
  assert type(cfg.lora.alpha) is float


# (key, value, what the line must hold besides the key)
MISTAKES = [
  # another type
  ('train.steps', True, ['True', 'bool', 'int']),
  ('train.steps', 10.0, ['10.0', 'float', 'int']),
  ('train.steps', '10', ["'10'", 'str', 'int']),
  ('train.learning_rate', '1e-4', ["'1e-4'", 'str', 'float']),
  ('train.learning_rate', False, ['False', 'bool', 'float']),
  ('lora.targets', ['q_proj'], ['list', 'str']),
  ('lora.rank_pattern', {'q_proj': 4}, ['dict', 'str']),
  ('model.path', 3, ['3', 'int', 'str']),
  ('run_dir', 3, ['3', 'int', 'str']),
  # out of range
  ('lora.rank', 0, ['0', 'below 1']),
  ('lora.dropout', -0.1, ['-0.1', 'below 0']),
  ('lora.dropout', 1.0, ['1.0', 'not below 1']),
  ('train.beta1', 1.0, ['1.0', 'not below 1']),
  ('train.beta2', 1, ['1.0', 'not below 1']),
  ('train.steps', -1, ['-1', 'below 1']),
  ('train.batch_size', 0, ['below 1']),
  ('train.grad_accum', 0, ['below 1']),
  ('train.warmup_steps', -1, ['below 0']),
  ('train.seed', -1, ['below 0']),
  ('train.clip_norm', -1.0, ['below 0']),
  ('data.max_length', 1, ['below 2']),
  ('mesh.fsdp', -2, ['below -1']),
  ('checkpoint.every', 0, ['below 1']),
  ('checkpoint.keep', 0, ['below 1']),
  ('eval.rows', -1, ['below 0']),
  # not a number
  ('train.learning_rate', float('nan'), ['nan', 'finite']),
  ('train.learning_rate', float('inf'), ['inf', 'finite']),
  ('lora.alpha', float('nan'), ['nan', 'finite']),
  ('lora.alpha', float('-inf'), ['-inf', 'finite']),
  ('lora.dropout', float('nan'), ['nan', 'finite']),
  # none of the choices
  ('model.dtype', 'float16', ['float16', 'bfloat16, float32', 'did you mean']),
  ('model.dtype', '', ['bfloat16, float32']),
  ('train.schedule', 'cosin', ['did you mean cosine?', 'constant, linear']),
  ('data.template', 'alpacka', ['did you mean alpaca?', 'uno_reverse']),
  ('data.template', 'my_module', ['none of alpaca', ', tokens']),
  ('data.packing', 1, ['1', 'int', 'bool']),
  ('data.packing', 'best', ["'best'", 'str', 'bool']),
  ('data.truncation', 'middle', ['drop, left, right, error']),
  ('data.cache', 'DIR', ["'DIR'", 'str', 'bool']),
  ('model.remat', 'some', ['auto, none, dots, mlp, full']),
  ('method', 'ful', ["'ful'", 'lora', 'did you mean full?']),
  ('model.quant', 'fp4', ["'fp4'", 'none, nf4, int8']),
  # not a section
  ('lora', 3, ['3', 'section']),
  ('mesh', '8', ["'8'", 'section']),
  # required
  ('model.path', '', ['required']),
  ('data.path', None, ['required']),
  ('run_dir', '', ['required']),
]


# (keys of data, what the line must hold)
BAD_DATA = [
  ({'path': '', 'mixture': ()}, ['data.path is required']),
  (
    {'mixture': MIXTURE},
    ['both given: empty one, as by --config.data.path='],
  ),
  # One alone without its comma, as ml_collections makes a tuple of it; a path
  # is not what is missing.
  (
    {'path': '', 'mixture': ('path',)},
    ['config: data.mixture is (', 'even one alone has a comma after it'],
  ),
  ({'mixture': 'a.json'}, ["'a.json', not a tuple of sections"]),
  # ({'path': 'a'}) without its comma is what Python makes a dict's keys of.
  ({'mixture': ('path',)}, ["not a tuple of sections ({'key': value},)"]),
  ({'mixture': {'path': 'a'}}, ['not a tuple of sections']),
  (
    {'path': '', 'mixture': ({'path': 'a', 'weight': 0.0},)},
    ['data.mixture[0].weight is 0.0, not above 0'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a'}, {'path': 'b', 'weight': -1})},
    ['data.mixture[1].weight is -1.0, not above 0'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a', 'weight': float('nan')},)},
    ['data.mixture[0].weight is nan, not a finite number'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a', 'weight': float('inf')},)},
    ['data.mixture[0].weight is inf, not a finite number'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a', 'weight': '1'},)},
    ["data.mixture[0].weight is '1', a str"],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a', 'wieght': 1},)},
    ['[0].wieght is no key, did you mean data.mixture[0].weight?'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a', 'template': 'alpacka'},)},
    ["data.mixture[0].template is 'alpacka'", 'did you mean alpaca?'],
  ),
  (
    {'path': '', 'mixture': ({'weight': 1.0},)},
    ['data.mixture[0].path is required'],
  ),
  (
    {'path': '', 'mixture': ({'path': 'a'}, {'path': 'b'}, {'path': 'a'})},
    ["data.mixture[2].path is 'a' with template 'alpaca' for a second time"],
  ),
  (
    {
      'path': '',
      'mixture': ({'path': 'a'}, {'path': 'a', 'template': 'alpaca'}),
    },
    ["data.mixture[1].path is 'a' with template 'alpaca' for a second time"],
  ),
  ({'buckets': '64', 'packing': True}, ['packing and data.buckets are both']),
  ({'buckets': '64,x'}, ["data.buckets '64,x' is not numbers"]),
  ({'buckets': '64,-1'}, ["data.buckets '64,-1' is not numbers"]),
  ({'buckets': '64,64'}, ["data.buckets '64,64' names a length twice"]),
  ({'buckets': '1,64'}, ['1 is not between 2 and max_length, 512']),
  ({'buckets': '64,513'}, ['513 is not between 2 and max_length, 512']),
  ({'buckets': 64}, ['data.buckets is 64, a int, not a str']),
]


@pytest.mark.parametrize(('keys', 'words'), BAD_DATA)
def test_a_wrong_data_section_is_told(keys, words):
  text = complaint(mapping(**{f'data.{k}': v for k, v in keys.items()}))
  for word in words:
    assert word in text


def test_a_mixture_is_what_it_says_in_any_form():
  given = mapping(**{'data.path': '', 'data.mixture': MIXTURE})
  cfg = config.from_mapping(given)
  whole = (
    config.Source('a.json', 7.0, ''),
    config.Source('b.jsonl', 1.0, 'Q: {a}{|} {b}'),
  )
  assert cfg.data.mixture == whole
  assert config.sources(cfg.data) == (
    config.Source('a.json', 7.0, 'alpaca'), whole[1],
  )  # fmt: skip
  written = config.to_mapping(cfg)
  assert config.from_mapping(written) == cfg
  assert config.from_mapping(json.loads(json.dumps(written))) == cfg
  # `--config.data.mixture=` empties it, as `--config.data.path=` does a path.
  none = mapping(**{'data.path': 'a', 'data.mixture': ('',)})
  assert config.from_mapping(none).data.mixture == ()


@pytest.mark.parametrize(
  ('text', 'want'),
  [('', ()), ('64', (64,)), ('256, 64,', (256, 64)), ('2,512', (2, 512))],
)
def test_buckets_are_lengths(text, want):
  cfg = config.from_mapping(mapping(**{'data.buckets': text}))
  assert config.buckets(cfg.data) == want


@pytest.mark.parametrize(('key', 'value', 'words'), MISTAKES)
def test_a_wrong_value_is_named(key, value, words):
  text = complaint(mapping(**{key: value}))
  for word in [key, *words]:
    assert word in text


UNKNOWN = [
  ('lora.rnk', 'did you mean lora.rank?'),
  ('lora.target', 'did you mean lora.targets?'),
  ('train.learning_rte', 'did you mean train.learning_rate?'),
  ('train.batchsize', 'did you mean train.batch_size?'),
  ('rundir', 'did you mean run_dir?'),
  ('loras', 'did you mean lora?'),
  ('lora.quux', None),
  ('quux', None),
]


@pytest.mark.parametrize(('key', 'hint'), UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_one(key, hint):
  text = complaint(mapping(**{key: 1}))
  assert f'{key} is no key' in text
  if hint:
    assert hint in text
  else:
    assert 'did you mean' not in text


def test_an_unknown_key_counts_even_where_it_is_none():
  assert 'lora.rnk is no key' in complaint(mapping(**{'lora.rnk': None}))


def test_a_key_that_is_no_string_is_named():
  assert '7 is no key' in complaint({**mapping(), 7: 1})


@pytest.mark.parametrize('whole', [None, 3, [('lora', {})], 'configs/x.py'])
def test_what_is_no_mapping_is_refused(whole):
  assert 'not a section of keys' in complaint(whole)


def test_all_mistakes_stand_in_one_line():
  text = complaint(
    {
      'model': {'dtype': 'f32', 'pth': 'x'},
      'lora': {'rnk': 4, 'rank': 'many', 'dropout': float('nan')},
      'train': {'steps': 0, 'seed': True, 'schedule': 'step'},
      'mesh': 3,
    }
  )
  for words in [
    "model.dtype is 'f32'",
    'model.pth is no key, did you mean model.path?',
    'model.path is required',
    'data.path is required',
    'lora.rnk is no key, did you mean lora.rank?',
    "lora.rank is 'many', a str, not a int",
    'lora.dropout is nan',
    'train.steps is 0, below 1',
    'train.seed is True, a bool, not a int',
    "train.schedule is 'step', none of constant, linear, cosine",
    'mesh is 3, not a section',
  ]:
    assert words in text
  assert text.count(';') == 10


# (keys of lora, attributes of the LoraSpec they become)
SPECS = [
  ({}, {'targets': 'q_proj,v_proj', 'rank': 8, 'rank_pattern': {}}),
  ({'targets': 'all-linear', 'rank': 4}, {'targets': 'all-linear', 'rank': 4}),
  (
    {'rank_pattern': 'down_proj=16, layers.0.*=4'},
    {'rank_pattern': {'down_proj': 16, 'layers.0.*': 4}},
  ),
  ({'alpha_pattern': 'q_proj=2.5'}, {'alpha_pattern': {'q_proj': 2.5}}),
  # A regex may hold an equals sign: the last one counts.
  ({'rank_pattern': '(?=q).*=4'}, {'rank_pattern': {'(?=q).*': 4}}),
  ({'rank_pattern': ' , '}, {'rank_pattern': {}}),
  ({'layers_to_transform': '0, 2,'}, {'layers_to_transform': (0, 2)}),
  ({'layers_to_transform': ' '}, {'layers_to_transform': ()}),
  ({'modules_to_save': 'lm_head, norm'}, {'modules_to_save': 'lm_head, norm'}),
  (
    {'trainable_token_indices': '7, 3'},
    {'trainable_token_indices': {'embed_tokens': (7, 3)}},
  ),
  (
    {'variant': 'rslora', 'exclude': 'lm_head', 'dropout': 0.5},
    {'variant': 'rslora', 'exclude': 'lm_head', 'dropout': 0.5},
  ),
]


@pytest.mark.parametrize(('keys', 'want'), SPECS)
def test_the_lora_section_as_a_spec(keys, want):
  cfg = config.from_mapping(
    mapping(**{f'lora.{k}': v for k, v in keys.items()})
  )
  spec = config.lora_spec(cfg.lora)
  assert {name: getattr(spec, name) for name in want} == want


# (keys of lora, what the line must hold)
BAD_SPECS = [
  ({'targets': ''}, 'targets is empty'),
  ({'targets': '(q'}, "'(q' is no regular expression"),
  ({'exclude': '*'}, "'*' is no regular expression"),
  ({'rank_pattern': 'q_proj'}, "'q_proj' is not REGEX=int"),
  ({'rank_pattern': 'q_proj=four'}, "'q_proj=four' is not REGEX=int"),
  ({'rank_pattern': 'q_proj=4.5'}, "'q_proj=4.5' is not REGEX=int"),
  ({'rank_pattern': '=4'}, "'=4' is not REGEX=int"),
  ({'rank_pattern': 'q_proj=0'}, 'rank of 0'),
  ({'rank_pattern': '(q=4'}, 'no regular expression'),
  ({'alpha_pattern': 'q_proj=x'}, "'q_proj=x' is not REGEX=float"),
  ({'alpha_pattern': 'q_proj=nan'}, "'q_proj=nan' is not REGEX=float"),
  ({'layers_to_transform': '0,x'}, "'0,x' is not numbers"),
  ({'layers_to_transform': '-1'}, "'-1' is not numbers"),
  ({'modules_to_save': '.*norm'}, "'.*norm' is no list of names"),
  ({'trainable_token_indices': '7,x'}, "'7,x' is not numbers"),
  ({'trainable_token_indices': '7,7'}, 'no list of different token ids'),
  (
    {'layers_to_transform': '0', 'targets': 'all-linear'},
    'layers_to_transform needs targets given as names',
  ),
]


@pytest.mark.parametrize(('keys', 'words'), BAD_SPECS)
def test_a_wrong_lora_section_is_told(keys, words):
  text = complaint(mapping(**{f'lora.{k}': v for k, v in keys.items()}))
  assert 'lora: ' in text
  assert words in text


@pytest.mark.parametrize(
  'cls',
  [config.TrainConfig, config.Source, *SECTIONS.values()],
  ids=lambda c: c.__name__,
)
def test_every_field_is_documented(cls):
  listed = cls.__doc__.partition('Attributes:')[2]
  documented = re.findall(r'^    (\w+): \S', listed, re.MULTILINE)
  assert documented == [field.name for field in dataclasses.fields(cls)]


def test_every_key_has_a_plain_type_and_a_default_of_it():
  flat = [
    (f'{section}.{key}', value)
    for section, keys in config.defaults().items()
    for key, value in (keys.items() if isinstance(keys, dict) else ())
  ]
  # So that ml_collections can parse an override, and None needs no type.
  assert len(flat) > 30
  assert {type(value) for _, value in flat} == {
    str, int, float, bool, tuple
  }  # fmt: skip


def test_the_optimizer_takes_its_numbers_from_the_train_section():
  wanted = {f.name for f in dataclasses.fields(optim.OptimConfig)} - {'full'}
  assert wanted <= {f.name for f in dataclasses.fields(config.TrainSection)}
  assert config.TrainSection().beta2 == optim.OptimConfig(1, 1.0).beta2


def test_the_templates_are_those_there_are():
  known = config.DataSection.__dataclass_fields__['template'].metadata
  assert known['choices'] == template.KNOWN
