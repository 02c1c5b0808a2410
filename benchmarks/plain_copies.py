"""Plain copies of bytes from one process to another, over the paths that a weight sync takes.

benchmarks/weight_sync.py compares a sync with them. Each function returns a copy that can be called
again and again, with everything that is needed once done before.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Named = list[tuple[str, torch.Tensor]]


def flat(bucket: Named) -> torch.Tensor:
    """The bucket's bytes in one piece; made before any clock runs."""
    return torch.cat([tensor.view(torch.uint8).flatten() for _, tensor in bucket])


def copy_by_disk(pieces: list[torch.Tensor], folder: Path) -> Callable[[], None]:
    target = torch.empty(sum(len(piece) for piece in pieces), dtype=torch.uint8)
    target.fill_(0)
    places = target.split([len(piece) for piece in pieces])

    def copy() -> None:
        folder.mkdir()
        for index, piece in enumerate(pieces):
            (folder / str(index)).write_bytes(piece.numpy().data)
        for index, place in enumerate(places):
            with (folder / str(index)).open("rb", buffering=0) as file:
                assert file.readinto(place.numpy().data) == len(place)
        shutil.rmtree(folder)

    return copy


def copy_by_shared_memory(
    pieces: list[torch.Tensor], link: Connection, num_buffers: int = 1
) -> Callable[[], None]:
    """With two buffers the other process copies out of one while the next piece is copied into the
    other.
    """
    size = max(len(piece) for piece in pieces)
    shared = [shared_memory.SharedMemory(create=True, size=size) for _ in range(num_buffers)]
    views = [torch.frombuffer(one.buf, dtype=torch.uint8) for one in shared]
    link.send(([one.name for one in shared], [len(piece) for piece in pieces]))

    def copy() -> None:
        # This function holds the shared memory, which therefore lives as long as the function.
        assert all(size <= one.size for one in shared)
        for index, piece in enumerate(pieces):
            if index >= num_buffers:
                link.recv()
            views[index % num_buffers][: len(piece)].copy_(piece)
            link.send((index % num_buffers, index))
        for _ in range(min(num_buffers, len(pieces))):
            link.recv()

    return copy


def take_from_shared_memory(link: Connection) -> None:
    torch.set_num_threads(1)
    names, lengths = link.recv()
    shared = [shared_memory.SharedMemory(name=name) for name in names]
    sources = [torch.frombuffer(one.buf, dtype=torch.uint8) for one in shared]
    target = torch.empty(sum(lengths), dtype=torch.uint8).fill_(0)
    places = target.split(lengths)
    while (told := link.recv()) is not None:
        buffer, index = told
        places[index].copy_(sources[buffer][: lengths[index]])
        link.send(None)
    for one in shared:
        one.unlink()
    # Views of the buffers would forbid closing them.
    os._exit(0)


def gloo_group(rank: int, port: int) -> Any:
    """Two processes on loopback."""
    import datetime

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch_distributed: Any = dist
    timeout = datetime.timedelta(seconds=120)
    store = torch_distributed.TCPStore("127.0.0.1", port, 2, rank == 0, timeout)
    return torch_distributed.ProcessGroupGloo(store, rank, 2, timeout)


def copy_by_broadcast(buckets: list[list[torch.Tensor]], link: Connection) -> Callable[[], None]:
    """Those of a bucket all at once, then the next bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    link.send((port, [[len(piece) for piece in bucket] for bucket in buckets]))
    group = gloo_group(0, port)

    def copy() -> None:
        link.send(True)
        for bucket in buckets:
            for work in [group.broadcast(piece, 0) for piece in bucket]:
                work.wait()
        link.recv()

    return copy


def take_broadcasts(link: Connection) -> None:
    torch.set_num_threads(1)
    port, lengths = link.recv()
    group = gloo_group(1, port)
    target = torch.empty(sum(map(sum, lengths)), dtype=torch.uint8).fill_(0)
    places = target.split([sum(bucket) for bucket in lengths])
    while link.recv() is not None:
        for place, bucket in zip(places, lengths, strict=True):
            for work in [group.broadcast(piece, 0) for piece in place.split(bucket)]:
                work.wait()
        link.send(None)
    os._exit(0)
