"""The golden models: random weights, one batch each, and saving them."""

import dataclasses
import pathlib

import torch
import transformers

from . import files

MODELS = {
  'mistral': (transformers.MistralConfig, transformers.MistralForCausalLM),
  'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
DIMS = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'attn_implementation': 'eager',
}
BATCH = 2


def rope(theta: float, rope_type: str = 'default', **scaling) -> dict:
  """Rope parameters in the form of transformers 5, as config keywords."""
  parameters = {'rope_theta': theta, 'rope_type': rope_type, **scaling}
  return {'rope_parameters': parameters}


@dataclasses.dataclass(frozen=True)
class Case:
  """One model: what its config sets, and what must matter to its logits."""

  seed: int
  config: dict
  # Name -> config changes, each of which must move the logits.
  mistakes: dict[str, dict]
  family: str = 'mistral'
  length: int = 12
  legacy_config: bool = False
  masked: bool = False
  max_shard_size: str = '1MB'


CASES = {
  'mistral_window': Case(
    seed=1,
    config={'sliding_window': 4, **rope(5000.0)},
    mistakes={
      'no window': {'sliding_window': None},
      'window 3': {'sliding_window': 3},
      'window 5': {'sliding_window': 5},
      'theta 1e4': rope(1e4),
    },
    legacy_config=True,
  ),
  'mistral_wide_heads': Case(
    seed=2,
    config={
      'head_dim': 12,
      'num_key_value_heads': 1,
      'sliding_window': None,
      **rope(1e6),
    },
    mistakes={'window 4': {'sliding_window': 4}, 'theta 1e4': rope(1e4)},
    max_shard_size='45KB',
  ),
  'mistral_tied': Case(
    seed=3,
    config={
      'intermediate_size': 24,
      'num_hidden_layers': 3,
      'sliding_window': None,
      'tie_word_embeddings': True,
      **rope(1e4),
    },
    mistakes={'window 4': {'sliding_window': 4}, 'theta 1e6': rope(1e6)},
    masked=True,
  ),
  'llama': Case(
    seed=4,
    family='llama',
    config={
      'vocab_size': 37,
      'intermediate_size': 24,
      'num_key_value_heads': 4,
      'rms_norm_eps': 1e-6,
      **rope(1e4),
    },
    mistakes={'theta 1e6': rope(1e6)},
  ),
  'llama3_rope': Case(
    seed=5,
    family='llama',
    config={
      'vocab_size': 37,
      'intermediate_size': 24,
      'num_attention_heads': 2,
      'num_key_value_heads': 1,
      **rope(
        1e4,
        'llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
      ),
    },
    mistakes={
      'rope default': rope(1e4),
      'rope linear': rope(1e4, 'linear', factor=8.0),
    },
    length=24,
  ),
  'llama_linear_rope': Case(
    seed=6,
    family='llama',
    config={
      'vocab_size': 37,
      'intermediate_size': 24,
      **rope(1e4, 'linear', factor=4.0),
    },
    mistakes={'rope default': rope(1e4)},
  ),
}


def build_model(case: Case, **changes):
  """The case's model with its seeded weights, its config under `changes`."""
  config_cls, model_cls = MODELS[case.family]
  config = config_cls(**{**DIMS, **case.config, **changes})
  torch.manual_seed(case.seed)
  model = model_cls(config).eval()
  with torch.no_grad():
    # Far from the usual 0.02, so that a mistake anywhere shows in the logits.
    for name, weight in model.named_parameters():
      if 'norm' in name:
        weight.normal_(1.0, 0.3)
      else:
        weight.normal_(0.0, 0.25)
  return model


def make_batch(case: Case) -> dict[str, torch.Tensor]:
  """Random ids, and labels that skip a prompt, a middle token and an end."""
  generator = torch.Generator().manual_seed(100 + case.seed)
  vocab = case.config.get('vocab_size', DIMS['vocab_size'])
  ids = torch.randint(
    0, vocab, (BATCH, case.length), generator=generator, dtype=torch.int32
  )
  labels = ids.clone()
  labels[0, :3] = -100
  labels[0, 6] = -100
  labels[1, -2:] = -100
  return {'ids': ids, 'labels': labels}


def make_mask(ids: torch.Tensor) -> torch.Tensor:
  """Row 0 is padded by 4 on the right, row 1 by 3 on the left."""
  mask = torch.ones_like(ids)
  mask[0, -4:] = 0
  mask[1, :3] = 0
  return mask


def forward(model, batch, mask=None):
  """The model's output for the batch, with its loss."""
  return model(
    input_ids=batch['ids'].long(),
    labels=batch['labels'].long(),
    attention_mask=mask,
    use_cache=False,
  )


@torch.no_grad()
def logits_of(model, batch, mask=None) -> torch.Tensor:
  """The model's logits [B, T, V] for the batch."""
  return forward(model, batch, mask).logits


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
  """The largest absolute difference."""
  return float((x - y).abs().max())


def check_mistakes(name: str, case: Case, batch, logits) -> dict[str, float]:
  """How far each mistake moves the logits, which must be a lot."""
  moves = {}
  for mistake, changes in case.mistakes.items():
    wrong = logits_of(build_model(case, **changes), batch)
    moves[mistake] = distance(logits, wrong)
    print(f'{name}: {mistake} moves the logits by {moves[mistake]:.3f}')
    assert moves[mistake] > 0.1, (name, mistake, moves)
  return moves


def check_llama3_regimes(model) -> None:
  """All three regimes (kept, smoothed, divided by 8) occur in inv_freq."""
  plain = build_model(CASES['llama3_rope'], **rope(1e4))
  ratio = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
  kept, divided = ratio < 1.001, ratio > 7.999
  print(f'llama3_rope: inv_freq is divided by {ratio.tolist()}')
  assert kept.any() and divided.any() and (~kept & ~divided).any(), ratio


def to_legacy_config(config: dict) -> None:
  """Turns a config of transformers 5 into one like Mistral-7B-v0.1's."""
  config['rope_theta'] = config.pop('rope_parameters')['rope_theta']
  config['torch_dtype'] = config.pop('dtype')
  for newer in ('head_dim', 'transformers_version'):
    del config[newer]


def save_model(model, case: Case, folder: pathlib.Path) -> None:
  """Writes config.json and the weights as save_pretrained does."""
  model.save_pretrained(folder, max_shard_size=case.max_shard_size)
  (folder / 'generation_config.json').unlink()
  if case.legacy_config:
    files.rewrite_json(folder / 'config.json', to_legacy_config)


def check_saved_model(case: Case, folder: pathlib.Path, batch, logits) -> None:
  """What is on disk gives the very same logits."""
  _, model_cls = MODELS[case.family]
  model = model_cls.from_pretrained(folder, attn_implementation='eager')
  assert distance(logits_of(model.eval(), batch), logits) == 0.0, folder
