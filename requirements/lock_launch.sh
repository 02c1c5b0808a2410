#!/usr/bin/env bash
# Resolves nemo-run's own environment anew (Python 3.11 and later, Linux), with hashes; writes requirements/launch.lock. Needs uv and a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export UV_PYTHON_DOWNLOADS=never UV_CUSTOM_COMPILE_COMMAND="bash requirements/lock_launch.sh"
uv pip compile launch.in --universal --python-version 3.11 --generate-hashes --only-binary :all: --no-emit-index-url --quiet --output-file launch.lock "$@"
