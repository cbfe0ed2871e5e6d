"""`python -m lorax_train VERB`: one function a verb."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_train import errors


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as every other error of ours."""

  def error(self, message: str) -> None:  # type: ignore[override]
    raise errors.ConfigError(f'{self.prog}: {message}')


# Options that several verbs have.
_SHARED: dict[str, dict[str, Any]] = {
  '--model': {'required': True, 'help': 'HF directory or hub id'},
  '--adapter': {'help': 'PEFT adapter directory'},
  '--dtype': {'choices': ('float32', 'bfloat16'), 'default': 'float32'},
  '--batch-size': {'type': int, 'default': 8},
  '--quant': {'choices': ('nf4', 'int8'), 'help': 'how to store the linears'},
  '--json': {'action': 'store_true', 'help': 'as JSON, an object a line'},
}


def _parser(verb: str, about: str | None, *shared: str) -> _Parser:
  """A parser that has some of the shared options."""
  parser = _Parser(f'lorax-train {verb}', description=about)
  for name in shared:
    parser.add_argument(name, **_SHARED[name])
  return parser


def train(argv: Sequence[str]) -> int:
  """Train adapters or a model: --config FILE [--config.a.b=v ...]."""
  from lorax_train import main

  return main.main(['lorax-train train', *argv])


def score(argv: Sequence[str]) -> int:
  """Logits and loss of token ids in an npz file."""
  parser = _parser('score', score.__doc__, *_SHARED)
  parser.add_argument(
    '--tokens', required=True, help='npz: ids, optionally mask and labels'
  )
  parser.add_argument('--out', required=True, help='npz that gets logits, loss')
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
    args.quant,
  )
  if args.json:
    print(json.dumps(report))
  else:
    loss = '' if report['loss'] is None else f', loss {report["loss"]:.6f}'
    print(f'{report["rows"]} rows, {report["tokens"]} tokens{loss}: {args.out}')
  return 0


def generate(argv: Sequence[str]) -> int:
  """Continue prompts."""
  parser = _parser('generate', generate.__doc__, *_SHARED)
  parser.add_argument(
    '--prompt', action='append', default=[], help='may be given several times'
  )
  parser.add_argument('--prompts', help='file of one prompt a line; - is stdin')
  parser.add_argument('--max-new-tokens', type=int, default=128)
  parser.add_argument('--temperature', type=float, default=0.0)
  parser.add_argument('--top-p', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
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
    args.model, prompts, options, args.adapter, args.dtype, args.quant
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
  parser = _parser('merge', merge.__doc__, '--model', '--quant', '--json')
  parser.add_argument('--adapter', required=True, **_SHARED['--adapter'])
  parser.add_argument('--out', required=True, help='directory, made here')
  as_stored = {'default': None, 'help': 'default: as stored'}
  parser.add_argument('--dtype', **_SHARED['--dtype'] | as_stored)
  compared = parser.add_argument_group('what it cost')
  compared.add_argument(
    '--report', action='store_true', help='compare with the adapter unmerged'
  )
  which = compared.add_mutually_exclusive_group()
  which.add_argument('--tokens', help='with --report, npz: ids, mask if wanted')
  which.add_argument(
    '--rows', type=int, help='with --report: so many of 64 random ids; 8'
  )
  compared.add_argument('--batch-size', **_SHARED['--batch-size'])
  args = parser.parse_args(argv)
  for name in ('tokens', 'rows'):
    if getattr(args, name) is not None and not args.report:
      parser.error(f'--{name} is for --report')
  for name in ('rows', 'batch_size'):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      option = f'--{name.replace("_", "-")}'
      raise errors.ConfigError(f'{option} {getattr(args, name)}: below 1')
  from lorax_train.infer import fidelity as room

  done = room.merge(**{k: v for k, v in vars(args).items() if k != 'json'})
  return _tell(done, room.text(done), args.json)


def export(argv: Sequence[str]) -> int:
  """Write an adapter so that PEFT, vLLM or llama.cpp computes it right."""
  parser = _parser('export', export.__doc__, '--json')
  parser.add_argument('adapter', metavar='ADAPTER', help='PEFT directory')
  parser.add_argument(
    '--for', required=True, dest='consumer', help='peft, vllm or llama.cpp'
  )
  parser.add_argument('--out', required=True, help='directory, new or empty')
  parser.add_argument(
    '--bake', action='store_true', help='one rank, all scales folded into B'
  )
  parser.add_argument('--model', help='the base, to check names and shapes')
  args = parser.parse_args(argv)
  from lorax_train.formats import consumers as room

  report = room.export(
    args.adapter, args.consumer, args.out, args.bake, args.model
  )
  return _tell(report, room.text(report), args.json)


def _add_data(group: argparse._ArgumentGroup) -> None:
  """Options of verbs that read the rows of a file."""
  from lorax_train.data.template import KNOWN

  group.add_argument('--data', help='file or directory of rows, or a hub id')
  group.add_argument('--template', help=f'{", ".join(KNOWN)}, or your own')
  group.add_argument('--max-length', type=int, help='of a row in tokens; 512')
  group.add_argument(
    '--truncation', choices=('drop', 'left', 'right', 'error'), help='drop'
  )
  group.add_argument('--on-bad-row', choices=('error', 'skip'), help='error')


def evaluate(argv: Sequence[str]) -> int:
  """Loss per learned token: of a run's held-out rows, or of a file's."""
  # What is not given keeps the default of the function that is called.
  absent = argparse.SUPPRESS
  parser = _Parser(
    'lorax-train eval', description=evaluate.__doc__, argument_default=absent
  )
  parser.add_argument('--json', default=False, **_SHARED['--json'])
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--run', help='run directory: its rows, its adapter')
  which.add_argument('--model', help=_SHARED['--model']['help'])
  of_file = parser.add_argument_group('with --model')
  of_file.add_argument('--adapter', **_SHARED['--adapter'])
  _add_data(of_file)
  of_file.add_argument('--rows', type=int, help='the first so many; 0 for all')
  for name in ('--dtype', '--batch-size', '--quant'):
    of_file.add_argument(name, **_SHARED[name] | {'default': absent})
  given = vars(parser.parse_args(argv))
  as_json, run = given.pop('json'), given.pop('run', None)
  of_run = run is not None
  odd = given if of_run else {'data', 'template'} - {*given}
  if odd:
    names = ', '.join(f'--{n.replace("_", "-")}' for n in sorted(odd))
    parser.error(f'--run has {names} of its own' if of_run else f'give {names}')
  from lorax_train.train import evaluate as room

  report = room.evaluate_run(run) if of_run else room.evaluate_file(**given)
  print(json.dumps(report) if as_json else room.text(report))
  return 0


def data(argv: Sequence[str]) -> int:
  """Show what training will see: rows, their loss mask, statistics."""
  parser = _Parser(
    'lorax-train data',
    description=data.__doc__,
    usage='%(prog)s --config FILE [--config.a.b=v ...] [--rows N] [--json]\n'
    '       %(prog)s --model DIR --data PATH --template T [--rows N] [--json]',
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  parser.add_argument('--json', default=False, **_SHARED['--json'])
  parser.add_argument(
    '--rows', type=int, default=3, help='so many are shown in full; 3'
  )
  of_file = parser.add_argument_group('without --config')
  of_file.add_argument('--model', help=_SHARED['--model']['help'])
  _add_data(of_file)
  known, of_config = parser.parse_known_args(argv)
  given = vars(known)
  as_json, n_rows = given.pop('json'), given.pop('rows')
  if given and of_config:
    parser.error(f'{of_config[0]} does not go with --{next(iter(given))}')
  missing = [n for n in ('model', 'data', 'template') if n not in given]
  if given and missing:
    parser.error(f'give {", ".join(f"--{n}" for n in missing)}')
  from lorax_train import main

  cfg = None if given else main.parse(['lorax-train data', *of_config])
  from lorax_train.train import datatext
  from lorax_train.train import dataview as room

  if cfg is None:
    facts = room.describe_file(n_rows=n_rows, **given)
  else:
    facts = room.describe(cfg, n_rows)
  _write(json.dumps(facts) if as_json else datatext.text(facts, _in_colour()))
  return 0


def _in_colour() -> bool:
  """Whether stdout is a terminal whose user has nothing against colour."""
  if os.environ.get('NO_COLOR') or os.environ.get('TERM') == 'dumb':
    return False
  return sys.stdout.isatty()


def _tell(report: Mapping[str, Any], text: str, as_json: bool) -> int:
  """Prints what was found, and gives the exit code."""
  print(json.dumps(report) if as_json else text)
  return 0


def _write(text: str) -> None:
  """Prints, in whatever characters stdout can be told."""
  encoding = sys.stdout.encoding or 'utf-8'
  print(text.encode(encoding, 'backslashreplace').decode(encoding))


def validate(argv: Sequence[str]) -> int:
  """Check that `train` would start, and that the rows are sound."""
  parser = _Parser(
    'lorax-train validate',
    description=validate.__doc__,
    usage='%(prog)s --config FILE [--config.a.b=v ...] [--json]',
    allow_abbrev=False,
  )
  parser.add_argument('--json', **_SHARED['--json'])
  args, of_config = parser.parse_known_args(argv)
  from lorax_train import main

  cfg = main.parse(['lorax-train validate', *of_config])
  from lorax_train.train import validate as room

  checks = room.validate(cfg)
  report = room.report(checks)
  _write(json.dumps(report) if args.json else room.text(checks))
  return report['exit_code']


def plan(argv: Sequence[str]) -> int:
  """Say whether a run fits its devices, and how fast it can be at best."""
  parser = _Parser(
    'lorax-train plan',
    description=plan.__doc__,
    usage='%(prog)s --config FILE [--config.a.b=v ...] [--topology NAME]'
    ' [--formula] [--json]\n'
    '       %(prog)s --model NAME [--topology NAME] [--formula] [--json]',
    allow_abbrev=False,
  )
  parser.add_argument('--json', **_SHARED['--json'])
  parser.add_argument(
    '--topology', default='', help='v5e-16, v5p:2x2x2, h100-8; or those here'
  )
  parser.add_argument(
    '--formula', action='store_true', help='without the compiler: in seconds'
  )
  parser.add_argument(
    '--model', help='in place of --config: directory, config.json, or a size'
  )
  args, of_config = parser.parse_known_args(argv)
  if args.model and of_config:
    ours = of_config[0].startswith('--config')
    instead = f': give --config FILE --config.model.path={args.model}'
    wrong = f'does not go with --model{instead}' if ours else 'is no option'
    parser.error(f'{of_config[0]} {wrong}')
  from lorax_train import main

  if not args.model:
    cfg = main.parse(['lorax-train plan', *of_config])
  from lorax_train.plan import story as room
  from lorax_train.plan import text

  if args.model:
    cfg = room.of_model(args.model, args.topology)
  found = room.plan(cfg, args.topology, args.formula)
  _write(json.dumps(found) if args.json else text.text(found))
  return 0


def replay(argv: Sequence[str]) -> int:
  """Make again what a MeZO run made, from its base and its log alone."""
  parser = _parser('replay', replay.__doc__, '--json')
  parser.add_argument('run', metavar='RUN_DIR', help='of a run of method=mezo')
  parser.add_argument('--out', required=True, help='directory, new')
  args = parser.parse_args(argv)
  from lorax_train.train import replay as room

  report = room.replay(args.run, args.out)
  return _tell(report, room.text(report), args.json)


def inspect(argv: Sequence[str]) -> int:
  """Say what a model, an adapter, a run or a checkpoint is."""
  parser = _parser('inspect', inspect.__doc__, '--json')
  parser.add_argument('path', metavar='PATH', help='a directory')
  args = parser.parse_args(argv)
  from lorax_train.train import inspection as room

  return _tell(*room.inspect(args.path), args.json)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
  'train': train,
  'score': score,
  'generate': generate,
  'merge': merge,
  'export': export,
  'eval': evaluate,
  'data': data,
  'validate': validate,
  'plan': plan,
  'replay': replay,
  'inspect': inspect,
}


def cli(argv: Sequence[str] | None = None) -> int:
  """Runs a verb; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by whoever started us
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
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
    code = VERBS[argv[0]](argv[1:])
    sys.stdout.flush()  # here, where a closed pipe is still ours to tell
    return code
  except (errors.UserError, OSError, KeyboardInterrupt) as error:
    return errors.report(error)


if __name__ == '__main__':
  sys.exit(cli())
