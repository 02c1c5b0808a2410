#!/usr/bin/env bash
# resume="must" of W&B means nothing offline: for a run that was never there it starts a new one,
# without an error or a warning, and for one that is there it begins at step 0 again.
# Size: 150 MB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq wandb==0.31.0
cd "$folder"
export HOME="$folder" TMPDIR="$folder" WANDB_MODE=offline WANDB_ERROR_REPORTING=false
"$folder/venv/bin/python" -I - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import sys

import wandb


def start(name, resume=None):
    settings = wandb.Settings(console="off")
    return wandb.init(project="one", id=name, resume=resume, dir=".", settings=settings)


print("wandb", wandb.__version__)
first = start("there")
for step in range(3):
    first.log({"loss": 1.0 / (step + 1)})
first.finish()
steps = {}
for name in ("there", "never-there"):
    with start(name, resume="must") as run:
        steps[name] = run.step
        print(f'resume="must" of the run {name!r}: resumed {run.resumed}, at step {run.step}')
print("expected: the first goes on at step 3, and the second is refused, as there is no such run")
with open("log") as log:
    spoken = [line.strip() for line in log if "resum" in line.lower()]
print("seen: both begin at step 0; lines about resuming on stderr:", spoken)
if steps != {"there": 0, "never-there": 0} or spoken:
    sys.exit("no longer so")
PYTHON
