"""The tests as several processors would run them, and how far every figure stays from its limit.

``LOPD_PROCESSORS=1 bash tests/run.sh tests/megatron`` starts this; LOPD_PROCESSORS=avx2,sse takes
only these. The arguments go to pytest. Where LOPD_DIFFERENCES names a folder, the figures are kept
there, and the table is of all that the folder has. The exit code is 1 where a test fails, or where
a figure comes nearer to its limit than by the factor MARGIN.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests import limits
from tests.processors.imitation import PROCESSORS, environment_of, lacking
from tests.processors.table import MARGIN, near, read, show

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("-p", "no:cacheprovider", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")


def main() -> int:
    asked = os.environ.get("LOPD_PROCESSORS", "1")
    names = list(PROCESSORS) if asked == "1" else asked.split(",")
    unknown = [name for name in names if name not in PROCESSORS]
    if unknown:
        known = ", ".join(PROCESSORS)
        sys.exit(f"LOPD_PROCESSORS: unknown processor {unknown[0]}; known: 1 (all), {known}")
    with tempfile.TemporaryDirectory(prefix="lopd-processors-") as scratch:
        folder = Path(os.environ.get(limits.FILE) or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        failed = [name for name in names if not _passes(name, folder, Path(scratch))]
        rows = read(folder)
    print(show(rows))
    too_near = near(rows)
    if failed:
        print(f"tests failed on: {', '.join(failed)}")
    if too_near:
        print(f"{len(too_near)} figures are nearer to their limit than by a factor of {MARGIN}")
    return 1 if failed or too_near else 0


def _passes(name: str, folder: Path, scratch: Path) -> bool:
    """Whether the tests pass as on this processor; true where this machine cannot imitate it."""
    missing = lacking(PROCESSORS[name])
    if missing:
        print(f"{name}: skipped, this machine's processor has no {missing}", flush=True)
        return True
    environment = {**os.environ, **environment_of(PROCESSORS[name], scratch)}
    print(f"{name}: {_says_torch(environment)}", flush=True)
    environment[limits.FILE] = str(folder / f"{name}.jsonl")
    command = [sys.executable, "-m", "pytest", *SETTINGS, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def _says_torch(environment: Mapping[str, str]) -> str:
    """What torch takes the processor for."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return f"torch says {result.stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
