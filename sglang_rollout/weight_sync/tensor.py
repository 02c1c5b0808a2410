"""Weights by a memory that trainer and server share on one host: CUDA IPC on a GPU, POSIX shared
memory on a CPU. Only handles go over HTTP.

SGLang's endpoint takes what multiprocessing's ForkingPickler makes of tensors, and reads it with an
unpickler that allows torch's and its own modules only. We make that format with torch's own
reducers and put nothing but names and tensors into it; we read none. The server takes it on
loopback, from who has its key.
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

_LEAVING_TIMEOUT_S = 10.0
_FIRST_PIECE_BYTES, _MOST_PIECE_BYTES = 64 * 2**20, 256 * 2**20
# bytes; a view of another dtype must begin at a multiple of its size, and copies are faster from
# whole cache lines
_ALIGNMENT = 512


class TensorWeightReceiver(InPlaceReceiver):
    """Buckets are copied into shared memory, from which the servers copy into their parameters
    while the next bucket is gathered and copied.

    Extra memory: two buffers, of a piece each.
    """

    transport = "tensor"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._buffers: list[Tensor | None] = [None, None]  # uint8, shared; used in turns
        self._reading: dict[str, Future[Any]] = {}  # the servers' answers to the bucket before
        self._sizes = _piece_sizes()
        self._given_up: list[
            Tensor | None
        ] = []  # buffers that a server may still come to read: without the memory its scheduler would die of it

    def _join(self) -> None:
        self._sizes = _piece_sizes()

    def _send(self, bucket: Bucket) -> None:
        for piece in _pieces(bucket, self._sizes):
            shared = self._share(piece)
            ranks = zip(self._engines, self._session.num_ranks, strict=True)
            former, self._reading = (
                self._reading,
                {
                    engine.url: started(partial(self._post, engine, number, shared))
                    for engine, number in ranks
                },
            )
            finished(
                former, self._timeout_s + 10
            )  # after the next was posted: servers do not wait for us
            self._buffers.reverse()

    def _settle(self) -> None:
        reading, self._reading = self._reading, {}
        finished(reading, self._timeout_s + 10)

    def abandon(self) -> None:
        wait(
            self._reading.values(), min(self._timeout_s, _LEAVING_TIMEOUT_S)
        )  # a piece that came late would land in the next sync
        self._given_up += self._buffers
        self._buffers, self._reading = [None, None], {}
        super().abandon()

    def _post(self, engine: SGLangEngine, ranks: int, shared: Bucket) -> None:
        body = {
            "serialized_named_tensors": [_handles(shared) for _ in range(ranks)],
            "flush_cache": False,
        }
        engine.call("POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)

    def _share(self, bucket: Bucket) -> Bucket:
        """The bucket's tensors in the buffer whose turn it is, which grows where it must."""
        offsets, end = [], 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        device, buffer = bucket[0][1].device, self._buffers[0]
        if buffer is None or len(buffer) < end or buffer.device != device:
            buffer = self._buffers[0] = None  # the old one goes first
            buffer = self._buffers[0] = _shared_buffer(end, device)
        self.report.extra_bytes = max(
            self.report.extra_bytes, sum(len(one) for one in self._buffers if one is not None)
        )
        shared = []
        for (name, tensor), offset in zip(bucket, offsets, strict=True):
            view = (
                buffer[offset : offset + tensor.numel() * tensor.element_size()]
                .view(tensor.dtype)
                .view(tensor.shape)
            )
            view.copy_(tensor.detach())
            shared.append((name, view))
        if device.type == "cuda":
            torch.cuda.synchronize(
                device
            )  # the server reads on a stream that knows nothing of ours
        return shared


def _piece_sizes() -> Iterator[int]:
    """Of a sync, in bytes: small ones first, so that servers begin early, then larger ones, whose
    calls cost less than their bytes.
    """
    size = _FIRST_PIECE_BYTES
    while True:
        yield size
        size = min(2 * size, _MOST_PIECE_BYTES)


def _pieces(bucket: Bucket, sizes: Iterator[int]) -> Iterator[Bucket]:
    """On a CPU, of about these sizes: servers copy one while the next is written. On a GPU one: the
    calls would cost more than they save.
    """
    left = nbytes(tensor for _, tensor in bucket)
    wanted = left if bucket[0][1].is_cuda else next(sizes)
    piece: Bucket = []
    size = 0
    for name, tensor in bucket:
        num_bytes = nbytes([tensor])
        if (
            piece and size + num_bytes / 2 > wanted and left > wanted / 2
        ):  # a small rest goes with the last piece
            yield piece
            piece, size, wanted = [], 0, next(sizes)
        piece.append((name, tensor))
        size += num_bytes
        left -= num_bytes
    yield piece


def _shared_buffer(num_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    with _named_shared_memory():
        storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _handles(tensors: Bucket) -> str:
    """What SGLang's endpoint takes for one of its ranks: base64 of the tensors' handles in
    ForkingPickler's format.
    """
    if tensors[
        0
    ][
        1
    ].is_cuda:  # SGLang's servers know a device by its UUID: each process may see the devices under other numbers
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        monkey_patch_torch_reductions()
    buffer = io.BytesIO()
    with _named_shared_memory():
        ForkingPickler(buffer).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@contextlib.contextmanager
def _named_shared_memory() -> Iterator[None]:
    """torch's other way, passing file descriptors, works between a process and its children only.

    The helper process that torch starts for it has a Unix socket in TMPDIR, whose path may have 107
    bytes.
    """
    multiprocessing: Any = torch_multiprocessing
    before, place = multiprocessing.get_sharing_strategy(), os.environ.get("TMPDIR")
    multiprocessing.set_sharing_strategy("file_system")
    if place is not None and len(os.fsencode(place)) > PATH_MAX:
        os.environ["TMPDIR"] = "/tmp"
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
        if place is not None:
            os.environ["TMPDIR"] = place
