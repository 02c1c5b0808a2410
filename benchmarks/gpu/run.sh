#!/usr/bin/env bash
# Measures on one H100 or H200, in 12 minutes and without a network, what docs/gpu_results.md still
# lacks. --dry-run starts every part at a tiny size on a CPU. --help says more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && ! "$python" -c "import torch" 2>/dev/null; then
    # shellcheck source=/dev/null
    source "$here/requirements/environment.sh"
    python=$here/.venv/bin/python
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
cd "$here"
exec "$python" -W ignore -m benchmarks.gpu.run "$@"
