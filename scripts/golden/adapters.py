"""PEFT adapters on a golden model, and a short training run."""

import pathlib

import peft
import torch
import transformers

from . import files, models

ALL_LINEAR = [
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
]
STEPS, WARMUP = 8, 3

# LoraConfig keywords of the adapters of mistral_window.
ADAPTERS = {
  'adapter_default': {'target_modules': ['q_proj', 'v_proj']},
  'adapter_patterns': {
    'target_modules': ALL_LINEAR,
    'exclude_modules': ['up_proj'],
    'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 6},
    'alpha_pattern': {'v_proj': 3, '^model.layers.0.self_attn.o_proj': 5},
    'use_rslora': True,
  },
  'adapter_layers': {
    'target_modules': ['q_proj', 'down_proj'],
    'layers_to_transform': [1],
  },
  'adapter_head': {'target_modules': ['q_proj', 'lm_head']},
}


def make_adapter(model, seed: int, **config):
  """The model under a LoRA adapter whose B is random instead of zero."""
  lora = peft.LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.0, task_type='CAUSAL_LM', **config
  )
  torch.manual_seed(seed)
  model = peft.get_peft_model(model, lora)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_B' in name:
        weight.normal_(0.0, 0.1)
  return model.eval()


def save_adapter(model, folder: pathlib.Path, base: str) -> None:
  """Writes the adapter as save_pretrained does, in a stable order."""

  def neutral(config: dict) -> None:
    config['base_model_name_or_path'] = base
    for key in ('target_modules', 'exclude_modules'):  # PEFT keeps sets
      config[key] = config[key] and sorted(config[key])

  model.save_pretrained(folder)
  (folder / 'README.md').unlink()
  files.rewrite_json(folder / 'adapter_config.json', neutral)


def check_saved_adapter(
  case: models.Case, folder: pathlib.Path, batch, logits
) -> None:
  """What is on disk, on the same base, gives the very same logits."""
  base = models.build_model(case)
  model = peft.PeftModel.from_pretrained(base, folder).eval()
  assert models.distance(models.logits_of(model, batch), logits) == 0.0, folder


def make_adapters(
  case: models.Case, folder: pathlib.Path, batch, logits
) -> dict:
  """Saves every adapter of the case; returns the logits under each."""
  tensors = {}
  for seed, (name, config) in enumerate(ADAPTERS.items(), start=200):
    model = make_adapter(models.build_model(case), seed, **config)
    save_adapter(model, folder / name, f'golden/{folder.name}')
    tensors[f'logits_{name}'] = models.logits_of(model, batch)
    check_saved_adapter(case, folder / name, batch, tensors[f'logits_{name}'])
    move = models.distance(tensors[f'logits_{name}'], logits)
    print(f'{folder.name}: {name} moves the logits by {move:.3f}')
    assert move > 0.1, (name, move)
  return tensors


def train(case: models.Case, folder: pathlib.Path, batch) -> tuple[dict, dict]:
  """A short AdamW run on one batch: (tensors, scalars), adapters on disk."""
  model = make_adapter(models.build_model(case), 300, target_modules=ALL_LINEAR)
  base = f'golden/{folder.name}'
  save_adapter(model, folder / 'train_start', base)
  trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
  tx = torch.optim.AdamW(
    trainable.values(), lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
  )
  schedule = transformers.get_cosine_schedule_with_warmup(tx, WARMUP, STEPS)
  tensors, losses, grad_norms, learning_rates = {}, [], [], []
  for step in range(STEPS):
    loss = models.forward(model, batch).loss
    loss.backward()
    if step == 0:
      for name, weight in trainable.items():
        tensors['grad.' + name.replace('.default', '')] = weight.grad.clone()
    losses.append(loss.item())
    grad_norms.append(
      torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0).item()
    )
    learning_rates.append(schedule.get_last_lr()[0])
    tx.step()
    schedule.step()
    tx.zero_grad()
  save_adapter(model, folder / 'train_end', base)
  logits = models.logits_of(model, batch)
  check_saved_adapter(case, folder / 'train_end', batch, logits)
  tensors['logits_train_end'] = logits
  print(f'{folder.name}: losses {losses}, grad norms {grad_norms}')
  scalars = {
    'losses': losses,
    'grad_norms': grad_norms,
    'learning_rates': learning_rates,
  }
  return tensors, {'train': scalars}
