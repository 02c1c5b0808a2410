"""A fake server in a process of its own that answers /generate as fast as Python can: for tests
with 100,000 responses. ``python -m tests.sglang.quick_fake``.

Prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.sglang.answers import generations


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pending += data
        while True:
            head, separator, rest = self._pending.partition(b"\r\n\r\n")
            if not separator:
                return
            lengths = [
                line.partition(b":")[2]
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            ]
            length = int(lengths[0]) if lengths else 0
            if len(rest) < length:
                return
            self._pending = rest[length:]
            answer = json.dumps(
                _answer(head.split(b" ", 2)[1].decode(), rest[:length]), separators=(",", ":")
            ).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(answer)
                + answer
            )


def _answer(path: str, body: bytes) -> Any:
    if path == "/generate":
        return generations(json.loads(body), "default")
    return {"version": "0.5.17", "weight_version": "default", "model_path": ""}


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=256)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


@contextlib.contextmanager
def quick_fake() -> Iterator[str]:
    """Its URL, as long as the block lasts."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.sglang.quick_fake"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_serve())
