"""The other side: random models and adapters of transformers and PEFT.

Imported by tests only after `pytest.importorskip`.
"""

import numpy as np
import peft
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

MODELS = {
  'mistral': (transformers.MistralConfig, transformers.MistralForCausalLM),
  'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
DIMS = {
  'vocab_size': 83,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  'rms_norm_eps': 1e-5,
  'attn_implementation': 'eager',
}
WINDOW = {
  'sliding_window': 5,
  'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'},
}


def make_model(seed, family='mistral', **config):
  """A random model in float32, far from the usual 0.02 so that errors show."""
  config_class, model_class = MODELS[family]
  torch.manual_seed(seed)
  model = model_class(config_class(**{**DIMS, **config})).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'norm' in name:
        weight.normal_(1.0, 0.3)
      else:
        weight.normal_(0.0, 0.25)
  return model


def save_model(model, directory, **kwargs):
  """Writes it as any user of transformers does."""
  model.save_pretrained(directory, **kwargs)
  return directory


def load_model(directory, dtype='float32'):
  """The base again: PEFT writes into the one that it is given."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=dtype, attn_implementation='eager'
  ).eval()


def make_adapter(model, seed, dropout=0.0, **config):
  """The model under a LoRA adapter, with B random instead of zero."""
  config = {'r': 4, 'lora_alpha': 8, **config}
  lora = peft.LoraConfig(task_type='CAUSAL_LM', lora_dropout=dropout, **config)
  torch.manual_seed(seed)
  model = peft.get_peft_model(model, lora)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_B' in name:
        weight.normal_(0.0, 0.1)
      elif 'lora_A' in name and not weight.any():  # MiCA's start
        weight.normal_(0.0, 0.2)
  return model.eval()


def random_ids(seed, vocab=DIMS['vocab_size'], shape=(3, 17)):
  """int32 token ids: longer than the window."""
  return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def loss(model, ids):
  """Mean next-token cross-entropy over all tokens, as a tensor."""
  logits = model(torch.tensor(ids.astype(np.int64))).logits
  return torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).long().flatten()
  )


def train(model, ids, steps, rate, weight_decay):
  """Steps of AdamW on all that wants a gradient."""
  weights = [w for w in model.parameters() if w.requires_grad]
  optimizer = torch.optim.AdamW(weights, rate, weight_decay=weight_decay)
  for _ in range(steps):
    optimizer.zero_grad()
    loss(model, ids).backward()
    optimizer.step()


@torch.no_grad()
def logits(model, ids, mask=None):
  """[B, T, V] float32."""
  if mask is not None:
    mask = torch.tensor(mask.astype(np.int64))
  out = model(
    input_ids=torch.tensor(ids.astype(np.int64)),
    attention_mask=mask,
    use_cache=False,
  )
  return out.logits.float().numpy()
