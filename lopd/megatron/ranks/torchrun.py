"""torchrun with its rendezvous store where it should be: ``python -m lopd.megatron.ranks.torchrun``
takes torchrun's own options.

By itself the agent's TCPStore listens on every interface, whatever --master-addr says. A store that
this process opened before, on a socket of ours, is the one that the agent then shares
(``multi_tenant``). Holding the port from the start also leaves no other program the time to take
it. On one machine the store is on loopback; of several (lopd.megatron.ranks.nodes) the first one
opens it on the address by which the others reach it, and announces it to them.
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

_HOST = "127.0.0.1"


def open_store(host: str = _HOST) -> TCPStore:
    """The store of this process, listening on a free port of one address and nowhere else."""
    listener = socket.create_server((host, 0), backlog=1024)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def main(options: list[str]) -> None:
    for name in [
        name for name in os.environ if name.startswith("PET_")
    ]:  # torchrun takes them for options; Kubernetes sets them for its own launcher
        del os.environ[name]
    node = Node.from_text(os.environ[NODE]) if ANNOUNCEMENT in os.environ else Node(0, 1)
    with tempfile.TemporaryDirectory(
        prefix="lopd-torchrun-"
    ) as errors:  # of ranks, for the agent; its own choice of a folder would stay
        _run(
            node,
            [f"--nnodes={node.count}", f"--node-rank={node.index}", f"--log-dir={errors}"],
            options,
        )


def _run(node: Node, where: list[str], options: list[str]) -> None:
    if node.index > 0:  # the address and port are among the options
        torchrun([*where, *options])
        return
    store = open_store(own_address() if node.count > 1 else _HOST)
    where += [f"--master-addr={store.host}", f"--master-port={store.port}"]
    if node.count == 1:
        torchrun([*where, *options])
        return
    with announcing(Path(os.environ[ANNOUNCEMENT]), store.host, store.port):
        torchrun([*where, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
