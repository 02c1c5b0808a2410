#!/usr/bin/env bash
# Makes .venv with the pinned lock beside this checkout's pyproject.toml, once; later calls find the
# stamp and return at once, offline. torch first, then the rest with --no-deps: SGLang declares CUDA
# packages and another torch, which a CPU needs none of.
# Environment: PYTHON (default python3.11), LOPD_TORCH_ARGS (for example
# "--index-url https://download.pytorch.org/whl/cpu" for the small CPU build).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
torch="torch==2.13.0"
wanted=$( { echo "$torch"; cat "$root/requirements/cpu.lock" "$root/pyproject.toml"; } | sha256sum | cut -d' ' -f1)
if [ -f "$venv/lock.sha256" ] && [ "$(cat "$venv/lock.sha256")" = "$wanted $root" ]; then exit 0; fi

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "lopd: Python 3.11 is needed (the lock is made for it); install it or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    exit 2
fi
echo "lopd: installing the pinned environment into $venv (once, one to some minutes, 2.6 GB)" >&2
# pip is quiet for minutes where a download is slow, so each step says that it has begun.
say() { echo "lopd: $1 of 4: $2" >&2; }
say 1 "an empty environment"
if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" || { echo "lopd: python has no venv module; on Debian: apt install python3.11-venv" >&2; exit 2; }
fi
pip() { "$venv/bin/pip" --disable-pip-version-check -qq "$@"; }
say 2 "$torch, the largest download"
# shellcheck disable=SC2086  # several words on purpose
pip install ${LOPD_TORCH_ARGS:-} "$torch"
say 3 "$(grep -c '==' "$root/requirements/cpu.lock") other packages"
pip install --no-deps -r "$root/requirements/cpu.lock"
say 4 "lopd itself"
pip install --no-deps --no-build-isolation --editable "$root"
echo "$wanted $root" > "$venv/lock.sha256"
echo "lopd: installed; activate it with: . $venv/bin/activate" >&2
