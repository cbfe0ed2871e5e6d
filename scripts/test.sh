#!/usr/bin/env bash
# Everything that CI checks: format, lint, types, tests, in an environment of
# its own. `--all` adds live parity with transformers and PEFT on torch, and the
# newest jax pair where a Python of 3.12 or newer is found.
#
#   bash scripts/test.sh [--all] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

all=
if [[ "${1:-}" == --all ]]; then
  all=1
  shift
fi

# The first of the given commands that is a Python of at least 3.$1.
find_python() {
  local minor=$1 candidate
  shift
  for candidate in "$@"; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $minor))" \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# A virtual environment in $1 by Python $2, with the extras $3 and whatever
# further arguments pip is to get.
environment() {
  local dir=$1 python=$2 extras=$3
  shift 3
  [[ -x $dir/bin/python ]] || "$python" -m venv "$dir"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".[$extras]" "$@"
}

# The versions that the suite is known to pass with, for Python $1.
known_good() {
  if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    echo constraints/jax-0.12.0.1.txt
  else
    echo constraints/jax-0.10.2.txt
  fi
}

python=$(find_python 11 "${PYTHON:-python3}" python3.11 python3.12 python3.13) || {
  echo 'scripts/test.sh: needs Python 3.11 or newer; set PYTHON=' >&2
  exit 2
}
echo "== environment ($python)"
environment .venv "$python" test --constraint "$(known_good "$python")"
bin=.venv/bin

echo '== format, lint, types'
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy

echo '== tests'
$bin/python -m pytest "$@"

[[ $all ]] || exit 0

echo '== parity with transformers and PEFT'
environment .venv-parity "$python" test,parity \
  --constraint "$(known_good "$python")"
OMP_NUM_THREADS=1 .venv-parity/bin/python -m pytest -m parity tests/parity

# Found on PATH, or among pyenv's versions, whose shims need one selected.
if newest=$(find_python 12 python3.14 python3.13 python3.12 \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3); then
  echo "== newest jax pair ($newest)"
  environment .venv-newest "$newest" test --upgrade jax flax
  .venv-newest/bin/python -m pytest -m compat
else
  echo '== newest jax pair: skipped, no Python of 3.12 or newer'
fi
