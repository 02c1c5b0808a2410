#!/usr/bin/env bash
# First thing to run on a new node, about 10 minutes: imports, NCCL, packed attention, SGLang, two
# steps of Qwen3-30B-A3B's shape with 4 layers (TP4 EP8), and a weight sync by each transport.
# Random weights: nothing is downloaded. With --cpu the same code at a tiny size on two processes,
# as CI runs it.
#   bash examples/smoke_8xh100.sh
#   bash examples/smoke_8xh100.sh --cpu
#
# --work DIR keeps the model and the logs.
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v lopd >/dev/null; then
    # shellcheck source=../requirements/environment.sh
    source "$examples/../requirements/environment.sh"
fi
python=python
if ! command -v python >/dev/null; then python=python3; fi
exec "$python" -m lopd.smoke --tokenizer "$examples/tiny_models/student" "$@"
