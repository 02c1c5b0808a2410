"""Weights by memory that trainer and server share on one host.

The memory is CUDA IPC on a GPU and POSIX shared memory on a CPU. Only handles go over HTTP.

SGLang's endpoint takes what multiprocessing's ForkingPickler makes of tensors. It reads that with
an unpickler that allows torch's and its own modules only. We make the format with torch's own
reducers, from names and tensors alone. We read none. The server takes it on loopback, from a client
that has its key.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor

from sglang_rollout.requests.client import SGLangEngine
from sglang_rollout.servers.scratch import PATH_MAX
from sglang_rollout.weight_sync.in_place import InPlaceReceiver
from sglang_rollout.weight_sync.interface import Bucket, finished, nbytes, started

# The longest wait for late answers when a sync is given up.
_CLOSING_TIMEOUT_S = 10.0
# Each call to a server has its own timeout. The wait for all of them lasts this much longer.
_ANSWER_MARGIN_S = 10
_FIRST_CHUNK_BYTES = 64 * 2**20
_MAX_CHUNK_BYTES = 256 * 2**20
# In bytes. A view of another dtype must begin at a multiple of its size, and copies are faster from
# whole cache lines.
_ALIGNMENT = 512


class TensorWeightReceiver(InPlaceReceiver):
    """A WeightReceiver that copies buckets into shared memory.

    The servers copy from there into their parameters while the next bucket is gathered and copied.
    The extra memory is two buffers of one chunk each.
    """

    transport = "tensor"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take the arguments of InPlaceReceiver."""
        super().__init__(*arguments, **named)
        # Two shared buffers (uint8). The servers read one of them while the other is written.
        self._buffers: list[Tensor | None] = [None, None]
        # The servers' answers to the newest chunk.
        self._reading: dict[str, Future[Any]] = {}
        self._sizes = _chunk_sizes()
        # Buffers of syncs that were given up. A server may still come to read them, and its
        # scheduler would die if the memory were gone.
        self._given_up: list[Tensor | None] = []

    def _open_transport(self) -> None:
        self._sizes = _chunk_sizes()

    def _send(self, bucket: Bucket) -> None:
        for chunk in _chunks(bucket, self._sizes):
            shared = self._share(chunk)
            former = self._reading
            self._reading = {
                engine.url: started(partial(self._post, engine, ranks, shared))
                for engine, ranks in zip(self._engines, self._session.num_ranks, strict=True)
            }
            # The previous chunk is awaited only after the next one was posted, so the servers never
            # wait for us. After this line nobody reads the previous buffer any more, and the
            # reversal makes it the next one to be written.
            finished(former, self._timeout_s + _ANSWER_MARGIN_S)
            self._buffers.reverse()

    def _await_sent(self) -> None:
        reading = self._reading
        self._reading = {}
        finished(reading, self._timeout_s + _ANSWER_MARGIN_S)

    def abandon(self) -> None:
        """Give the sync up. See InPlaceReceiver.abandon."""
        # A chunk that came late would land in the next sync.
        wait(self._reading.values(), min(self._timeout_s, _CLOSING_TIMEOUT_S))
        self._given_up += self._buffers
        self._buffers = [None, None]
        self._reading = {}
        super().abandon()

    def _post(self, engine: SGLangEngine, num_ranks: int, shared: Bucket) -> None:
        # Each rank gets handles of its own. torch counts a reference for every handle that it
        # makes, and every rank gives one back.
        body = {
            "serialized_named_tensors": [_handles(shared) for _ in range(num_ranks)],
            # The session forgets cached prefixes once, when all buckets are there.
            "flush_cache": False,
        }
        engine.call("POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)

    def _share(self, bucket: Bucket) -> Bucket:
        """Copy the tensors into the buffer that nobody reads, and return views of it."""
        offsets = []
        end = 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-nbytes([tensor]) // _ALIGNMENT) * _ALIGNMENT
        device = bucket[0][1].device
        buffer = self._buffers[0]
        # A buffer grows to the largest chunk and stays for the next sync, so most syncs allocate
        # nothing.
        if buffer is None or len(buffer) < end or buffer.device != device:
            # The old buffer goes before the new one comes, or both would count at the peak. The
            # local name must let go of it too.
            buffer = None
            self._buffers[0] = None
            buffer = _shared_buffer(end, device)
            self._buffers[0] = buffer
        held = sum(len(one) for one in self._buffers if one is not None)
        self.report.extra_bytes = max(self.report.extra_bytes, held)
        shared = []
        for (name, tensor), offset in zip(bucket, offsets, strict=True):
            num_bytes = nbytes([tensor])
            view = buffer[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.detach())
            shared.append((name, view))
        if device.type == "cuda":
            # The server reads on a stream of another process, which knows nothing of our copies.
            torch.cuda.synchronize(device)
        return shared


def _chunk_sizes() -> Iterator[int]:
    """Yield the sizes of the chunks of a sync, in bytes.

    Small ones come first, so that the servers begin early. Larger ones follow, because each chunk
    costs a call.
    """
    size = _FIRST_CHUNK_BYTES
    while True:
        yield size
        size = min(2 * size, _MAX_CHUNK_BYTES)


def _chunks(bucket: Bucket, sizes: Iterator[int]) -> Iterator[Bucket]:
    """Split a bucket into chunks of whole tensors of about these sizes.

    On a CPU the servers copy one chunk while the next is written. On a GPU the bucket is one chunk:
    the calls would cost more than they save.
    """
    left = nbytes(tensor for _, tensor in bucket)
    # On a GPU a bucket is handed over as a whole. On a CPU it is copied, piece by piece.
    wanted = left if bucket[0][1].is_cuda else next(sizes)
    chunk: Bucket = []
    size = 0
    for name, tensor in bucket:
        num_bytes = nbytes([tensor])
        # The chunk ends where half of the next tensor would be too much. A rest of less than half a
        # chunk goes with the last one: a call of its own would not pay.
        is_full = size + num_bytes / 2 > wanted
        is_small_rest = left <= wanted / 2
        if chunk and is_full and not is_small_rest:
            yield chunk
            chunk = []
            size = 0
            wanted = next(sizes)
        chunk.append((name, tensor))
        size += num_bytes
        left -= num_bytes
    yield chunk


def _shared_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Return a uint8 tensor whose memory another process can open."""
    # All CUDA memory of torch can be opened by its handle.
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    new_shared: Any = torch.UntypedStorage._new_shared
    with _named_shared_memory():
        storage = new_shared(num_bytes, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _handles(tensors: Bucket) -> str:
    """Return what SGLang's endpoint takes for one of its ranks.

    It is the base64 text of the tensors' handles in ForkingPickler's format.
    """
    if tensors[0][1].is_cuda:
        # SGLang's servers know a device by its UUID, because each process may see the devices under
        # other numbers. torch's own reducers would write the number.
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        monkey_patch_torch_reductions()
    buffer = io.BytesIO()
    with _named_shared_memory():
        ForkingPickler(buffer).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@contextlib.contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Make torch share memory by name inside the block.

    torch's other way, passing file descriptors, works only between a process and its children.
    """
    multiprocessing: Any = torch_multiprocessing
    # The strategy belongs to the whole process, so it is put back afterwards.
    before = multiprocessing.get_sharing_strategy()
    folder = os.environ.get("TMPDIR")
    multiprocessing.set_sharing_strategy("file_system")
    # torch starts a helper process for shared memory. That process has a Unix socket in TMPDIR,
    # whose path may have 107 bytes.
    if folder is not None and len(os.fsencode(folder)) > PATH_MAX:
        os.environ["TMPDIR"] = "/tmp"
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
        if folder is not None:
            os.environ["TMPDIR"] = folder
