"""Why a training over several machines ended, as far as the files tell that each keeps beside its
log in the shared folder. Imports no torch.

Each machine's ranks touch a heartbeat file every second, and leave what ended them in an error
file. So a machine whose ranks waited in vain can say whether the others have gone, have stopped for
a reason of their own, or are alive behind a network that is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.artifacts import remove_folder
from lopd.megatron.ranks.nodes import Node

ERROR_SUFFIX, HEARTBEATS_SUFFIX = ".error.json", ".heartbeats"  # added to a log's name
COLLECTIVE = (
    "collective"  # where an error came up that says no more than that a rank waited in vain
)
_PEER = re.compile(
    r"(?:[Cc]onnection closed by peer|[Rr]ead error|writev) \[(?:::ffff:)?([0-9a-fA-F.:]+)\]"
)  # gloo's words
_POLL_S = 0.1


def log_of(log: Path, node: Node, index: int) -> Path:
    """The log of machine index, from this machine's: train.log of the first, train-node1.log, ..."""
    first = log.stem.removesuffix(f"-node{node.index}") if node.index else log.stem
    return log.with_name(f"{first}-node{index}{log.suffix}" if index else f"{first}{log.suffix}")


def forget_others(log: Path, node: Node) -> None:
    """Removes what the other machines have left of a former run; for the first machine, before it
    announces itself.
    """
    for index in _others(node):
        other = log_of(log, node, index)
        other.with_name(other.name + ERROR_SUFFIX).unlink(missing_ok=True)
        remove_folder(other.with_name(other.name + HEARTBEATS_SUFFIX))


def state_of_others(log: Path, node: Node, patience_s: float) -> str:
    """In words what has become of the other machines; takes up to patience_s to see whether they
    give a sign of life.
    """
    before, end = (
        {index: _beats(log_of(log, node, index)) for index in _others(node)},
        time.monotonic() + patience_s,
    )
    alive: set[int] = set()
    while time.monotonic() < end and len(alive) < len(before):
        time.sleep(_POLL_S)
        for index, beats in before.items():
            now = _beats(log_of(log, node, index))
            if (now and now != beats) or _error_of(log_of(log, node, index)) is not None:
                alive.add(index)
    for index in before:
        error = _error_of(log_of(log, node, index))
        if error is not None and error["where"] != COLLECTIVE:
            return f"machine {index} of {node.count} ended first: {error['what']}"
    silent = [index for index, beats in before.items() if index not in alive and beats]
    if silent:
        return f"{_named(silent, node)} no sign of life"
    ended = [index for index in before if index not in alive]
    if ended:
        return f"{_named(ended, node)} no running ranks"
    return f"{_named(list(before), node)} signs of life: see the network between them"


def lost_peer(error: RuntimeError) -> str | None:
    """The address of the other machine whose connection gloo has lost; None: it is another error,
    or a rank of this machine.
    """
    found = _PEER.search(str(error))
    if found is None or found[1] in _own_addresses():
        return None
    return found[1]


def _named(indices: list[int], node: Node) -> str:
    several = len(indices) > 1
    return f"machine{'s' if several else ''} {', '.join(map(str, indices))} of {node.count} {'have' if several else 'has'}"


def _others(node: Node) -> list[int]:
    return [index for index in range(node.count) if index != node.index]


def _beats(log: Path) -> Mapping[str, int]:
    """Heartbeat file -> when it was touched. Opened, since a network file system may remember the
    times of files that are not.
    """
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for path in log.with_name(log.name + HEARTBEATS_SUFFIX).iterdir():
            with contextlib.suppress(OSError), path.open("rb") as handle:
                found[path.name] = os.fstat(handle.fileno()).st_mtime_ns
    return found


def _error_of(log: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        about: dict[str, Any] = json.loads(
            log.with_name(log.name + ERROR_SUFFIX).read_text(encoding="utf-8")
        )
        return about
    return None


def _own_addresses() -> set[str]:
    import psutil

    return {one.address for found in psutil.net_if_addrs().values() for one in found}
