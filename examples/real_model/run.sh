#!/usr/bin/env bash
# Distils a real language model on a laptop: SmolLM2-135M-Instruct, from a package on PyPI, heals a
# copy of itself that has lost 4 of its 30 layers. README.md says what has been measured.
# Arguments are dotted overrides:
#
#   bash examples/real_model/run.sh distill.num_steps=4
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../requirements/environment.sh"
here=$root/examples/real_model
inputs=$root/runs/real_model_inputs
python "$here/fetch.py" "$inputs/teacher"
python "$here/prune.py" "$inputs/teacher" "$inputs/student" --drop 10 14 18 22
python "$here/prompts.py" "$inputs/prompts"
exec lopd run "$here/real_model.toml" "$@"
