#!/usr/bin/env bash
# On a host of a run: an environment for what it computes on, and the trainer in
# it. Without arguments for the trainer, the environment alone.
#
#   bash scripts/launch/on_host.sh tpu|cuda12|cuda13 [--config FILE ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh

extra=$1
shift

# A lost connection leaves the trainer running, and it has the devices. Told to
# stop, it writes a checkpoint first.
own=$HOME/.lorax_train.pid
if [[ -f $own ]] && grep -qs lorax_train "/proc/$(<"$own")/cmdline"; then
  kill -TERM "$(<"$own")"
  while [[ -d /proc/$(<"$own") ]]; do sleep 1; done
fi

# The images of TPU VMs have an older Python.
if ! python=$(our_python 2>/dev/null); then
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  python=$(python3 -m uv python find --managed-python 3.12)
fi
environment ".venv-$extra" "$python" "$extra" \
  --constraint "$(known_good "$python")"
(($#)) || exit 0

echo $$ >"$own"
exec ".venv-$extra/bin/python" -m lorax_train.main "$@"
