#!/usr/bin/env bash
# Makes the models of the examples from random weights, with this project's own sft stage, into
# examples/tiny_models/{teacher,student,small_student}. Ten to twenty minutes on 2 cores; run again
# after a kill it goes on from what is published. The models in the repository were made by this
# command. With names it makes these alone:
#
#   bash examples/tiny_models/make.sh small_student
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../requirements/environment.sh"
here="$root/examples/tiny_models"
work="$root/runs/tiny_models" # where the TOML files look

demonstrations() { # NAME KIND NUM SEED [SKIP]: the other seeds are the prompts of the examples
    python "$here/make_demonstrations.py" "$2" "$work/demonstrations/$1" \
        --tokenizer "$work/architecture" --num "$3" --seed "$4" --skip "${5:-0}"
}
train() { # NAME
    lopd sft "$here/$1.toml"
}
publish() { # NAME TARGET: a whole folder or none
    rm -rf "$here/$2.new"
    cp -r "$work/$1/sft/model" "$here/$2.new"
    rm -rf "${here:?}/$2"
    mv "$here/$2.new" "$here/$2"
    echo "made $here/$2"
}
robust_model() { # teacher and student both begin with it
    demonstrations careful careful 89600 11
    train careful
    demonstrations robust corrupted 19200 12
    train robust
}
make_teacher() {
    robust_model
    demonstrations teacher mixture 5120 13 0.03
    train teacher
    publish teacher teacher
}
make_student() {
    robust_model
    demonstrations base mixture 7680 14 0.5
    train base
    publish base student
}
make_small_student() {
    python "$here/make_architecture.py" --small "$work/small_architecture"
    demonstrations small careful 44800 15
    train small
    publish small small_student
}

python "$here/make_architecture.py" "$work/architecture"
[ $# -gt 0 ] || set -- teacher student small_student
for name in "$@"; do
    case $name in
        teacher | student | small_student) "make_$name" ;;
        *)
            echo "error: there is no model $name: teacher, student or small_student" >&2
            exit 2
            ;;
    esac
done
