"""A model to be trained from scratch: a tokenizer and sizes, no weights.

  python scripts/new_model.py --text FILE.txt --vocab 512 --hidden 128 \
    --layers 6 --heads 8 --out DIR

Any kind of rows that training reads will do for --text: their columns' texts are
what the tokenizer is made from. It is a BPE of sentencepiece with byte fallback, as
Llama's and Mistral's first are, and stands in DIR both as tokenizer.model and as the
tokenizer.json that gives the same ids. Its weights are drawn by a run with
model.init=random; see configs/tiny_pretrain.py.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from lorax_train import errors
from lorax_train.data import source
from lorax_train.data.plain import SEPARATOR
from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.formats import hf_config
from lorax_train.formats.whole import whole
from lorax_train.models import params as params_lib

# As Llama's: no text is changed, digits stand alone, what has no piece is bytes.
_LIKE_LLAMA = {
  'model_type': 'bpe',
  'byte_fallback': True,
  'split_digits': True,
  'allow_whitespace_only_pieces': True,
  'remove_extra_whitespaces': False,
  'normalization_rule_name': 'identity',
  'character_coverage': 0.99995,
  'unk_id': 0,
  'bos_id': 1,
  'eos_id': 2,
  'pad_id': -1,
  'num_threads': 1,  # the order of equals must not depend on them
  'max_sentence_length': 2**20,
  'minloglevel': 2,
}


def train_tokenizer(path: str, vocab: int, separator: str = SEPARATOR) -> bytes:
  """A tokenizer.model of so many pieces, from the lines of the rows of a path.

  Args:
    path: see `data.path` of the configuration.
    vocab: pieces, of which 259 are bytes and special ones.
    separator: see `data.separator`.

  Raises:
    DataError: see `source`.
    ConfigError: there is not that much to find in the text.
  """

  def lines() -> Iterator[str]:
    for row in source.iter_rows(source.files_of(path), separator):
      for value in row.fields.values():
        if isinstance(value, str):
          yield from value.splitlines()

  made = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines(),
      model_writer=made,
      vocab_size=vocab,
      **_LIKE_LLAMA,
    )
  except RuntimeError as error:  # its only kind
    raise errors.ConfigError(
      f'--vocab {vocab}: sentencepiece cannot make that many pieces of {path}'
      f' ({errors.one_line(error)}); give another number, or more text'
    ) from None
  return made.getvalue()


def config_of(args: argparse.Namespace) -> dict:
  """config.json of a Mistral of these sizes."""
  return {
    'architectures': ['MistralForCausalLM'],
    'model_type': 'mistral',
    'vocab_size': args.vocab,
    'hidden_size': args.hidden,
    'intermediate_size': args.mlp or _mlp(args.hidden),
    'num_hidden_layers': args.layers,
    'num_attention_heads': args.heads,
    'num_key_value_heads': args.kv_heads or args.heads,
    'head_dim': args.hidden // args.heads,
    'max_position_embeddings': args.max_length,
    'sliding_window': None,
    'tie_word_embeddings': not args.untied,
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'initializer_range': 0.02,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'torch_dtype': 'float32',
  }


def _mlp(hidden: int) -> int:
  """Llama's: three matrices of 8/3 D for two of 4 D, rounded up to 16."""
  return -(-8 * hidden // 3 // 16) * 16


def make(args: argparse.Namespace) -> int:
  """Writes the directory; returns how many parameters the model will have."""
  if args.heads < 1 or args.hidden % args.heads:
    raise errors.ConfigError(
      f'--hidden {args.hidden}: not a multiple of --heads {args.heads}'
    )
  out = Path(args.out)
  if out.exists():
    raise errors.ConfigError(f'--out {out}: exists already, name another')
  config = config_of(args)
  n = params_lib.total(hf_config.config_from_hf(config, '--out'))
  model = train_tokenizer(args.text, args.vocab, args.separator)
  with whole(out, 'model not written') as building:
    (building / 'tokenizer.model').write_bytes(model)
    files, lacking = missing_files(building)
    if lacking:
      raise errors.ModelError(lacking)
    files['config.json'] = (json.dumps(config, indent=2) + '\n').encode()
    for name, content in files.items():
      (building / name).write_bytes(content)
  return n


def main() -> int:
  """Reads the options and writes the directory."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--text', required=True, help='as data.path')
  parser.add_argument(
    '--separator', default=SEPARATOR, help='as data.separator'
  )
  parser.add_argument('--out', required=True, help='directory, made here')
  parser.add_argument('--vocab', type=int, default=512)
  parser.add_argument('--hidden', type=int, default=128)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--kv-heads', type=int, default=0, help='as heads')
  parser.add_argument('--mlp', type=int, default=0, help='8/3 of hidden')
  parser.add_argument('--max-length', type=int, default=2048)
  parser.add_argument('--untied', action='store_true', help='a head of its own')
  args = parser.parse_args()
  try:
    print(f'{args.out}: {make(args):,} parameters, to be drawn')
  except (errors.UserError, OSError) as error:
    return errors.report(error)
  return 0


if __name__ == '__main__':
  raise SystemExit(main())
