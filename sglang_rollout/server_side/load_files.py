"""In a server's processes: SGLang's scheduler tells its load through a file
``/dev/shm/sglang_loads_RANDOM`` that nobody ever removes. Ours goes into the server's TMPDIR, and
goes with it (sglang_rollout.servers.scratch).

Upstream: sglang/srt/managers/load_snapshot.py, shm_path_for; writer and reader both ask it, in
processes of one environment. Versions: 0.5.17 to 0.5.23. Only keeps the machine tidy: left out
where upstream has no such function. Can go: when SGLang removes its file.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path


def install() -> None:
    try:
        module = importlib.import_module("sglang.srt.managers.load_snapshot")
        original = module.shm_path_for
    except (ImportError, AttributeError):
        return

    def shm_path_for(ipc_name: str) -> str:
        return str(Path(os.environ["TMPDIR"]) / Path(original(ipc_name)).name)

    module.shm_path_for = shm_path_for  # type: ignore[attr-defined]
