#!/usr/bin/env bash
# Distillation against more SFT, over five seeds: every model of the table of docs/small_student.md,
# one after the other on one core. The same command again goes on where it was ended. Arguments are
# those of examples/small_student/seeds.py:
#
#   bash examples/run_small_student.sh --seeds 2 3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../requirements/environment.sh"
exec python "$root/examples/small_student/seeds.py" "$@"
