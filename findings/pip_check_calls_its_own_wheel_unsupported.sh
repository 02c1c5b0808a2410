#!/usr/bin/env bash
# pip installs a wheel and its own `pip check` then calls it "not supported on this platform".
# Installing goes by the tag in the file's name (py3), checking by the tag inside (cp310), and
# Transformer Engine's wheels for CUDA 13 have different ones. Size: 0.7 GB on disk.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq pip==26.3
"$folder/venv/bin/pip" install -qq transformer_engine_cu13==2.16.1 pydantic==2.14.3
cd "$folder"
"$folder/venv/bin/python" -I - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import distribution, version

wheel = distribution("transformer_engine_cu13")
tags = [line for line in wheel.read_text("WHEEL").splitlines() if line.startswith("Tag")]
check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
print("pip", version("pip"), "transformer_engine_cu13", wheel.version)
print("Python", sys.version.split()[0], "; inside the wheel:", tags)
print("expected: pip check has no complaint about what pip has just installed")
print(f"seen: exit status {check.returncode}, {check.stdout.strip()!r}")
if check.returncode == 0 or "is not supported on this platform" not in check.stdout:
    sys.exit("no longer so")
PYTHON
