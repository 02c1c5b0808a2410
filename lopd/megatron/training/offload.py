"""The trainer's memory, given to a server on the same device and taken back.

A storage is copied to the host and emptied (resize_ to 0 bytes). To take it back, it is resized and
filled. Tensors are views of storages. So parameters, and the parts of Megatron-Core's gradient and
weight buffers that buckets and the distributed optimizer hold, stay the objects that they are. They
are whole again together with their storage.

Reading a tensor with an empty storage ends the process. So code that needs the memory calls
require() first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopd.megatron.ranks import parallel


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """A storage that is empty now.

    Attributes:
        storage: The storage.
        num_bytes: The size of the storage when it is on the device.
        copy: The content of the storage on the host, uint8 [num_bytes]. None if the content is not
            kept.
    """

    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None


class DeviceMemory:
    """What the training of one rank holds on its device: gradients, optimizer state, weights.

    The optimizer state includes its float32 weights. The class is an Offloadable of sglang_rollout.

    Host copies are kept for the next time. They have as many bytes as the optimizer state and the
    weights, and are pinned if the device is a GPU.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        """Remember what holds the memory.

        Args:
            model: Megatron-Core's DistributedDataParallel.
            optimizer: The chained optimizer of the model.
        """
        self._model = model
        self._optimizer = optimizer
        # By kind of memory: gradients, optimizer, weights.
        self._away: dict[str, list[_Offloaded]] = {}
        # Host copies by the identity of their storage.
        self._copies: dict[int, Tensor] = {}

    def offload_optimizer(self) -> None:
        """Take gradients and optimizer state off the device.

        The values of the gradients are forgotten. Every step begins with zeros.
        """
        self.require()
        # The optimizer has float32 gradients of its own. zero_grad releases them; otherwise their
        # memory would stay on the device.
        self._optimizer.zero_grad()
        self._release("gradients", self._gradients(), keep=False)
        self._release("optimizer", self._optimizer_state(), keep=True)

    def offload_weights(self) -> None:
        """Take the weights of the model off the device too."""
        self.require_weights()
        self._release("weights", self._weights(), keep=True)

    def reload(self) -> None:
        """Take everything back. It does nothing if nothing is on the host."""
        # The list is a copy of the keys, because the loop removes them.
        for kind in list(self._away):
            for each in self._away.pop(kind):
                each.storage.resize_(each.num_bytes)
                if each.copy is None:
                    _bytes_of(each.storage).zero_()
                else:
                    _bytes_of(each.storage).copy_(each.copy, non_blocking=True)
        # The copies from pinned memory are asynchronous. The next offload writes to that memory.
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def require(self) -> None:
        """Assert that everything is on the device."""
        assert not self._away, f"{' and '.join(self._away)} are on the host: reload() first"

    def require_weights(self) -> None:
        """Assert that the weights are on the device."""
        assert "weights" not in self._away, "the weights are on the host: reload() first"

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes on the device by kind, now. An offloaded kind counts 0."""
        kinds = {
            "gradients": self._gradients(),
            "optimizer": self._optimizer_state(),
            "weights": self._weights(),
        }
        return {
            kind: sum(storage.nbytes() for storage in storages) for kind, storages in kinds.items()
        }

    def _gradients(self) -> list[torch.UntypedStorage]:
        # Experts have buffers of their own, as their gradients are summed over other ranks.
        buffers = [*self._model.buffers, *self._model.expert_parallel_buffers]
        return _storages(buffer.grad_data for buffer in buffers)

    def _weights(self) -> list[torch.UntypedStorage]:
        # Buffers of the module too, for example the statistics of routers.
        module = self._model.module
        return _storages([*module.parameters(), *module.buffers()])

    def _optimizer_state(self) -> list[torch.UntypedStorage]:
        # In float32 the optimizer updates the model's weights themselves. They must stay when the
        # optimizer leaves: the server is given the weights after that.
        others = {storage._cdata for storage in [*self._weights(), *self._gradients()]}
        held = _storages(self._updated_and_state())
        return [storage for storage in held if storage._cdata not in others]

    def _updated_and_state(self) -> Iterator[Tensor]:
        """Yield the tensors that the optimizer updates, and the state it keeps of them."""
        for chained in self._optimizer.chained_optimizers:
            # A rank may have nothing to update, for example no expert.
            if getattr(chained, "is_stub_optimizer", False) or chained.optimizer is None:
                continue
            for group in chained.optimizer.param_groups:
                yield from group["params"]
            for state in chained.optimizer.state.values():
                for value in state.values():
                    # A tensor without dimensions is a count of steps, which is small.
                    if isinstance(value, Tensor) and value.dim() > 0:
                        yield value

    def _release(self, kind: str, storages: list[torch.UntypedStorage], *, keep: bool) -> None:
        copies = [self._copy_to_host(storage) if keep else None for storage in storages]
        # The copies are asynchronous. A storage that is emptied before its copy is done is lost.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._away[kind] = [
            _Offloaded(storage, storage.nbytes(), copy)
            for storage, copy in zip(storages, copies, strict=True)
        ]
        # Megatron-Core's own ways do less. DistributedDataParallel.offload_grad_buffers empties the
        # buffers of the gradients like this. But MegatronOptimizer.offload_to_cpu gives every
        # parameter that it updates a storage of its own. In float32 those parameters are parts of
        # the weights' buffer, so that takes them out of the model.
        for storage in storages:
            storage.resize_(0)
        # torch keeps freed memory for this process; a server is another process.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _copy_to_host(self, storage: torch.UntypedStorage) -> Tensor:
        copy = self._copies.get(storage._cdata)
        # Pinning memory is slow, so the previous copy is used again where the size is the same.
        if copy is None or len(copy) != storage.nbytes():
            copy = torch.empty(
                storage.nbytes(), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
            self._copies[storage._cdata] = copy
        copy.copy_(_bytes_of(storage), non_blocking=True)
        return copy


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors on this rank's device, each once."""
    # By the identity of the C++ object: torch makes a new Python object at each call.
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        # An optimizer that is offloaded to the CPU has tensors elsewhere.
        if tensor.device == parallel.device():
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
    return list(storages.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
