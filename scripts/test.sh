#!/usr/bin/env bash
# Everything that CI checks: format, lint, types, tests, in an environment of
# its own. `--all` adds the slow tests, live parity with transformers and PEFT on
# torch, and the newest jax pair where a Python of 3.12 or newer is found.
#
#   bash scripts/test.sh [--all] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

all=
if [[ "${1:-}" == --all ]]; then
  all=1
  shift
fi

source scripts/environment.sh
python=$(our_python)
echo "== environment ($python)"
environment .venv "$python" test --constraint "$(known_good "$python")"
smollm2 .venv
bin=.venv/bin

echo '== format, lint, types'
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy

# A file goes to one process, for what its tests share.
parallel=(-n auto --maxprocesses 4 --dist loadfile)

echo '== tests'
$bin/python -m pytest "${parallel[@]}" "$@"

[[ $all ]] || exit 0

echo '== slow tests'
$bin/python -m pytest "${parallel[@]}" -m slow

echo '== parity with transformers and PEFT'
environment .venv-parity "$python" test,parity \
  --constraint "$(known_good "$python")"
smollm2 .venv-parity
OMP_NUM_THREADS=1 .venv-parity/bin/python -m pytest "${parallel[@]}" \
  -m parity tests/parity

# Found on PATH, or among pyenv's versions, whose shims need one selected.
if newest=$(find_python 12 python3.14 python3.13 python3.12 \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3); then
  echo "== newest jax pair ($newest)"
  environment .venv-newest "$newest" test --upgrade jax flax
  .venv-newest/bin/python -m pytest "${parallel[@]}" -m compat
else
  echo '== newest jax pair: skipped, no Python of 3.12 or newer'
fi
