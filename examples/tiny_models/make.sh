#!/usr/bin/env bash
# Makes the example's teacher and base student from random weights, with this project's own sft
# stage, into examples/tiny_models/{teacher,student}. Ten to twenty minutes on 2 cores; run again
# after a kill it goes on from what is published. The models in the repository were made by this
# command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../requirements/environment.sh"
here="$root/examples/tiny_models"
work="$root/runs/tiny_models" # where the TOML files look

python "$here/make_architecture.py" "$work/architecture"

demonstrations() { # NAME KIND NUM SEED [SKIP]: seeds 1 to 9 are the example's own prompts
    python "$here/make_demonstrations.py" "$2" "$work/demonstrations/$1" \
        --tokenizer "$work/architecture" --num "$3" --seed "$4" --skip "${5:-0}"
}
demonstrations careful careful 89600 11
demonstrations robust corrupted 19200 12
demonstrations teacher mixture 5120 13 0.03
demonstrations base mixture 7680 14 0.5

for name in careful robust teacher base; do
    lopd sft "$here/$name.toml"
done

publish() { # NAME TARGET: a whole folder or none
    rm -rf "$here/$2.new"
    cp -r "$work/$1/sft/model" "$here/$2.new"
    rm -rf "${here:?}/$2"
    mv "$here/$2.new" "$here/$2"
}
publish teacher teacher
publish base student
echo "made $here/teacher and $here/student"
