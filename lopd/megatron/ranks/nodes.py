"""One training over several machines that share the run directory: which machine this is, and how
the others find the first one. Imports no torch.

Every machine runs the same command. The first one drives: its torchrun opens the store on its own
address and a free port, and announces both in a file of the stage's folder, touched every second as
long as it lives. The others wait for an announcement that they see change (a stale one, of a run
that was killed, does not), join it, and end when the stage is done. So nobody needs to know an
address or a port beforehand.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lopd.errors import ConfigError, TrainingError

NODE = (
    "LOPD_NODE"  # environment variable: "0/2", the first of two machines; lopd sft --node sets it
)
ANNOUNCEMENT = "LOPD_ANNOUNCEMENT"  # environment variable of torchrun: the file
# environment variable: this machine's address for the others, where its host name does not tell
ADDRESS = "LOPD_NODE_ADDRESS"
_BEAT_S = 1.0


@dataclass(frozen=True)
class Node:
    """Machine ``index`` of ``count``."""

    index: int
    count: int

    @classmethod
    def from_text(cls, text: str) -> Node:
        index, _, count = text.partition("/")
        return cls(int(index), int(count))

    @property
    def text(self) -> str:
        return f"{self.index}/{self.count}"


def this_node(count: int, environment: Mapping[str, str] = os.environ) -> Node | None:
    """This machine where a training takes several; None where it takes one. ConfigError: nobody has
    said which one this is, or there are not as many.
    """
    if count == 1:
        return None
    text = environment.get(NODE)
    if text is None:
        remedy = f"start it on all of them: lopd launch, or lopd sft --node 0/{count} here and --node 1/{count} there"
        raise ConfigError(
            f"parallel.nodes = {count}: which one is this?", where=NODE, remedy=remedy
        )
    node = Node.from_text(text)
    if node.count != count:
        raise ConfigError(
            f"--node {text} for parallel.nodes = {count}",
            where=NODE,
            limit=f"i/{count}",
            remedy="give both the same number",
        )
    return node


def own_address(environment: Mapping[str, str] = os.environ) -> str:
    """An address of this machine that others reach: as told, else that of its host name, else the
    one from which it would talk to the world.
    """
    if environment.get(ADDRESS):
        return environment[ADDRESS]
    with contextlib.suppress(OSError):
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(
            ("192.0.2.1", 9)
        )  # an address for documentation; a datagram socket sends nothing when it connects
        return str(probe.getsockname()[0])
    raise TrainingError(
        "this machine has no address but loopback",
        where=socket.gethostname(),
        remedy=f"name one in {ADDRESS}",
    )


def interface_towards(address: str) -> str:
    """The network interface by which this machine reaches an address (which may be its own)."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            mine = str(probe.getsockname()[0])
    except OSError as error:
        raise TrainingError(
            f"no way to {address} ({error.strerror})",
            where=socket.gethostname(),
            remedy="mend the network between the machines",
        ) from None
    names: list[str] = [
        name
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.address == mine
    ]
    if not names:
        raise TrainingError(
            f"no network interface has {mine}",
            where=address,
            remedy=f"name this machine's address in {ADDRESS}",
        )
    return names[0]


@contextlib.contextmanager
def announcing(path: Path, address: str, port: int) -> Iterator[None]:
    """Tells the other machines where the first one's store is, as long as the block lasts."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"address": address, "port": port}), encoding="utf-8")
    partial.rename(path)
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(FileNotFoundError):
            while not ended.wait(_BEAT_S):
                os.utime(path)

    thread = threading.Thread(target=beat, name="announcement", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def await_announcement(
    path: Path, *, done: Callable[[], bool], interval_s: float = 1.0
) -> tuple[str, int] | None:
    """(address, port) of the first machine once its announcement is seen to be alive; None as soon
    as done() says that there is nothing to join.
    """
    seen: int | None = None
    while not done():
        try:
            changed = path.stat().st_mtime_ns
            if seen is not None and changed != seen:
                about = json.loads(path.read_text(encoding="utf-8"))
                return str(about["address"]), int(about["port"])
            seen = changed
        except (FileNotFoundError, ValueError):
            seen = None
        time.sleep(interval_s)
    return None
