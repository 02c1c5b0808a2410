"""torchrun with a rendezvous store that listens on one address only.

``python -m lopd.megatron.ranks.torchrun`` takes torchrun's own options.

By itself torchrun's agent opens a TCPStore that listens on every interface, whatever --master-addr
says. Here the store is opened before, on a socket of ours, and the agent shares it
(``multi_tenant``). On one machine the store listens on loopback. Of several machines
(lopd.megatron.ranks.nodes) the first one opens it on the address by which the others reach it, and
announces it to them.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported without __all__
from torch.distributed.run import main as torchrun

from lopd.megatron.ranks.nodes import ANNOUNCEMENT, NODE, Node, announcing, own_address

# Ranks of one machine meet here, where no other machine can connect.
_LOOPBACK = "127.0.0.1"


def open_store(host: str = _LOOPBACK) -> TCPStore:
    """Return the store of this process. It listens on a free port of this address alone."""
    # Port 0 lets the kernel choose. The socket is handed over while it listens, so no other program
    # can take the port between the choice and the use.
    listener = socket.create_server((host, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        # The ranks do not exist yet.
        wait_for_workers=False,
        # A later TCPStore of this process with the same port is this one: the agent's.
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def main(options: list[str]) -> None:
    """Run torchrun with these options on this machine."""
    # torchrun reads variables that begin with PET_ as options. Kubernetes sets them for its own
    # launcher. torchrun would take those whose option is not among ours.
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]
    # LOPD_NODE alone may be set for a stage that runs on one machine.
    node = Node.from_text(os.environ[NODE]) if ANNOUNCEMENT in os.environ else Node(0, 1)
    # The agent keeps the errors of its ranks in a folder. One of its own choice would stay behind.
    with tempfile.TemporaryDirectory(prefix="lopd-torchrun-") as error_folder:
        place = [f"--nnodes={node.count}", f"--node-rank={node.index}", f"--log-dir={error_folder}"]
        _run(node, [*place, *options])


def _run(node: Node, options: list[str]) -> None:
    # A machine that joins has the address and the port among its options.
    if node.index > 0:
        torchrun(options)
        return
    store = open_store(own_address() if node.count > 1 else _LOOPBACK)
    # First, because --module and what follows it belong to the ranks.
    options = [f"--master-addr={store.host}", f"--master-port={store.port}", *options]
    if node.count == 1:
        torchrun(options)
        return
    with announcing(Path(os.environ[ANNOUNCEMENT]), store.host, store.port):
        torchrun(options)


if __name__ == "__main__":
    main(sys.argv[1:])
