#!/usr/bin/env bash
# Makes .venv-launch: nemo-run and what it needs, apart from lopd's environment, from a lock with
# hashes. Later calls find the stamp and return at once. lopd launch finds it there; elsewhere name
# its python: LOPD_LAUNCH_PYTHON=/path/to/python.
# Environment: PYTHON (3.11 or newer), LOPD_LAUNCH_VENV (where), LOPD_SKYPILOT=1 (also SkyPilot,
# which is not in the lock).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LOPD_LAUNCH_VENV:-$root/.venv-launch}
wanted="$(sha256sum < "$root/requirements/launch.lock" | cut -d' ' -f1) ${LOPD_SKYPILOT:-0}"
if [ -f "$venv/lock.sha256" ] && [ "$(cat "$venv/lock.sha256")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "lopd: Python 3.11 or newer is needed; install it or name it: PYTHON=/path/to/python bash $0" >&2
    exit 2
fi
echo "lopd: installing nemo-run into $venv (once)" >&2
"$python" -m venv "$venv" || { echo "lopd: python has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
pip() { "$venv/bin/pip" --disable-pip-version-check -qq "$@"; }
pip install --no-deps --require-hashes --only-binary :all: -r "$root/requirements/launch.lock"
if [ "${LOPD_SKYPILOT:-0}" = 1 ]; then pip install "skypilot>=0.12.3"; fi
echo "$wanted" > "$venv/lock.sha256"
