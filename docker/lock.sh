#!/usr/bin/env bash
# Resolves the image's environment anew, for Python 3.12 on x86-64 Linux with CUDA 13, wheels only, with hashes. Needs uv (pip install uv) and a package index;
# downloads metadata, no wheels. Writes requirements.lock and transformer_engine_torch.lock. Arguments go to uv, for example --upgrade.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=versions.env
source versions.env
export UV_PYTHON_DOWNLOADS=never UV_CUSTOM_COMPILE_COMMAND="bash docker/lock.sh"
common=(--python-version "$PYTHON_VERSION" --python-platform x86_64-manylinux_2_39 --generate-hashes --no-emit-index-url --quiet)
uv pip compile requirements.in ../pyproject.toml --override overrides.txt "${common[@]}" --only-binary :all: --output-file requirements.lock "$@"
# a source distribution: only its hash is wanted here, what it needs at run time stands in requirements.in
echo "transformer-engine-torch==$TRANSFORMER_ENGINE_VERSION" | uv pip compile - "${common[@]}" --no-deps --output-file transformer_engine_torch.lock
