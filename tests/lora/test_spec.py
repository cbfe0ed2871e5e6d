"""LoraSpec and resolve: what is refused, and how it is said.

PEFT's own matching is compared in tests/formats/test_peft.py, against the
table tests/golden/peft_matching.json.
"""

import pytest

from lorax_train.lora import LoraSpec, resolve
from lorax_train.lora.spec import target_list

NAMES = [
  *(f'model.layers.{i}.self_attn.{n}' for i in range(2) for n in 'qv'),
  'lm_head',
]


@pytest.mark.parametrize(
  ('text', 'names'),
  [
    ('q_proj', ['q_proj']),
    (' q_proj , v_proj, ', ['q_proj', 'v_proj']),
    ('layers.0.self_attn.q_proj', ['layers.0.self_attn.q_proj']),
    ('', []),
    (r'.*\.q_proj', None),
    ('q_proj|v_proj', None),
    ('all-linear', None),
  ],
)
def test_one_string_is_a_list_or_a_regex(text, names):
  assert target_list(text) == names


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'targets': ''}, 'targets is empty'),
    ({'targets': '(q'}, "'\\(q' is no regular expression"),
    ({'variant': 'adalora'}, "variant 'adalora' is not of"),
    ({'variant': 'rslora+'}, r"variant 'rslora\+' is not of"),
    ({'init': 'zeros'}, "init 'zeros' is none of"),
    ({'init': 'pissa', 'alpha': 0.0}, 'init pissa needs an alpha above 0'),
    ({'rank': 0}, 'rank: a rank of 0 is no integer above 0'),
    ({'rank': 2.0}, r'rank: a rank of 2\.0 is no integer above 0'),
    ({'alpha': float('inf')}, 'alpha: an alpha of inf is not finite'),
    ({'alpha_pattern': {'v': float('nan')}}, 'v: an alpha of nan is not'),
    ({'rank_pattern': {'v': 0}}, 'v: a rank of 0 is no integer above 0'),
    ({'dropout': 1.0}, r'dropout 1.0 is outside \[0, 1\)'),
    (
      {'targets': 'all-linear', 'layers_to_transform': (0,)},
      'layers_to_transform needs targets given as names',
    ),
    ({'rank': 0, 'dropout': -1}, 'rank of 0 is no integer above 0; dropout -1'),
  ],
)
def test_a_spec_that_makes_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    LoraSpec(**changes)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    # Everything that has no effect, at once, and what there is.
    (LoraSpec('q,w1,w2'), "target 'w1', target 'w2' matched no .*: q, v, lm_h"),
    (LoraSpec('q|v'), r"target 'q\|v' matched no module; there are: q, v, lm"),
    (LoraSpec('q', exclude='k'), "exclude 'k' matched no module"),
    (LoraSpec('q', exclude='q'), "targets 'q' less exclusions matched no"),
    (LoraSpec('q', rank_pattern={'v': 2}), "rank_pattern 'v' matched no"),
    (LoraSpec('q', alpha_pattern={'w': 2}), "alpha_pattern 'w' matched no"),
    (
      LoraSpec('q', layers_to_transform=(1, 7)),
      'layer 7 of layers_to_transform matched no',
    ),
  ],
)
def test_what_has_no_effect_is_an_error(spec, message):
  with pytest.raises(ValueError, match=message):
    resolve(spec, NAMES)


def test_all_linear_leaves_the_head_out():
  assert list(resolve(LoraSpec('all-linear'), NAMES)) == NAMES[:-1]


def test_foreign_adapters_may_name_what_is_not_there():
  spec = LoraSpec('q,w1', rank_pattern={'w2': 3})
  assert list(resolve(spec, NAMES, strict=False)) == [NAMES[0], NAMES[2]]
  with pytest.raises(ValueError, match='matched no module'):
    resolve(LoraSpec('w1'), NAMES, strict=False)
