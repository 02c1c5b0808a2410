"""Writing one rank's part of a checkpoint, in the foreground or by a thread.

Megatron-Core plans a save with collectives and returns what is left to do: a function that writes
the files of this rank, and functions that complete the checkpoint, with collectives again. In the
background a thread runs the first function, on a copy in host memory.
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
    """A planned save. It is being written from the moment that this object is made."""

    def __init__(self, folder: Path, request: Any, *, background: bool) -> None:
        """Write this rank's files, or begin to.

        Args:
            folder: The folder of the checkpoint.
            request: Megatron-Core's AsyncRequest of a save into it.
            background: Whether a thread writes. Otherwise this returns when the files are written.
        """
        self.folder = folder
        self._request = request
        self._sums: dict[str, list[int]] = {}
        self._error: Exception | None = None
        # The function is made in this thread, because it may take copies, which must be of this
        # step.
        write = _write_function(request, background=background)
        self._thread: threading.Thread | None = None
        if background:
            # Megatron-Core's own asynchronous callers use a forked process. A fork of a rank with
            # the threads of gloo and CUDA is a gamble, and the process outlives a killed rank. A
            # thread does not slow the training down: it waits for the disk, or copies outside of
            # the interpreter's lock.
            # A daemon: a training that ends with an error must not wait for the disk.
            self._thread = threading.Thread(
                target=self._write, args=(write,), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(write)

    def _write(self, write: Callable[[], None] | None) -> None:
        try:
            if write is not None:
                # It reports its own errors to the functions that complete the checkpoint.
                write()
            # The sums are made here too, so that the training does not wait for them.
            for path in self.folder.glob(f"__{parallel.rank()}_*.distcp"):
                self._sums[path.name] = fsync_and_sum(path)
        # An exception would end the thread unseen. complete() raises it where somebody waits.
        except Exception as error:
            self._error = error

    def is_written_everywhere(self) -> bool:
        """Return whether every rank has written its part. Collective, with one number each."""
        is_done = self._thread is None or not self._thread.is_alive()
        done = torch.tensor([int(is_done)], device=parallel.device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done.item())

    def complete(self) -> dict[str, list[int]]:
        """Wait for all ranks, and write what describes the whole. Collective.

        Returns:
            {name: [size in bytes, CRC-32]} of this rank's files.

        Raises:
            OSError: A file of this rank cannot be written. Megatron-Core and torch raise their own
                exceptions too, for files of any rank.
        """
        if self._thread is not None:
            self._thread.join()
        # The ranks tell each other first. The functions below are collective: a rank that raised
        # alone would leave the others waiting in them.
        own = None if self._error is None else str(self._error)
        problems = [problem for problem in parallel.gather_objects(own) if problem is not None]
        if self._error is not None:
            raise self._error
        if problems:
            raise CheckpointingException(f"on another rank: {problems[0]}")
        # They write .metadata, which makes the files of all ranks one checkpoint.
        for finalize in self._request.finalize_fns:
            finalize()
        return self._sums


def _write_function(request: Any, *, background: bool) -> Callable[[], None] | None:
    """Return the function that writes this rank's files, or None if there is nothing to write."""
    if request.async_fn is None:
        return None
    # The second argument holds the tensors. preload_fn copies them from the device to the host.
    # That happens here, before the next step changes them.
    arguments = list(request.async_fn_args)
    staged = request.preload_fn() if request.preload_fn is not None else arguments[1]
    arguments[1] = own_copies(staged, arguments[1]) if background else staged
    return partial(request.async_fn, *arguments, **request.async_fn_kwargs)


def own_copies(staged: list[Any], sources: list[Any]) -> list[Any]:
    """Return Megatron-Core's write buckets with copies of what its staging did not copy.

    Args:
        staged: The buckets after staging: (file, key, (data, [(item, tensor)])).
        sources: The same buckets before staging.
    """
    # Staging takes tensors to the host. A tensor that is there already is its own copy: every one
    # on a CPU, and the state of an optimizer that is offloaded to the CPU. The next step would
    # change it while it is written. The checksum, taken from the file, would not notice.
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
    """Make a file durable, and return [size in bytes, CRC-32] of what is read back."""
    # A descriptor for reading is enough: fsync writes all of the file's data that is in the cache.
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return [path.stat().st_size, crc32(path)]


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file. It is read in blocks of 4 MiB."""
    value = 0
    # In blocks: a checkpoint's file may be larger than the memory that is free.
    block = bytearray(2**22)
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(block):
            value = zlib.crc32(memoryview(block)[:count], value)
    return value
