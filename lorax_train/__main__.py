"""`python -m lorax_train VERB`: one function a verb."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from lorax_train import errors


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as every other error of ours."""

  def error(self, message: str) -> None:  # type: ignore[override]
    raise errors.ConfigError(f'{self.prog}: {message}')


def train(argv: Sequence[str]) -> int:
  """Train adapters: --config FILE [--config.a.b=v ...]."""
  from lorax_train import main

  return main.main(['lorax-train train', *argv])


def score(argv: Sequence[str]) -> int:
  """Logits and loss of token ids in an npz file."""
  parser = _Parser('lorax-train score', description=score.__doc__)
  parser.add_argument('--model', required=True, help='HF directory or hub id')
  parser.add_argument('--adapter', help='PEFT adapter directory')
  parser.add_argument(
    '--tokens', required=True, help='npz: ids, optionally mask and labels'
  )
  parser.add_argument('--out', required=True, help='npz that gets logits, loss')
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument('--json', action='store_true', help='report as JSON')
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    raise errors.ConfigError(f'--batch-size {args.batch_size}: below 1')
  from lorax_train.infer import score as room

  report = room.score(
    args.model,
    args.tokens,
    args.out,
    args.adapter,
    args.dtype,
    args.batch_size,
  )
  if args.json:
    print(json.dumps(report))
  else:
    loss = '' if report['loss'] is None else f', loss {report["loss"]:.6f}'
    print(f'{report["rows"]} rows, {report["tokens"]} tokens{loss}: {args.out}')
  return 0


def generate(argv: Sequence[str]) -> int:
  """Continue prompts."""
  parser = _Parser('lorax-train generate', description=generate.__doc__)
  parser.add_argument('--model', required=True, help='HF directory or hub id')
  parser.add_argument('--adapter', help='PEFT adapter directory')
  parser.add_argument(
    '--prompt', action='append', default=[], help='may be given several times'
  )
  parser.add_argument('--prompts', help='file of one prompt a line; - is stdin')
  parser.add_argument('--max-new-tokens', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--top-p', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--batch-size', type=int, default=8)
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument('--json', action='store_true', help='an object a line')
  args = parser.parse_args(argv)
  from lorax_train.infer import complete as room

  options = room.Options(
    args.max_new_tokens,
    args.temperature,
    args.top_p,
    args.seed,
    args.batch_size,
  )
  prompts = args.prompt + (_lines(args.prompts) if args.prompts else [])
  if not prompts:
    raise errors.ConfigError('no prompt: give --prompt TEXT or --prompts FILE')
  for row in room.complete(
    args.model, prompts, options, args.adapter, args.dtype
  ):
    print(json.dumps(row) if args.json else row['text'], flush=True)
  return 0


def _lines(path: str) -> list[str]:
  """The lines of a text file, or of stdin for '-'."""
  try:
    if path == '-':
      content = sys.stdin.buffer.read()
    else:
      with open(path, 'rb') as file:
        content = file.read()
    return content.decode('utf-8').removesuffix('\n').split('\n')
  except FileNotFoundError:
    raise errors.DataError(f'--prompts {path}: no such file') from None
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b'\n') + 1
    raise errors.DataError(
      f'--prompts {path}: line {line} is not UTF-8: write it so'
    ) from None


def merge(argv: Sequence[str]) -> int:
  """Write a model with an adapter's update in its weights."""
  parser = _Parser('lorax-train merge', description=merge.__doc__)
  parser.add_argument('--model', required=True, help='HF directory or hub id')
  parser.add_argument('--adapter', required=True, help='PEFT adapter directory')
  parser.add_argument('--out', required=True, help='directory, made here')
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), help='default: as stored'
  )
  args = parser.parse_args(argv)
  from lorax_train.formats import hf, hf_save
  from lorax_train.infer.load import load_params

  hf_save.check_absent(args.out)
  source = hf.find_model(args.model)
  exact = hf_save.exact_dtype(source, args.dtype)
  _, params = load_params(source, None, args.adapter, exact)
  count = hf_save.save_params(args.out, source, params, args.dtype)
  print(f'{count:,} parameters: {args.out}')
  return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
  'train': train,
  'score': score,
  'generate': generate,
  'merge': merge,
}


def cli(argv: Sequence[str] | None = None) -> int:
  """Runs a verb; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in ('-h', '--help'):
    listing = '\n'.join(f'  {n:<8} {f.__doc__}' for n, f in VERBS.items())
    print(f'usage: lorax-train VERB [--help]\n\n{listing}')
    return 0
  try:
    if not argv or argv[0] not in VERBS:
      given = f'{argv[0]!r} is no verb' if argv else 'VERB is missing'
      raise errors.ConfigError(
        f'lorax-train: {given}; there are: {", ".join(VERBS)}'
      )
    return VERBS[argv[0]](argv[1:])
  except (errors.UserError, OSError, KeyboardInterrupt) as error:
    return errors.report(error)


if __name__ == '__main__':
  sys.exit(cli())
