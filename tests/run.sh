#!/usr/bin/env bash
# Prepares the environment where needed; lint, types, the documentation site, all tests. Arguments
# go to pytest. LOPD_SLOW=1 also runs what takes many minutes. LOPD_BROWSER=1 installs Debian's
# Chromium where there is none, for the tests of the report's page; without one they are skipped.
# LOPD_PROCESSORS=1 instead runs the tests as several processors would, and shows every figure
# beside its limit (tests/processors).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../requirements/environment.sh"
cd "$root"
if [ -n "${LOPD_PROCESSORS:-}" ]; then
    exec python -m tests.processors "$@"
fi
ruff check .
ruff format --check .
mypy
bash docs/build.sh
if [ "${LOPD_BROWSER:-0}" = 1 ]; then
    bash tests/report/install_chromium.sh
fi
python -m pytest -p no:cacheprovider -n 2 --dist loadscope --no-loadscope-reorder "$@"
