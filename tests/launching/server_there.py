"""A server on the address given, until it is ended: ``python -m tests.launching.server_there MODEL
ADDRESS PORT LOG``. Its key: LOPD_SGLANG_KEY.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lopd.config import load_config
from sglang_rollout.servers.launch import KEY_VARIABLE
from sglang_rollout.servers.server import SGLangServer

TINY = Path(__file__).parents[2] / "examples/tiny_moe.toml"


def main(model: str, address: str, port: str, log: str) -> None:
    settings = load_config(
        TINY, [f"sglang.host={address}", f"sglang.port={port}", "sglang.restarts=0"]
    ).sglang
    with SGLangServer(Path(model), settings, log=Path(log), api_key=os.environ[KEY_VARIABLE]):
        print("serving", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
