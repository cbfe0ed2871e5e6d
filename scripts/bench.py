"""How fast the train step is, and what it takes: one line of JSON a case.

  python scripts/bench.py [--case NAME ...] [--list] [--steps N] [--out FILE]
    [--seconds S] [--distributed]

Without --case it runs the cases of bench_cases.py that the devices at hand are
for, those worth most first, until --seconds are over. Each has a process of its
own: memory is freed between them, and what does not fit gives a line with
`error`. Exits with 1 where there is one. Weights are random, of the real shape,
made on the devices; all batches of a case are the same one, which lies there: no
data path is measured. It needs jax, flax, optax and numpy, nothing else.

What a line has:

  cpus, xla_flags       CPUs that the process may use; XLA_FLAGS
  kernel                who computes attention
  step_seconds          by the clock, each step waited for: median, min, max
  step_cpu_seconds      the same of the CPU, all threads of the process
  tokens_per_second     of batch positions; useful_: of those not padding
  flops_per_token       4N + 3 x attention, of a useful token: docs/benchmarks.md
  mfu_4n, hfu           of the cards' bfloat16 peak; null where that is unknown
  gemm_tflops           a large product on one of the devices, just before
  share_of_gemm         the step's FLOP/s a device over it; on a CPU both by CPU
                        seconds
  peak_bytes            a device's; peak_from: 'device', the most that its
                        allocator ever held, or 'compiled', the sum of the
                        first three of compiled_bytes, the compiler's plan
  peak_rss_bytes        the process's, in the host's memory
  pieces                seconds of a micro-batch forward, of that with its
                        gradient, and of the optimizer
  loss_first, loss_last of the first step and of the last

On several hosts the same command with --distributed goes to each.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import bench_step
from bench_cases import CASES, Case

from lorax_train import hardware

LEAST_SECONDS = 20  # a case that would have less is not begun
TAIL = 2000  # characters shown of what a case said before it died


def main() -> None:
  """Runs cases, each in a process of its own."""
  args = parse()
  if args.child:
    answer(args)
  elif args.list:
    for case in CASES.values():
      print(f'{case.name:25}{" ".join(words(case))}')
  else:
    # Or a child would outlive this process, and keep the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(args))


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', nargs='+', choices=CASES, metavar='NAME')
  parser.add_argument('--list', action='store_true', help='the cases there are')
  parser.add_argument('--steps', type=int, default=10, help='steps timed')
  parser.add_argument('--out', help='a file that gets the lines as well')
  parser.add_argument(
    '--seconds', type=float, default=420.0, help='for all of it'
  )
  parser.add_argument(
    '--distributed', action='store_true', help='join the other hosts'
  )
  parser.add_argument('--child', metavar='NAME', help=argparse.SUPPRESS)
  return parser.parse_args()


def words(case: Case) -> Iterator[str]:
  """'batch=2' and so on: all that has no default, or another value than it."""
  for key, value in case._asdict().items():
    if key != 'name' and Case._field_defaults.get(key) != value:
      yield f'{key}={value}'


def answer(args: argparse.Namespace) -> None:
  """In a child: what there is, or what a case measured, as a line of JSON."""
  hardware.take_memory()
  bench_step.start(args.distributed)
  if args.child == 'probe':
    print(json.dumps(bench_step.probe()))
    return
  try:
    found = bench_step.measure(CASES[args.child], args.steps)
  except Exception as error:  # such as XLA's, where the memory does not do
    traceback.print_exc()
    first = str(error).partition('\n')[0]
    found = {'error': f'{type(error).__name__}: {first}'}
  print(json.dumps(rounded(found)))


def rounded(found: Any) -> Any:
  """Numbers with six digits, which is more than any of them is good for."""
  if isinstance(found, dict):
    return {name: rounded(value) for name, value in found.items()}
  return float(f'{found:.6g}') if isinstance(found, float) else found


def run(args: argparse.Namespace) -> int:
  """Prints the lines; 1 where a case failed."""
  until = time.monotonic() + args.seconds
  found = {'process': 0}
  if args.distributed or not args.case:
    found = ask('probe', args, args.seconds)
  if 'error' in found:
    print(f'no devices: {found["error"]}', file=sys.stderr)
    return 1
  failed = 0
  with contextlib.ExitStack() as stack:
    out = stack.enter_context(open(args.out, 'a')) if args.out else None
    for name in args.case or fitting(found):
      left = until - time.monotonic()
      line = {'case': name, 'shape': CASES[name]._asdict()}
      if left > LEAST_SECONDS:
        line |= ask(name, args, left)
      else:
        line['error'] = f'not begun: {args.seconds:.0f} s were over'
      failed |= 'error' in line
      if found['process'] == 0:
        print(json.dumps(line), flush=True)
        if out:
          print(json.dumps(line), file=out, flush=True)
  return failed


def fitting(found: dict[str, Any]) -> list[str]:
  """Cases for the platform, on one device or on all that there are."""
  return [
    case.name
    for case in CASES.values()
    if case.platform == found['platform']
    and (case.devices == 1 or case.devices == found['devices'])
    and case.devices >= found['processes']
  ]


def ask(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
  """What a process of its own says of a case, or of what there is."""
  command = [sys.executable, __file__, '--child', name]
  command += ['--steps', str(args.steps)]
  command += ['--distributed'] * args.distributed
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=seconds
    )
  except subprocess.TimeoutExpired:
    return {'error': f'stopped: the time was over, after {seconds:.0f} s'}
  try:
    found = json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError):
    last = (done.stderr.strip().splitlines() or ['it said nothing'])[-1]
    found = {'error': f'exit {done.returncode}: {last}'}
  if 'error' in found:
    print(done.stderr[-TAIL:], file=sys.stderr)
  return found


if __name__ == '__main__':
  main()
