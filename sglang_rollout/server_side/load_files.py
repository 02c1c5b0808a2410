"""In a server's processes: the files in which SGLang's scheduler writes its load.

SGLang writes ``/dev/shm/sglang_loads_RANDOM`` and never removes it. Here the file goes into the
server's TMPDIR, and is removed with it (sglang_rollout.servers.scratch).

Upstream: shm_path_for in sglang/srt/managers/load_snapshot.py. Versions: 0.5.17 to 0.5.23. This
only keeps the machine tidy, so it is left out where upstream has no such function. Remove it when
SGLang removes its file.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path


def install() -> None:
    """Replace SGLang's function that names the file, if there is one."""
    try:
        # Imported by name, because versions before and after may not have it.
        module = importlib.import_module("sglang.srt.managers.load_snapshot")
        original = module.shm_path_for
    except (ImportError, AttributeError):
        return

    # The writer and the reader are different processes. Both ask this function, and both have the
    # same environment, so they still find each other.
    def shm_path_for(ipc_name: str) -> str:
        return str(Path(os.environ["TMPDIR"]) / Path(original(ipc_name)).name)

    module.shm_path_for = shm_path_for  # type: ignore[attr-defined]
