"""Stand-ins for the services that scripts/launch calls, and how to call those."""

import os
import subprocess
from pathlib import Path

from lorax_train import errors

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / 'scripts' / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])

STOPPED = errors.StoppedError.exit_code
FINAL = sorted(
  e.exit_code
  for e in errors.UserError.__subclasses__()
  if e not in (errors.StoppedError, errors.LockedError)
)

# Writes down its arguments, and does what the next file of its name says.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >>"$FAKES/calls"
echo >>"$FAKES/calls"
[[ "$*" != *create* ]] || touch "$FAKES/created"
for answer in "$FAKES"/answers/*; do
  pattern=$(head -n 1 "$answer")
  if [[ "$*" == *$pattern* ]]; then
    code=$(tail -n +2 "$answer")
    rm "$answer"
    eval "$code"
    exit
  fi
done
"""


def run(script, *args, **env):
  return subprocess.run(
    ['bash', str(LAUNCH / script), *args],
    capture_output=True,
    text=True,
    timeout=100,
    env={**os.environ, **env},
    cwd=ROOT,
  )


def calls():
  """What stand-ins were called with, one call a line."""
  return Path(os.environ['FAKES'], 'calls').read_text().splitlines()
