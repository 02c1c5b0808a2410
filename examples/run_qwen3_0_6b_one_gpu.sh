#!/usr/bin/env bash
# Lightning OPD on one GPU of 24 GB or more: Qwen3-0.6B-Base learns GSM8K from Qwen3-4B. Settings:
# run_qwen3_0_6b_one_gpu.toml; steps: recipe.sh.
set -euo pipefail
# shellcheck source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe=qwen3_0_6b_one_gpu
config=$examples/run_qwen3_0_6b_one_gpu.toml
read_arguments "$@"
if wants check; then check_machine; fi
if wants fetch; then fetch_all; fi
if wants plan; then
    lopd plan "$config" "${overrides[@]}" --gpus 1 --gpu "${LOPD_GPU:-rtx4090-24gb}"
fi
if wants run; then lopd run "$config" "${overrides[@]}"; fi # its evaluation is all of this recipe's
