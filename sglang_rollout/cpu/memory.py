"""Memory that a server on a CPU gives back and takes again, as torch_memory_saver does on a GPU.

SGLang allocates its weights and its cache of keys and values inside regions that have a tag. Here a
region remembers the storages of the tensors that are made in it. A pause empties them, and a resume
gives them their size again, without their contents. So a trial of ``sync.colocate`` on a CPU loses
the same contents at the same moments as on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# SGLang's tag of the weights.
WEIGHTS = "weights"
# Two or four bytes of ones are a NaN of bfloat16, float16 and float32. A server that answers from
# weights that nobody has sent again is therefore noticed at once. Zeros could pass for weights.
_NOT_A_NUMBER = 0xFF


class _Recording(TorchDispatchMode):
    """A mode that records the storage of each tensor that an operation in the block returns."""

    def __init__(self, made: list[StorageWeakRef]) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        # Storages and not tensors: a parameter is another object than the tensor it was made from,
        # but has the same storage. Weak references: a temporary tensor must be gone afterwards.
        self._made.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return result


class MemoryOfTags:
    """All storages of one process, by the tag of the region in which they were made."""

    def __init__(self) -> None:
        # Tag -> address of the storage object -> storage.
        self._storages: dict[str, dict[int, torch.UntypedStorage]] = {}
        # The sizes in bytes of the storages that are empty now.
        self._sizes: dict[str, dict[int, int]] = {}

    @contextlib.contextmanager
    def region(self, tag: str) -> Iterator[None]:
        """Remember the storages that are made inside the block."""
        made: list[StorageWeakRef] = []
        with _Recording(made):
            yield
        # While a model is loaded, SGLang also makes tables of experts. On a GPU they stay in host
        # memory and keep their contents, so here they must not be emptied either.
        parameters = _parameters() if tag == WEIGHTS else None
        for reference in made:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            is_table = parameters is not None and reference.cdata not in parameters
            # A storage is None where the tensor was temporary. Memory that came from a file or from
            # another process cannot be resized.
            if storage is None or is_table:
                continue
            if storage.nbytes() > 0 and storage.resizable():
                self._storages.setdefault(tag, {})[storage._cdata] = storage

    def pause(self, tag: str) -> None:
        """Give the memory of a tag back. The contents are lost."""
        storages = self._storages.get(tag, {})
        self._sizes[tag] = {key: storage.nbytes() for key, storage in storages.items()}
        for storage in storages.values():
            storage.resize_(0)

    def resume(self, tag: str) -> None:
        """Take the memory of a tag again. Weights come back as NaN, everything else as zeros."""
        fill = _NOT_A_NUMBER if tag == WEIGHTS else 0
        for key, size in self._sizes.pop(tag, {}).items():
            storage = self._storages[tag][key]
            storage.resize_(size)
            # A storage has no fill of its own, so a tensor is laid over all of its bytes.
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(fill)

    def held_bytes(self, tag: str) -> int:
        """Return the bytes that a tag holds now."""
        return sum(storage.nbytes() for storage in self._storages.get(tag, {}).values())


def _parameters() -> set[int]:
    """Return the addresses of the storages of all parameters of this process."""
    # The region ends before the model has a name that could be asked for, so the parameters are
    # found among all objects of Python.
    return {
        each.untyped_storage()._cdata
        for each in gc.get_objects()
        if isinstance(each, torch.nn.Parameter)
    }
