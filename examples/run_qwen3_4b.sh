#!/usr/bin/env bash
# Lightning OPD with the paper's settings on one node of 8 x H100: Qwen3-4B-Base learns from
# Qwen3-8B. Settings: run_qwen3_4b.toml; steps: recipe.sh.
#
#   bash examples/run_qwen3_4b.sh --only check
#   bash examples/run_qwen3_4b.sh distill.num_steps=4
set -euo pipefail
# shellcheck source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe=qwen3_4b
config=$examples/run_qwen3_4b.toml
read_arguments "$@"
run_math_recipe
