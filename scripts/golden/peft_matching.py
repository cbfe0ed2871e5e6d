"""Which modules PEFT adapts or trains whole, with which rank and scale: a table.

PEFT itself is asked: each combination is put on a tiny Mistral without
weights (meta device, 3 layers), and rank and scaling are read off its modules.
"""

import json
import pathlib
import warnings

import peft
import torch
import transformers

LAYERS = 3

# LoraConfig keywords. r is 4 and lora_alpha 8 unless they say otherwise.
CASES = {
  'list': {'target_modules': ['q_proj', 'v_proj']},
  'default targets': {},
  'list with the head': {'target_modules': ['q_proj', 'lm_head']},
  'embedding': {'target_modules': ['embed_tokens']},
  'suffix with a dot': {'target_modules': ['self_attn.q_proj']},
  'suffix with a layer': {'target_modules': ['layers.1.self_attn.q_proj']},
  'full path': {'target_modules': ['model.layers.2.mlp.down_proj']},
  'list entries are not regexes': {'target_modules': ['q_proj', '[kv]_proj']},
  'half of a name': {'target_modules': ['proj']},
  'one of two names matches': {'target_modules': ['q_proj', 'w1']},
  'nothing matches': {'target_modules': ['w1']},
  'a block is no linear': {'target_modules': ['self_attn']},
  'a norm is no linear': {'target_modules': ['q_proj', 'norm']},
  'regex': {'target_modules': r'.*\.[qv]_proj'},
  'regex must match in full': {'target_modules': r'q_proj'},
  'regex with layers': {
    'target_modules': r'model\.layers\.(0|2)\.(self_attn|mlp)\.\w+_proj'
  },
  'regex that takes a block': {'target_modules': r'.*layers\.1\..*'},
  'all-linear': {'target_modules': 'all-linear'},
  'All-Linear in capitals': {'target_modules': 'All-Linear'},
  'all-linear in a list': {'target_modules': ['all-linear']},
  'exclude a list': {
    'target_modules': 'all-linear',
    'exclude_modules': ['up_proj', 'layers.0.self_attn.o_proj'],
  },
  'exclude a regex': {
    'target_modules': ['q_proj', 'down_proj'],
    'exclude_modules': r'.*\.layers\.[12]\.mlp\..*',
  },
  'exclude half a name does nothing': {
    'target_modules': ['q_proj'],
    'exclude_modules': ['proj'],
  },
  'exclude everything': {
    'target_modules': ['q_proj'],
    'exclude_modules': ['q_proj'],
  },
  'layers': {
    'target_modules': ['q_proj', 'down_proj'],
    'layers_to_transform': [0, 2],
  },
  'layers as a number': {
    'target_modules': ['v_proj'],
    'layers_to_transform': 1,
  },
  'layers, empty list': {
    'target_modules': ['v_proj'],
    'layers_to_transform': [],
  },
  'layers with a pattern': {
    'target_modules': ['v_proj'],
    'layers_to_transform': [1],
    'layers_pattern': 'layers',
  },
  'layers with another pattern': {
    'target_modules': ['v_proj'],
    'layers_to_transform': [1],
    'layers_pattern': 'h',
  },
  'layers out of range': {
    'target_modules': ['v_proj'],
    'layers_to_transform': [3],
  },
  'layers with a regex': {
    'target_modules': r'.*\.q_proj',
    'layers_to_transform': [1],
  },
  'layers with all-linear': {
    'target_modules': 'all-linear',
    'layers_to_transform': [1],
  },
  'layers do not bind a full path': {
    'target_modules': ['q_proj', 'lm_head', 'model.layers.0.mlp.up_proj'],
    'layers_to_transform': [1],
  },
  'ranks and alphas': {
    'target_modules': ['q_proj', 'v_proj', 'down_proj'],
    'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 16},
    'alpha_pattern': {'v_proj': 3, 'self_attn.q_proj': 32},
  },
  'ranks and alphas, rslora': {
    'target_modules': ['q_proj', 'v_proj', 'down_proj'],
    'use_rslora': True,
    'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 16},
    'alpha_pattern': {'v_proj': 3, 'self_attn.q_proj': 32},
  },
  'pattern, narrow before wide': {
    'target_modules': ['q_proj', 'k_proj'],
    'rank_pattern': {'layers.1.self_attn.q_proj': 6, 'q_proj': 2},
  },
  'pattern, wide before narrow': {
    'target_modules': ['q_proj', 'k_proj'],
    'rank_pattern': {'q_proj': 2, 'layers.1.self_attn.q_proj': 6},
  },
  'pattern, a regex first': {
    'target_modules': ['q_proj', 'k_proj'],
    'rank_pattern': {r'.*_proj': 2, 'k_proj': 6},
    'alpha_pattern': {'k_proj': 6, r'.*_proj': 2},
  },
  'pattern, anchored': {
    'target_modules': ['q_proj', 'v_proj'],
    'rank_pattern': {r'^model\.layers\.0\.self_attn\.q_proj': 2},
    'alpha_pattern': {'^layers.0.self_attn.v_proj': 3},
  },
  'pattern, alternation': {
    'target_modules': 'all-linear',
    'rank_pattern': {r'q_proj|k_proj': 2, r'layers\.(0|2)\.mlp\.\w+': 6},
    'alpha_pattern': {r'^model\.layers\.1\..*|v_proj': 3},
  },
  'pattern, a dot is any character': {
    'target_modules': ['q_proj', 'o_proj'],
    'rank_pattern': {'q.proj': 2},
  },
  'pattern, half of a name': {
    'target_modules': ['up_proj', 'q_proj'],
    'rank_pattern': {'proj': 2, 'p_proj': 6},
    'alpha_pattern': {'_proj': 3},
  },
  'pattern, a block': {
    'target_modules': ['q_proj'],
    'rank_pattern': {'self_attn': 2, 'layers.1': 6},
  },
  'pattern, an untargeted module': {
    'target_modules': ['q_proj'],
    'rank_pattern': {'v_proj': 2},
  },
  'pattern, rank 0': {
    'target_modules': ['q_proj', 'v_proj'],
    'rank_pattern': {'v_proj': 0},
  },
  'pattern, broken regex': {
    'target_modules': ['q_proj'],
    'rank_pattern': {'q_proj(': 2},
  },
  'pattern, full path of the head': {
    'target_modules': ['q_proj', 'lm_head'],
    'rank_pattern': {'lm_head': 2},
    'alpha_pattern': {'^lm_head': 3},
  },
  'saved, the head': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['lm_head'],
  },
  'saved, the end of a name': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['norm'],
  },
  'saved, a full path': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['model.norm', 'layers.1.input_layernorm'],
  },
  'saved wins over a target': {
    'target_modules': 'all-linear',
    'modules_to_save': ['up_proj', 'layers.0.self_attn.o_proj'],
  },
  'saved wins over a regex': {
    'target_modules': r'.*_proj',
    'modules_to_save': ['k_proj', 'embed_tokens'],
  },
  'tokens': {
    'target_modules': ['q_proj'],
    'trainable_token_indices': [5, 3],
  },
  'tokens by name, and a saved norm': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['norm'],
    'trainable_token_indices': {'embed_tokens': [0, 2]},
  },
  'tokens of a saved embedding': {
    'target_modules': ['q_proj'],
    'modules_to_save': ['embed_tokens'],
    'trainable_token_indices': [1],
  },
}


def tiny_mistral():
  """A Mistral whose weights are never allocated."""
  config = transformers.MistralConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
  )
  with torch.device('meta'):
    return transformers.MistralForCausalLM(config)


def adapt(config: dict) -> dict:
  """What PEFT does to each module, or the error that it raises.

  `modules`: [r, scaling] of an adapter. `whole`: what is trained without one:
  the tokens whose rows are, null for all.
  """
  try:
    with warnings.catch_warnings(action='ignore'):
      lora = peft.LoraConfig(task_type='CAUSAL_LM', **config)
      model = peft.get_peft_model(tiny_mistral(), lora)
  except Exception as error:  # whatever PEFT raises is the reference
    return {'error': type(error).__name__}
  modules = {
    name.removeprefix('base_model.model.'): [
      module.r['default'],
      module.scaling['default'],
    ]
    for name, module in model.named_modules()
    if isinstance(module, peft.tuners.lora.LoraLayer)
  }
  wrappers = peft.utils.other.AuxiliaryTrainingWrapper
  whole = {
    name.removeprefix('base_model.model.'): (
      module.token_adapter.token_indices['default']
      if hasattr(module, 'token_adapter')
      else None
    )
    for name, module in model.named_modules()
    if isinstance(module, wrappers)
  }
  return {'modules': modules, **({'whole': whole} if whole else {})}


def make(path: pathlib.Path, versions: dict[str, str]) -> None:
  """Writes the table, a case a line.

  The keys of a pattern keep their order, since the first that matches wins.
  """
  rows = []
  for name, config in CASES.items():
    config = {'r': 4, 'lora_alpha': 8, **config}
    rows.append(json.dumps({'name': name, 'config': config, **adapt(config)}))
  cases = ',\n'.join(rows)
  head = json.dumps(versions, sort_keys=True)
  path.write_text(f'{{"versions": {head},\n"cases": [\n{cases}\n]}}\n')
