#!/usr/bin/env bash
# The study of docs/study.md: makes its models, measures them and writes the page. The same command
# again goes on where it was ended. Arguments are those of `python -m examples.study`:
#
#   bash examples/study/run.sh --claims 1 3 --seeds 2 3
#   bash examples/study/run.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../requirements/environment.sh"
cd "$root"
exec python -m examples.study "$@"
