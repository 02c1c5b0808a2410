"""One training over several machines that share the run directory.

Every machine runs the same command. The torchrun of the first machine opens the rendezvous store
on its own address and a free port. It announces both in a file of the stage's folder, and touches
the file every second as long as it lives. The other machines wait for this file, join the store,
and end when the stage is done. So the user does not need to know an address or a port beforehand.

This module imports no torch.
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

# Environment variable: which machine this is. "0/2" is the first of two. lopd sft --node sets it.
NODE = "LOPD_NODE"
# Environment variable of torchrun: the file in which the first machine announces itself.
ANNOUNCEMENT = "LOPD_ANNOUNCEMENT"
# Environment variable: the address of this machine for the others, if its host name does not tell.
ADDRESS = "LOPD_NODE_ADDRESS"
# Seconds between two touches of the announcement.
_BEAT_S = 1.0


@dataclass(frozen=True)
class Node:
    """Machine ``index`` of ``count``. The first machine has index 0."""

    index: int
    count: int

    @classmethod
    def from_text(cls, text: str) -> Node:
        """Read "0/2" as machine 0 of 2."""
        index, _, count = text.partition("/")
        return cls(int(index), int(count))

    @property
    def text(self) -> str:
        """The form that from_text reads."""
        return f"{self.index}/{self.count}"


def this_node(count: int, environment: Mapping[str, str] = os.environ) -> Node | None:
    """Return which machine this is, or None if the training takes only one.

    Args:
        count: The knob parallel.nodes.
        environment: The variables in which LOPD_NODE is looked up.

    Raises:
        ConfigError: LOPD_NODE is not set, or it names another number of machines.
    """
    if count == 1:
        return None
    # From the environment: the cluster starts the same command on every machine.
    text = environment.get(NODE)
    if text is None:
        on_each = f"lopd sft --node 0/{count} here and --node 1/{count} there"
        raise ConfigError(
            f"parallel.nodes = {count}, but the number of this machine is not given",
            where=NODE,
            remedy=f"start the command on all machines with lopd launch, or {on_each}",
        )
    # Otherwise machines would wait for others that nobody has started.
    node = Node.from_text(text)
    if node.count != count:
        raise ConfigError(
            f"--node is {text}, but parallel.nodes = {count}",
            where=NODE,
            limit=f"exactly {count} machines: --node i/{count}",
            remedy="give --node and parallel.nodes the same number of machines",
        )
    return node


def own_address(environment: Mapping[str, str] = os.environ) -> str:
    """Return an address of this machine that other machines reach.

    Raises:
        TrainingError: This machine has no address but loopback.
    """
    # The user's word wins.
    if environment.get(ADDRESS):
        return environment[ADDRESS]
    # Many systems map their own host name to a loopback address in /etc/hosts. Other machines
    # cannot use that one.
    with contextlib.suppress(OSError):
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    # Last, the address from which this machine would talk to the world. 192.0.2.1 is reserved for
    # documentation, and a datagram socket sends nothing when it connects. So no packet leaves.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    raise TrainingError(
        "this machine has no network address except loopback",
        where=socket.gethostname(),
        remedy=f"set {ADDRESS} to the address of this machine",
    )


def interface_towards(address: str) -> str:
    """Return the network interface by which this machine reaches an address.

    The address may be one of this machine.

    Raises:
        TrainingError: This machine has no route to the address, or no interface has the address
            from which it would be reached.
    """
    import psutil

    try:
        # The kernel chooses the address of this side when a datagram socket connects.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            mine = str(probe.getsockname()[0])
    except OSError as error:
        raise TrainingError(
            f"this machine has no route to {address} ({error.strerror})",
            where=socket.gethostname(),
            remedy="repair the network between the machines",
        ) from None
    # gloo and NCCL take the name of an interface, not an address.
    names: list[str] = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.address == mine
    ]
    if not names:
        raise TrainingError(
            f"no network interface has the address {mine}",
            where=address,
            remedy=f"set {ADDRESS} to the address of this machine",
        )
    return names[0]


@contextlib.contextmanager
def announcing(path: Path, address: str, port: int) -> Iterator[None]:
    """Announce the store of the first machine while the block runs.

    Args:
        path: The file of the announcement, in a folder that all machines share.
        address: The address on which the store listens.
        port: The port on which the store listens.
    """
    # A rename shows the whole file at once. Another machine never reads half of it.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"address": address, "port": port}), encoding="utf-8")
    partial.rename(path)
    ended = threading.Event()

    def beat() -> None:
        # The file may be removed with its folder while the thread still runs.
        with contextlib.suppress(FileNotFoundError):
            while not ended.wait(_BEAT_S):
                os.utime(path)

    thread = threading.Thread(target=beat, name="announcement", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # The thread ends first, or it could touch the announcement of the next training.
        thread.join()
        path.unlink(missing_ok=True)


def await_announcement(
    path: Path, *, done: Callable[[], bool], interval_s: float = 1.0
) -> tuple[str, int] | None:
    """Wait for the first machine and return the address and port of its store.

    Args:
        path: The file of the announcement.
        done: A function that returns whether there is nothing to join any more. It is called before
            each look.
        interval_s: The seconds between two looks.

    Returns:
        (address, port), or None as soon as done() is true.
    """
    # A run that was killed leaves its announcement behind. Only a file that changes while it is
    # watched belongs to a machine that is alive. The times are compared for equality only, because
    # the clocks of the machines may differ.
    seen: int | None = None
    while not done():
        try:
            changed = path.stat().st_mtime_ns
            if seen is not None and changed != seen:
                fields = json.loads(path.read_text(encoding="utf-8"))
                return str(fields["address"]), int(fields["port"])
            seen = changed
        # The file is not there yet, or was replaced meanwhile.
        except (FileNotFoundError, ValueError):
            seen = None
        time.sleep(interval_s)
    return None
