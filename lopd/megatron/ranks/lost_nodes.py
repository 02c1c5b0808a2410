"""Why a training over several machines ended.

Each machine keeps files beside its log in the shared folder. Its ranks touch a heartbeat file every
second, and they write what ended them into an error file. So a machine whose ranks waited in vain
can tell three cases apart: the others are gone, the others stopped for a reason of their own, or
the others are alive and the network between the machines is broken.

This module imports no torch.
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

# These suffixes are added to the name of a log.
ERROR_SUFFIX = ".error.json"
HEARTBEATS_SUFFIX = ".heartbeats"
# The `where` of an error that only says that a rank waited in vain. Its cause is on another rank.
COLLECTIVE = "collective"
# The end of the remedies for a training that was interrupted.
RESUMES = "run the same command again: it continues from the newest checkpoint"
# gloo's words for a lost connection, with the address of the other side in brackets.
_PEER = re.compile(
    r"(?:[Cc]onnection closed by peer|[Rr]ead error|writev) \[(?:::ffff:)?([0-9a-fA-F.:]+)\]"
)
# Seconds between two looks at the files of the other machines.
_POLL_S = 0.1


def log_of(log: Path, node: Node, index: int) -> Path:
    """Return the log of another machine.

    Args:
        log: The log of this machine.
        node: This machine.
        index: The number of the other machine. The logs are train.log, train-node1.log and so on.
    """
    first = log.stem.removesuffix(f"-node{node.index}") if node.index else log.stem
    return log.with_name(f"{first}-node{index}{log.suffix}" if index else f"{first}{log.suffix}")


def remove_reports_of_others(log: Path, node: Node) -> None:
    """Remove the error files and heartbeats of an earlier run of other machines.

    The first machine does this before it announces itself. Later the files belong to this run.
    """
    for index in _others(node):
        other = log_of(log, node, index)
        other.with_name(other.name + ERROR_SUFFIX).unlink(missing_ok=True)
        remove_folder(other.with_name(other.name + HEARTBEATS_SUFFIX))


def describe_other_nodes(log: Path, node: Node, patience_s: float) -> str:
    """Return in words what has become of the other machines.

    Args:
        log: The log of this machine.
        node: This machine.
        patience_s: The seconds at most to wait for a sign of life of the others.
    """
    before = {index: _beats(log_of(log, node, index)) for index in _others(node)}
    deadline = time.monotonic() + patience_s
    alive: set[int] = set()
    # A machine is alive if one of its heartbeats changes, or if it was able to report an error.
    # One look is not enough, because the clocks of the machines may differ.
    while time.monotonic() < deadline and len(alive) < len(before):
        time.sleep(_POLL_S)
        for index, beats in before.items():
            now = _beats(log_of(log, node, index))
            if (now and now != beats) or _error_of(log_of(log, node, index)) is not None:
                alive.add(index)
    # The cause first: a machine that ended for a reason of its own.
    for index in before:
        error = _error_of(log_of(log, node, index))
        if error is not None and error["where"] != COLLECTIVE:
            return f"machine {index} of {node.count} ended first: {error['what']}"
    # Heartbeat files that nobody touches: the machine or its ranks were killed or are cut off.
    silent = [index for index, beats in before.items() if index not in alive and beats]
    if silent:
        return f"{_named(silent, node)} no sign of life"
    # Ranks remove their heartbeat files when they end well.
    ended = [index for index in before if index not in alive]
    if ended:
        return f"{_named(ended, node)} no running ranks"
    return f"{_named(list(before), node)} signs of life: see the network between them"


def lost_peer_address(error: RuntimeError) -> str | None:
    """Return the address of the other machine whose connection gloo has lost.

    None means that it is another error, or that the lost rank is on this machine.
    """
    found = _PEER.search(str(error))
    if found is None or found[1] in _own_addresses():
        return None
    return found[1]


def _named(indices: list[int], node: Node) -> str:
    noun, verb = ("machines", "have") if len(indices) > 1 else ("machine", "has")
    return f"{noun} {', '.join(map(str, indices))} of {node.count} {verb}"


def _others(node: Node) -> list[int]:
    return [index for index in range(node.count) if index != node.index]


def _beats(log: Path) -> Mapping[str, int]:
    """Return for each heartbeat file of a machine when it was touched, in nanoseconds."""
    found: dict[str, int] = {}
    # Files come and go while this process reads the folder.
    with contextlib.suppress(OSError):
        for path in log.with_name(log.name + HEARTBEATS_SUFFIX).iterdir():
            # The file is opened, because a network file system may answer a plain stat with a time
            # that it remembers. Opening a file makes it ask the server.
            with contextlib.suppress(OSError), path.open("rb") as handle:
                found[path.name] = os.fstat(handle.fileno()).st_mtime_ns
    return found


def _error_of(log: Path) -> dict[str, Any] | None:
    path = log.with_name(log.name + ERROR_SUFFIX)
    # The file is not there, or the other machine has not finished writing it.
    with contextlib.suppress(OSError, ValueError):
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return fields
    return None


def _own_addresses() -> set[str]:
    # Imported here, because it is needed after a failure only.
    import psutil

    return {
        address.address for addresses in psutil.net_if_addrs().values() for address in addresses
    }
