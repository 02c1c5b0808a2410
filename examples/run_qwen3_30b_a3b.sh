#!/usr/bin/env bash
# Lightning OPD with the paper's settings on one node of 8 x H100: Qwen3-30B-A3B-Base learns from
# Qwen3-30B-A3B-Thinking-2507. Settings: run_qwen3_30b_a3b.toml; steps: recipe.sh.
#
#   bash examples/run_qwen3_30b_a3b.sh --only check
#   bash examples/run_qwen3_30b_a3b.sh distill.num_steps=4
set -euo pipefail
# shellcheck source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe=qwen3_30b_a3b
config=$examples/run_qwen3_30b_a3b.toml
read_arguments "$@"
run_math_recipe
