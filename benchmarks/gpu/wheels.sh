#!/usr/bin/env bash
# On a machine with a package index: fetches what an isolated GPU machine lacks, into files of at
# most 60 MiB. --help says more.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$here"
exec "${PYTHON:-python3}" -m benchmarks.gpu.wheels "$@"
