#!/usr/bin/env bash
# Lightning OPD 2.0 on one node of 8 x H100: demonstrations of one teacher, scores of another, whose
# style is taken out of the cache before training. First run_qwen3_30b_a3b.sh, at least its
# demonstrate stage. Settings: run_qwen3_30b_a3b_cross_teacher.toml; steps: recipe.sh.
set -euo pipefail
# shellcheck source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe=qwen3_30b_a3b_cross_teacher
config=$examples/run_qwen3_30b_a3b_cross_teacher.toml
read_arguments "sft.demonstrations=$runs/qwen3_30b_a3b/demonstrate" "$@"
sources=()
for benchmark in "${math_benchmarks[@]}"; do sources+=("${benchmark#* }"); done
if wants check; then check_machine "${sources[@]}"; fi
if wants fetch; then fetch_all "${sources[@]}"; fi
if wants prompts; then
    clean_prompts opd dapo_math_17k \
        "hf://datasets/BytedTsinghua-SIA/DAPO-Math-17k@main/data/dapo-math-17k.parquet"
fi
use_prompts opd
if wants plan; then lopd plan "$config" "${overrides[@]}"; fi
if wants run; then
    for stage in sft rollout score; do lopd "$stage" "$config" "${overrides[@]}"; done
    residual=$runs/$recipe-residualised
    lopd cache residualise "$runs/$recipe/score" --out "$residual" # goes on, or finds nothing to do
    overrides+=("distill.cache=$residual")
    for stage in distill evaluate export; do lopd "$stage" "$config" "${overrides[@]}"; done
fi
if wants evaluate; then evaluate_math sft distill; fi
