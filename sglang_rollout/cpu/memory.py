"""Memory that a server on a CPU gives back and takes again, as torch_memory_saver does on a GPU.

SGLang allocates its weights and its cache of keys and values inside regions that have a tag. Here a
region remembers the storages of the tensors that are made in it. A pause empties them (a storage of
0 bytes), and a resume gives them their size again, without their contents. So a trial of
``sync.colocate`` on a CPU has the same turns as on a GPU, with the same loss of contents. Weights
come back as bytes of ones, which are no numbers: a server that answers from weights that nobody has
sent again is noticed at once.
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

WEIGHTS = "weights"  # SGLang's tag of them
_NOT_A_NUMBER = 0xFF  # two or four such bytes are a NaN of bfloat16, float16 and float32


class _Recording(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation inside of it returns, by weak
    references: a temporary one is gone afterwards, and a parameter has the storage of the tensor
    that it was made from, but is another object.
    """

    def __init__(self, made: list[StorageWeakRef]) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self._made.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return result


class MemoryOfTags:
    """All storages of one process by the tag of the region in which they were made."""

    def __init__(self) -> None:
        self._storages: dict[str, dict[int, torch.UntypedStorage]] = {}
        self._sizes: dict[str, dict[int, int]] = {}  # of what is away

    @contextlib.contextmanager
    def region(self, tag: str) -> Iterator[None]:
        made: list[StorageWeakRef] = []
        with _Recording(made):
            yield
        parameters = _parameters() if tag == WEIGHTS else None
        for reference in made:
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            left_out = parameters is not None and reference.cdata not in parameters
            if (
                storage is not None
                and storage.nbytes() > 0
                and storage.resizable()
                and not left_out
            ):
                self._storages.setdefault(tag, {})[storage._cdata] = storage

    def pause(self, tag: str) -> None:
        storages = self._storages.get(tag, {})
        self._sizes[tag] = {key: storage.nbytes() for key, storage in storages.items()}
        for storage in storages.values():
            storage.resize_(0)

    def resume(self, tag: str) -> None:
        for key, size in self._sizes.pop(tag, {}).items():
            storage = self._storages[tag][key]
            storage.resize_(size)
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(
                _NOT_A_NUMBER if tag == WEIGHTS else 0
            )

    def held_bytes(self, tag: str) -> int:
        return sum(storage.nbytes() for storage in self._storages.get(tag, {}).values())


def _parameters() -> set[int]:
    """Storages of all parameters of this process. While a model is loaded, SGLang also makes tables
    of experts, which on a GPU stay in host memory and so keep their contents.
    """
    return {
        each.untyped_storage()._cdata
        for each in gc.get_objects()
        if isinstance(each, torch.nn.Parameter)
    }
