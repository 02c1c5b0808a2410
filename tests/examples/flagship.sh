#!/usr/bin/env bash
# The flagship's own script on a machine without a GPU: every step of examples/run_qwen3_30b_a3b.sh,
# with 8 ranks (TP4 EP8), a server that shares the device with them, and a tiny model of the same
# structure. About 8 GB of memory; downloads nothing.
#   bash tests/examples/flagship.sh FOLDER                       everything; the same command goes
#                                                                on after a kill
#   bash tests/examples/flagship.sh FOLDER --only check,plan     steps and overrides as of the
#                                                                script, after ours
set -euo pipefail
work=${1:?usage: bash $0 FOLDER [--only STEPS] [key=value ...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if ! command -v lopd >/dev/null; then
    # shellcheck source=../../requirements/environment.sh
    source "$root/requirements/environment.sh"
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)
export LOPD_HUB=$work/hub LOPD_RUNS=$work/runs HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ ! -e "$LOPD_HUB" ]; then (cd "$root" && python -m tests.examples.flagship); fi

on_a_cpu=(
    launch.device=cpu # doctor looks for no GPU, and 8 ranks may share the cores
    sglang.dtype=float32 sft.dtype=float32 distill.dtype=float32
    sglang.tensor=1 sglang.replicas=1
    sft.megatron={} distill.megatron={} # there is nothing to offload the optimizer from
)
tiny=(
    prompts.sft.num_prompts=16 prompts.eval.num_prompts=5 prompts.sft.max_prompt_tokens=256 prompts.opd.max_prompt_tokens=256
    sglang.context_length=384 sglang.max_running_requests=16 sglang.max_in_flight=16
    demonstrate.max_new_tokens=64 rollout.max_new_tokens=64
    sft.num_steps=4 sft.batch_size=8 sft.max_tokens_per_microbatch=1024 sft.checkpoint_every=2
    distill.num_steps=4 distill.batch_size=8 distill.max_tokens_per_microbatch=1024 distill.checkpoint_every=2
    distill.sync_every=2 distill.sync_num_prompts=4
    evaluate.samples_per_prompt=2 evaluate.max_new_tokens=32
)
exec bash "$root/examples/run_qwen3_30b_a3b.sh" "${on_a_cpu[@]}" "${tiny[@]}" "$@"
