# Sourced by the example and test scripts: the environment, and caches that stay inside the
# checkout.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/requirements/install.sh"
export PATH="$root/.venv/bin:$PATH" XDG_CACHE_HOME="$root/.venv/cache" XDG_CONFIG_HOME="$root/.venv/config" HF_HOME="$root/.venv/cache/huggingface"
export TRITON_CACHE_DIR="$root/.venv/cache/triton" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$XDG_CACHE_HOME" "$XDG_CONFIG_HOME"
if [ ${#root} -le 40 ]; then  # sockets live in TMPDIR, and a socket's path may have 107 characters
    export TMPDIR="$root/.venv/tmp"
    mkdir -p "$TMPDIR"
fi
