#!/usr/bin/env bash
# Runs this project on the image's own versions, on a machine without a GPU: Python 3.12, all wheels
# of docker/requirements.lock, megatron-core 0.18.2, Transformer Engine's own Python and, where nvcc
# is at hand, its compiled extension.
#
#   bash tests/image/run.sh             # everything: 25 minutes on two cores, once the environment
#                                       is there
#   bash tests/image/run.sh engine      # only these parts, of: verify patches engine trainer
#                                       servers
#
# PYTHON: a Python 3.12, where none is found. The environment is made once, beside the checkout; it
# takes 10 GB and some minutes.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then parts=(verify patches engine trainer servers); fi
engine=stub
if "$image/bin/pip" show -q transformer_engine_torch 2>/dev/null; then engine=real; fi
logs=$image/logs
mkdir -p "$logs"
rows=()
failed=0

# part NAME WHAT COMMAND ...: runs it, keeps its output, remembers its outcome
part() {
    local name=$1 what=$2 begun=$SECONDS outcome=passed
    shift 2
    echo "== $name: $what"
    if ! "$@" > "$logs/$name.log" 2>&1; then
        outcome=FAILED
        failed=1
        tail -n 30 "$logs/$name.log"
    fi
    local last
    last=$(grep -v '^$' "$logs/$name.log" | tail -n 1 | cut -c1-90)
    rows+=("$(printf '%-10s %-7s %5s s  %s' "$name" "$outcome" $((SECONDS - begun)) "$last")")
    echo "${rows[-1]}"
}

tests() { python -W ignore -m pytest -p no:cacheprovider -q -n 2 --dist loadscope --no-loadscope-reorder "$@"; }

for name in "${parts[@]}"; do
    case $name in
        verify) LOPD_ENGINE=$engine part verify "docker/verify_image.py --without-driver" \
            python docker/verify_image.py --without-driver --launcher "$launch/bin/python" ;;
        patches) LOPD_ENGINE=$engine part patches "megatron_patches as on a CPU and with CUDA said to be there, signatures, the image's files" \
            tests tests/test_megatron_patches.py tests/image/test_signatures.py tests/docker ;;
        engine) LOPD_ENGINE=$engine part engine "models and FusedAdam of Transformer Engine's own Python ($engine extension), arguments of every server" \
            tests tests/image ;;
        trainer) part trainer "tests/megatron on the image's megatron-core, local layers, gloo" tests tests/megatron tests/objective tests/batching ;;
        servers) part servers "tests/sglang on the image's SGLang, on a CPU; scores against the trainer" tests tests/sglang tests/test_agreement.py ;;
        *) echo "usage: bash $0 [verify] [patches] [engine] [trainer] [servers]" >&2; exit 2 ;;
    esac
done

versions() {
    python - "$@" <<'PY'
import importlib.metadata, platform, sys
print(", ".join([f"Python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in sys.argv[1:])]))
PY
}
echo
LOPD_ENGINE=$engine versions torch megatron-core transformer-engine sglang transformers nvidia-cublas
echo "Transformer Engine's extension: $engine"
printf '%s\n' "${rows[@]}"
exit $failed
