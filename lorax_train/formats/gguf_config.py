"""A GGUF file's metadata as config.json of a Llama.

Mistral's files are of architecture "llama" too: llama.cpp makes no difference,
and writes no sliding window down.
"""

from typing import Any

from lorax_train.errors import ModelError
from lorax_train.formats import gguf_tokenizer
from lorax_train.formats.gguf_header import Gguf
from lorax_train.formats.safetensors import few

# Keys under "llama." that we read, and those that say nothing of the maths
# unless another one does. Any further one might change it.
_KNOWN = {
  'attention.head_count',
  'attention.head_count_kv',
  'attention.key_length',
  'attention.layer_norm_rms_epsilon',
  'attention.value_length',
  'block_count',
  'context_length',
  'embedding_length',
  'feed_forward_length',
  'rope.dimension_count',
  'rope.freq_base',
  'rope.scaling.original_context_length',
  'vocab_size',
}
# ... and those with the only value that leaves it as it is.
_NEUTRAL = {
  'expert_count': 0,
  'expert_used_count': 0,
  'rope.scale_linear': 1,
  'rope.scaling.factor': 1,
  'rope.scaling.finetuned': False,
  'rope.scaling.type': 'none',
}


def to_hf(opened: Gguf, dtype: str) -> dict[str, Any]:
  """The content of config.json; hf_config checks what the sizes amount to.

  Args:
    opened: a file's head.
    dtype: what the weights are stored in.

  Raises:
    ModelError: keys that are absent, odd, or change the maths.
  """
  kind = opened.text('general.architecture')
  if kind != 'llama':
    raise ModelError(
      f'{opened.path}: architecture {kind!r} is not supported; supported:'
      ' llama (Llama and Mistral)'
    )
  parts = opened.fields.get('split.count', 1)
  if not isinstance(parts, int) or parts > 1:
    raise ModelError(
      f'{opened.path}: is one of {parts} parts; join them first with'
      ' `llama-gguf-split --merge`'
    )
  _refuse_unknown(opened)
  hidden = opened.size('llama.embedding_length')
  heads = opened.size('llama.attention.head_count')
  head_dim = opened.size('llama.attention.key_length', hidden // heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    other = opened.size(f'llama.{key}', head_dim)
    if other != head_dim:
      raise ModelError(
        f'{opened.path}: llama.{key} is {other}, the heads have {head_dim}:'
        ' not supported'
      )
  embedding = opened.tensors.get('token_embd.weight')
  if embedding is None:
    raise ModelError(f'{opened.path}: token_embd.weight is missing')
  vocab = embedding.shape[0]
  said = opened.size('llama.vocab_size', vocab)
  if said != vocab:
    raise ModelError(
      f'{opened.path}: llama.vocab_size is {said}, token_embd.weight has'
      f' {vocab} rows'
    )
  layers = opened.size('llama.block_count')
  if layers > len(opened.tensors):
    raise ModelError(
      f'{opened.path}: llama.block_count is {layers}, but there are only'
      f' {len(opened.tensors)} tensors'
    )
  ids = {
    f'{name}_token_id': opened.fields.get(f'tokenizer.ggml.{key}_token_id')
    for name, key in gguf_tokenizer.SPECIAL.items()
    if name != 'unk'
  }
  return {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': False,
    **ids,
    'dtype': dtype,
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'hidden_size': hidden,
    'intermediate_size': opened.size('llama.feed_forward_length'),
    'max_position_embeddings': opened.size('llama.context_length'),
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': heads,
    'num_hidden_layers': layers,
    'num_key_value_heads': opened.size('llama.attention.head_count_kv', heads),
    'rms_norm_eps': opened.number('llama.attention.layer_norm_rms_epsilon'),
    'rope_theta': opened.number('llama.rope.freq_base', 10000.0),
    'tie_word_embeddings': 'output.weight' not in opened.tensors,
    'vocab_size': vocab,
  }


def _refuse_unknown(opened: Gguf) -> None:
  odd = []
  for key, value in opened.fields.items():
    short = key.removeprefix('llama.')
    if short == key:
      continue
    if short in _NEUTRAL:
      if not isinstance(value, str | int | float) or value != _NEUTRAL[short]:
        odd.append(' '.join(f'{key} {value!r}'.split())[:80])
    elif short not in _KNOWN:
      odd.append(key)
  if 'rope_freqs.weight' in opened.tensors:
    odd.append('rope_freqs.weight (scaled RoPE, as of Llama 3.1)')
  if odd:
    raise ModelError(f'{opened.path}: not supported: {few(odd)}')
