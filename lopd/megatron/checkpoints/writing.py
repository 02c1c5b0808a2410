"""Writing one rank's part of a checkpoint, in the foreground or by a thread while the training goes
on.

Megatron-Core plans a save, with collectives, and gives back what is left to do: a function that
writes this rank's files, and functions that complete the checkpoint, with collectives again. Its
own asynchronous callers run the first in a forked process; a fork of a rank with gloo's and CUDA's
threads is a gamble, and the process outlives a killed rank. Here a thread does it, which mostly
waits for the disk or copies outside of the interpreter's lock. What it writes is a copy in host
memory, because the next step changes the weights in place.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import CheckpointingException

from lopd.megatron.ranks import parallel


class Writing:
    """A save that is planned, and being written from the moment this is made."""

    def __init__(self, folder: Path, request: Any, *, background: bool) -> None:
        """request: Megatron-Core's AsyncRequest of a save into folder. Foreground: returns when
        this rank's files are written.
        """
        self.folder, self._request = folder, request
        self._sums: dict[str, list[int]] = {}
        self._error: Exception | None = None
        write: Callable[[], None] | None = None
        if request.async_fn is not None:  # None: nothing to write on this rank
            arguments = list(request.async_fn_args)
            staged = request.preload_fn() if request.preload_fn is not None else arguments[1]
            arguments[1] = own_copies(staged, arguments[1]) if background else staged
            write = partial(request.async_fn, *arguments, **request.async_fn_kwargs)
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(
                target=self._write, args=(write,), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(write)

    def _write(self, write: Callable[[], None] | None) -> None:
        try:
            if write is not None:
                write()  # reports what goes wrong to the functions that complete the checkpoint
            for path in self.folder.glob(f"__{parallel.rank()}_*.distcp"):
                self._sums[path.name] = fsync_and_sum(path)
        except Exception as error:  # belongs to the thread that waits: complete() raises it
            self._error = error

    def is_written_everywhere(self) -> bool:
        """Collective: one number from each rank."""
        done = torch.tensor(
            [int(self._thread is None or not self._thread.is_alive())], device=parallel.device()
        )
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def complete(self) -> dict[str, list[int]]:
        """Waits for all ranks and writes what describes the whole; {name: [size, CRC-32]} of this
        rank's files. Collective.

        OSError, or Megatron-Core's and torch's own exceptions: a file of this or of another rank
        cannot be written.
        """
        if self._thread is not None:
            self._thread.join()
        failed = [
            problem
            for problem in parallel.gather_objects(
                None if self._error is None else str(self._error)
            )
            if problem is not None
        ]
        if self._error is not None:
            raise self._error
        if failed:
            raise CheckpointingException(f"on another rank: {failed[0]}")
        for act in self._request.finalize_fns:
            act()
        return self._sums


def own_copies(staged: list[Any], sources: list[Any]) -> list[Any]:
    """Megatron-Core's write buckets with copies of the tensors that its staging did not copy.

    Staging takes tensors to the host. One that is there already is its own copy: all of them on a
    CPU, and the state of an optimizer that is offloaded to the CPU. The next step changes it while
    it is written, and the checksum, taken from the file, would not notice.

    Args:
        staged: The buckets after staging: (file, key, (data, [(item, tensor)])).
        sources: The same buckets before staging.
    """
    kept = {
        tensor.untyped_storage().data_ptr()
        for _, _, (_, tensors) in sources
        for _, tensor in tensors
    }
    return [
        (file, key, (data, [(item, _own(tensor, kept)) for item, tensor in tensors]))
        for file, key, (data, tensors) in staged
    ]


def _own(tensor: torch.Tensor, kept: set[int]) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().data_ptr() in kept else tensor


def fsync_and_sum(path: Path) -> list[int]:
    """Makes a file durable and reads it back: [size, CRC-32]."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return [path.stat().st_size, crc32(path)]


def crc32(path: Path) -> int:
    """Of a file, in blocks."""
    value, block = 0, bytearray(2**22)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(block):
            value = zlib.crc32(memoryview(block)[:count], value)
    return value
