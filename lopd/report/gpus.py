"""How full and how busy the GPUs of this machine are, as nvidia-smi says."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_PROGRAM = "nvidia-smi"
_QUERY = "index,memory.used,memory.total,utilization.gpu"
# A driver in trouble answers after minutes. Nobody waits so long for a picture.
_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Memory in MiB; ``busy`` in percent of the last second, or None."""

    index: int
    used: int
    total: int
    busy: int | None


def gpus() -> list[Gpu]:
    """Return the GPUs of this machine; none where nvidia-smi is missing or fails."""
    program = shutil.which(_PROGRAM)
    if program is None:
        return []
    # The program and not a library: it is there where the driver is, and needs no package.
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        index, used, total, busy = (*line.split(","), "", "", "", "")[:4]
        # A GPU that is cut into parts (MIG) gives no figure of some of these.
        if index.strip().isdigit() and used.strip().isdigit() and total.strip().isdigit():
            percent = int(busy) if busy.strip().isdigit() else None
            found.append(Gpu(int(index), int(used), int(total), percent))
    return found
