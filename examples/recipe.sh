# shellcheck shell=bash disable=SC2154 # recipe and config are set by the recipe that sources this
# Sourced by the recipes: what each of them does, in order. Nothing here runs by itself.
#
#   check      everything this machine lacks, at once (lopd doctor); a recipe ends here if anything
#              is missing
#   fetch      models and prompts from the hub; HF_HUB_OFFLINE=1 forbids it
#   prompts    training prompts without those of the evaluation sets
#   plan       memory, disk and hours
#   run        lopd run: every stage, from demonstrations to the exported model; the same command
#              goes on after a kill
#   evaluate   the benchmarks at the paper's length, for the student before and after
#
# Arguments of a recipe are steps (--only check,plan) and overrides (distill.num_steps=4). Those of
# sglang, evaluate and launch hold for the last step too, but for sglang.context_length, which
# follows its prompts there. LOPD_RUNS: where runs go; LOPD_HUB: where downloads go.

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hub_offline=${HF_HUB_OFFLINE-0}
# Not inside the checkout's environment, which may be made anew.
export LOPD_HUB=${LOPD_HUB:-${XDG_CACHE_HOME:-$HOME/.cache}/lopd/hub}
# In the image lopd is on the path. In a checkout the environment is made.
if ! command -v lopd >/dev/null; then
    # shellcheck source=../requirements/environment.sh
    source "$examples/../requirements/environment.sh"
fi
export HF_HUB_OFFLINE=$hub_offline
runs=${LOPD_RUNS:-$examples/../runs}
# The image's examples lie where its user may not write.
if ! mkdir -p "$runs" 2>/dev/null || [ ! -w "$runs" ]; then
    runs=$PWD/runs
    mkdir -p "$runs"
fi
runs=$(cd "$runs" && pwd)

# Benchmarks as "format source"; a recipe may name others.
math_benchmarks=(
    "aime_2024 hf://datasets/HuggingFaceH4/aime_2024@main/data"
    "aime_2025 hf://datasets/math-ai/aime25@main"
    "hmmt_2025 hf://datasets/MathArena/hmmt_feb_2025@main/data"
)

# prompts.eval of the configurations
held_out=("math_500 hf://datasets/HuggingFaceH4/MATH-500@main/test.jsonl")

say() { printf '== %s\n' "$*"; }

# Sets steps and overrides from a recipe's arguments.
read_arguments() {
    steps=check,fetch,prompts,plan,run,evaluate
    overrides=("run.dir=$runs/$recipe")
    evaluating=()
    while [ $# -gt 0 ]; do
        case $1 in
            --only) steps=${2:?--only needs steps, for example check,plan}; shift 2 ;;
            *=*)
                overrides+=("$1")
                case $1 in
                    sglang.context_length=*) ;;
                    sglang.* | evaluate.* | launch.*) evaluating+=("$1") ;;
                esac
                shift
                ;;
            *)
                echo "usage: bash $0 [--only check,fetch,prompts,plan,run,evaluate] [key=value ...]" >&2
                exit 2
                ;;
        esac
    done
}

wants() { [[ ,$steps, == *,$1,* ]]; }

# check_machine [names on the hub beside those of the configuration]
check_machine() {
    say "does this machine have what $recipe needs?"
    local also=() source
    for source in "$@"; do also+=(--also "$source"); done
    # 3 means that nothing is wrong, and the next step has something to download.
    local code=0
    lopd doctor "$config" "${overrides[@]}" "${also[@]}" || code=$?
    [ "$code" = 3 ] || return "$code"
}

# fetch_all NAME ...: those of the configuration, and these
fetch_all() {
    say "models and prompts"
    lopd fetch "$config" "${overrides[@]}"
    local source
    for source in "$@"; do lopd fetch "$source"; done
}

# clean_prompts SET FORMAT SOURCE [flags]: a prompt set without the benchmarks' questions; later
# steps read that file
clean_prompts() {
    local set=$1 format=$2 source=$3 out=$runs/prompts/$recipe-$1.jsonl benchmark against=()
    shift 3
    mkdir -p "$runs/prompts"
    for benchmark in "${math_benchmarks[@]}" "${held_out[@]}"; do
        against+=(--against "$(lopd fetch --path "${benchmark#* }"):${benchmark%% *}")
    done
    say "prompts.$set without the benchmarks' questions"
    lopd prompts prepare "$(lopd fetch --path "$source")" --format "$format" "${against[@]}" \
        --out "$out" "$@"
}

# use_prompts SET: from here on the configuration reads what clean_prompts wrote
use_prompts() {
    local out=$runs/prompts/$recipe-$1.jsonl
    if [ -f "$out" ]; then overrides+=("prompts.$1.file=$out" "prompts.$1.format=lopd"); fi
}

# evaluate_math MODEL ...: avg@32 at up to 32,768 tokens
evaluate_math() {
    local model benchmark format
    for model in "$@"; do
        for benchmark in "${math_benchmarks[@]}"; do
            format=${benchmark%% *}
            say "$format, $model"
            lopd evaluate --model "$runs/$recipe/$model/model" \
                --prompts "$(lopd fetch --path "${benchmark#* }")" \
                --format "$format" --task math --preset paper_math --out "$runs/$recipe-$format-$model" \
                "${serving[@]}" ${evaluating[@]+"${evaluating[@]}"}
        done
    done
}

# How the paper's models are served for the benchmarks.
serving=(
    sglang.tensor=2 sglang.replicas=4 sglang.max_running_requests=64 sglang.request_timeout_s=7200
    sglang.deterministic=false # as in the recipes; a mean over 32 samples does not rest on seeds
)

# The whole of a recipe with the paper's prompts.
run_math_recipe() {
    local benchmark sources=()
    for benchmark in "${math_benchmarks[@]}"; do sources+=("${benchmark#* }"); done
    if wants check; then check_machine "${sources[@]}"; fi
    if wants fetch; then fetch_all "${sources[@]}"; fi
    if wants prompts; then
        clean_prompts sft openthoughts3 "hf://datasets/open-thoughts/OpenThoughts3-1.2M@main/data" \
            --duplicates keep
        clean_prompts opd dapo_math_17k \
            "hf://datasets/BytedTsinghua-SIA/DAPO-Math-17k@main/data/dapo-math-17k.parquet"
    fi
    use_prompts sft
    use_prompts opd
    if wants plan; then lopd plan "$config" "${overrides[@]}"; fi
    if wants run; then lopd run "$config" "${overrides[@]}"; fi
    if wants evaluate; then evaluate_math sft distill; fi
}
