"""The trainer's memory given back to the device while a server on the same one works, and taken
again.

A storage is copied to the host and emptied (resize_ to 0 bytes); taken again, it is resized and
filled. Tensors are views of storages: parameters, the parts of Megatron-Core's gradient and weight
buffers that buckets and the distributed optimizer hold, and whoever else refers to them stay what
they are, and are whole again with their storage. Megatron-Core's own ways do less:
DistributedDataParallel.offload_grad_buffers empties the gradients' buffers in the same manner, but
MegatronOptimizer.offload_to_cpu gives every parameter that it updates a storage of its own, which
in float32, where those are parts of the weights' buffer, takes them out of the model.

Reading a tensor whose storage is empty ends the process, so whoever needs it asks first (require).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lopd.megatron.ranks import parallel


class DeviceMemory:
    """What one rank's training holds on its device: gradients, optimizer state (with its float32
    weights), weights. sglang_rollout's Offloadable.

    Host copies are kept for the next time: as many bytes as the optimizer state and the weights,
    pinned where the device is a GPU.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        """model: Megatron-Core's DistributedDataParallel. optimizer: its chained optimizer."""
        self._model, self._optimizer = model, optimizer
        self._away: dict[
            str, list[tuple[torch.UntypedStorage, int, Tensor | None]]
        ] = {}  # kind -> storage, its bytes, its copy
        self._copies: dict[int, Tensor] = {}  # of storages, by their identity

    def offload_optimizer(self) -> None:
        """Gradients and optimizer state off the device. The gradients' values are forgotten: every
        step begins with zeros.
        """
        self.require()
        self._optimizer.zero_grad()  # lets go of what the optimizer has made of them
        self._release("gradients", self._gradients(), keep=False)
        self._release("optimizer", self._optimizer_state(), keep=True)

    def offload_weights(self) -> None:
        """The model off the device too."""
        self.require_weights()
        self._release("weights", self._weights(), keep=True)

    def reload(self) -> None:
        """All of it back; nothing where nothing is away."""
        for kind in list(self._away):
            for storage, size, copy in self._away.pop(kind):
                storage.resize_(size)
                if copy is None:
                    _bytes_of(storage).zero_()
                else:
                    _bytes_of(storage).copy_(copy, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def require(self) -> None:
        assert not self._away, f"{' and '.join(self._away)} are on the host: reload() first"

    def require_weights(self) -> None:
        assert "weights" not in self._away, "the weights are on the host: reload() first"

    def held_bytes(self) -> dict[str, int]:
        """Bytes on the device by kind, now; what is away counts 0."""
        found = {
            "gradients": self._gradients(),
            "optimizer": self._optimizer_state(),
            "weights": self._weights(),
        }
        return {
            kind: sum(storage.nbytes() for storage in storages) for kind, storages in found.items()
        }

    # ---- whose is what ----------------------------------------------------------------------------------------------------------------------------

    def _gradients(self) -> list[torch.UntypedStorage]:
        return _storages(
            buffer.grad_data
            for buffer in [*self._model.buffers, *self._model.expert_parallel_buffers]
        )

    def _weights(self) -> list[torch.UntypedStorage]:
        module = self._model.module
        return _storages([*module.parameters(), *module.buffers()])

    def _optimizer_state(self) -> list[torch.UntypedStorage]:
        """Without what are weights of the model at the same time, as in float32."""
        others = {storage._cdata for storage in [*self._weights(), *self._gradients()]}
        return [
            storage
            for storage in _storages(self._updated_and_state())
            if storage._cdata not in others
        ]

    def _updated_and_state(self) -> Iterator[Tensor]:
        for chained in self._optimizer.chained_optimizers:
            if getattr(chained, "is_stub_optimizer", False) or chained.optimizer is None:
                continue
            for group in chained.optimizer.param_groups:
                yield from group["params"]
            for state in chained.optimizer.state.values():
                yield from (
                    value
                    for value in state.values()
                    if isinstance(value, Tensor) and value.dim() > 0
                )  # a count of steps stays

    # ---- there and back ---------------------------------------------------------------------------------------------------------------------------

    def _release(self, kind: str, storages: list[torch.UntypedStorage], *, keep: bool) -> None:
        copies = [self._copy_to_host(storage) if keep else None for storage in storages]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._away[kind] = [
            (storage, storage.nbytes(), copy)
            for storage, copy in zip(storages, copies, strict=True)
        ]
        for storage in storages:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else torch keeps it for this process

    def _copy_to_host(self, storage: torch.UntypedStorage) -> Tensor:
        copy = self._copies.get(storage._cdata)
        if copy is None or len(copy) != storage.nbytes():
            copy = self._copies[storage._cdata] = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        copy.copy_(_bytes_of(storage), non_blocking=True)
        return copy


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Of those tensors that lie on this rank's device, each once: an optimizer that is offloaded to
    the CPU has others.
    """
    found = {
        storage._cdata: storage
        for tensor in tensors
        if tensor.device == parallel.device()
        for storage in [tensor.untyped_storage()]
    }
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
