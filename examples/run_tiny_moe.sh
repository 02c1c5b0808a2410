#!/usr/bin/env bash
# Lightning OPD on a laptop: real SGLang, real Megatron-Core (2 ranks: tensor=2, expert=2), a small
# mixture-of-experts student. About 70 seconds on 2 quiet cores. Arguments are dotted overrides:
#
#   bash examples/run_tiny_moe.sh distill.num_steps=4
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../requirements/environment.sh"
exec lopd run "$root/examples/tiny_moe.toml" "$@"
