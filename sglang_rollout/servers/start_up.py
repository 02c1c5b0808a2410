"""The start of a server: the checkpoint before it, and the wait until it has answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import httpx

from lopd.config import SGLangSection
from lopd.errors import EngineError
from lopd.processes import last_lines
from sglang_rollout.servers.log_summary import log_summary
from sglang_rollout.servers.ports import AddressTaken

# Short beside a start, which takes a minute and more.
_POLL_S = 0.05


class Starting(Protocol):
    """What the wait for a start needs of a server."""

    name: str
    log: Path
    port: int
    settings: SGLangSection

    def alive(self) -> bool: ...

    def suspended(self) -> bool: ...


def check_checkpoint(model_dir: Path, name: str) -> None:
    """Find now what SGLang would report after a minute of imports, deep in a traceback.

    Args:
        model_dir: The folder of the Hugging Face checkpoint.
        name: The name of the server in the error.

    Raises:
        EngineError: The folder holds no checkpoint.
    """
    config = model_dir / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the {name} checkpoint has no readable config.json ({error})",
            where=str(model_dir),
            remedy="give the folder of a Hugging Face checkpoint",
        ) from None
    if not any(model_dir.glob("*.safetensors")):
        raise EngineError(
            f"the {name} checkpoint has no safetensors files",
            where=str(model_dir),
            remedy="give the folder of a Hugging Face checkpoint",
        )


def wait_until_healthy(
    server: Starting, client: httpx.Client, progress: Callable[[float], None] | None
) -> None:
    """Wait until the server generates a token.

    Args:
        server: The server, whose process has been started.
        client: Asks the server.
        progress: A function that is called with the seconds waited so far.

    Raises:
        EngineError: The server will not become healthy any more.
    """
    began = time.monotonic()
    last_ran = began
    while True:
        waited = time.monotonic() - began
        # stop() may just have taken the process. Then it is not suspended but dead, and
        # _check_start() says so.
        if not server.suspended():
            last_ran = time.monotonic()
        _check_start(server, waited, time.monotonic() - last_ran)
        # A server that accepts the request and then hangs must not hold this loop longer than it
        # would hold the watcher.
        left = server.settings.start_timeout_s - waited
        if _answers(client, min(left, server.settings.hang_timeout_s)):
            return
        if progress is not None:
            progress(waited)
        time.sleep(_POLL_S)


def _check_start(server: Starting, waited_s: float, stopped_s: float) -> None:
    """Raise EngineError where the server will not become healthy any more.

    Args:
        server: The server.
        waited_s: Seconds since the start.
        stopped_s: Seconds for which the whole process group has been stopped (SIGSTOP).
    """
    hang_timeout_s = server.settings.hang_timeout_s
    # A long start may still end well, so it gets start_timeout_s. A stopped one cannot end, so it
    # gets only the patience for a server that hangs.
    if stopped_s > hang_timeout_s:
        raise _not_started(
            server,
            f"the {server.name} server was stopped (SIGSTOP) while it started",
            limit=f"at most sglang.hang_timeout_s = {hang_timeout_s:g}",
            remedy="do not stop the server while it starts",
        )
    if not server.alive():
        # The HTTP server inside SGLang writes this line when its bind fails.
        if "address already in use" in " ".join(last_lines(server.log, 40)):
            raise AddressTaken(
                f"port {server.port} was taken while the {server.name} server started",
                where=str(server.log),
            )
        raise _not_started(
            server,
            f"the {server.name} server did not start",
            remedy="read the log and correct its error, then run the same command again",
        )
    # Last, because a death or a stop is the better explanation of a start that takes long.
    if waited_s > server.settings.start_timeout_s:
        raise _not_started(
            server,
            f"the {server.name} server is not healthy after {waited_s:.0f} s",
            limit=f"at most sglang.start_timeout_s = {server.settings.start_timeout_s:g}",
            remedy="read the log; if the log has no error, raise sglang.start_timeout_s",
        )


def _not_started(server: Starting, what: str, *, remedy: str, limit: str = "") -> EngineError:
    what = f"{what}; its log ends: {log_summary(server.log)}"
    return EngineError(what, where=str(server.log), limit=limit, remedy=remedy)


def _answers(client: httpx.Client, patience_s: float) -> bool:
    """Return whether the server generates a token.

    Nothing listens on the port until the workers have loaded the model.
    """
    # A token and not a health check: it shows that the model computes, and it is the warm-up.
    # On this machine a connection comes at once or not at all.
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    timeout = httpx.Timeout(max(patience_s, 1.0), connect=1.0)
    try:
        return client.post("/generate", json=body, timeout=timeout).status_code == 200
    except httpx.TransportError:
        return False
