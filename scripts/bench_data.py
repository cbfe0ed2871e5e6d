"""What the data path costs: tokenising, packing, and a start from the cache.

  python scripts/bench_data.py [--data FILE] [--tokenizer DIR] [--length 2048]

Two processes, one after the other, on an empty cache: the first makes the rows
and packs them, the second finds them. Each tells of the seconds after its
imports, of the CPU (all threads) and by the clock, and of the most memory it
held. Tokens are those of the rows, BOS and EOS included, padding not.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).parents[1].parent / 'shared'


def measure(
  data: str, tokenizer_dir: str, template: str, length: int
) -> dict[str, float]:
  """Prepares and packs the rows; what that took."""
  import numpy as np

  from lorax_train.data import packing, prepare, tokenize

  cpu, wall = time.process_time(), time.perf_counter()
  tokenizer = tokenize.load_tokenizer(tokenizer_dir)
  rows = prepare.prepare(data, template, tokenizer, prepare.Options(length))
  packs = packing.pack_rows(rows.lengths, length, np.arange(len(rows.lengths)))
  return {
    'cpu_seconds': time.process_time() - cpu,
    'seconds': time.perf_counter() - wall,
    'rows': rows.report.rows_kept,
    'tokens': rows.report.tokens,
    'packs': len(packs.rows),
    'padding_percent': 100 * (1 - packs.tokens / (len(packs.rows) * length)),
    # Linux counts in KiB.
    'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
  }


def main() -> None:
  """Runs both processes and prints a table, or is one of them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--data', default=str(SHARED / 'data' / 'alpaca_51924.json.gz')
  )
  parser.add_argument(
    '--tokenizer', default=str(SHARED / 'tokenizers' / 'mistral-v1')
  )
  parser.add_argument('--template', default='alpaca')
  parser.add_argument('--length', type=int, default=2048)
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    told = measure(args.data, args.tokenizer, args.template, args.length)
    print(json.dumps(told))
    return
  print('             CPU s   seconds   tokens/CPU s   peak MB')
  with tempfile.TemporaryDirectory() as caches:
    for name in ('made', 'cached'):
      done = subprocess.run(
        [sys.executable, *sys.argv, '--one'],
        env=os.environ | {'XDG_CACHE_HOME': caches},
        check=True,
        stdout=subprocess.PIPE,
      )
      told = json.loads(done.stdout)
      print(
        f'{name:8}{told["cpu_seconds"]:10.2f}{told["seconds"]:10.2f}'
        f'{told["tokens"] / told["cpu_seconds"]:15,.0f}'
        f'{told["peak_mb"]:10.0f}'
      )
  print(
    f'\n{told["rows"]:,} rows, {told["tokens"]:,} tokens in'
    f' {told["packs"]:,} packs of {args.length}: padding'
    f' {told["padding_percent"]:.2f} %'
  )


if __name__ == '__main__':
  main()
