"""Operations that the fingerprints of a weight sync of Qwen3-30B-A3B give to a GPU.

They are counted on tensors without data (device meta), so neither a GPU nor the weights are needed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_rollout.server_side.fingerprints import sums_of_pieces

# The shape of a layer's tensor -> how many the layer has of it.
LAYER = {
    (768, 2048): 256,
    (2048, 768): 128,
    (4096, 2048): 1,
    (512, 2048): 2,
    (2048, 4096): 1,
    (128, 2048): 1,
    (2048,): 2,
    (128,): 2,
}
NUM_LAYERS = 48
EMBEDDING = (151936, 2048)
NORM = (2048,)
BUCKET_BYTES = 512 * 2**20


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that a device would get.

    Attributes:
        counts: The number of times that each operation was called. Views are none.
        largest_bytes: The size of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.largest_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.counts[function._schema.name] += 1
            if isinstance(result, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, result.nbytes)
        return result


def weights() -> list[torch.Tensor]:
    """Return the tensors of Qwen3-30B-A3B in bfloat16, without data."""
    layer = [shape for shape, count in LAYER.items() for _ in range(count)]
    shapes = [EMBEDDING, *(layer * NUM_LAYERS), NORM, EMBEDDING]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def in_buckets(tensors: list[torch.Tensor], num_bytes: int) -> list[list[torch.Tensor]]:
    """Return the tensors as the trainer sends them."""
    found: list[list[torch.Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size >= num_bytes:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.nbytes
    return found


def counted(buckets: list[list[torch.Tensor]]) -> Launches:
    """Return the operations of the fingerprints of these buckets."""
    with Launches() as launches:
        for bucket in buckets:
            sums_of_pieces(bucket, [tensor.dtype for tensor in bucket])
    return launches


def launches_of_a_sync() -> dict[str, int]:
    """Return the operations on the trainer, and on a server that holds all tensors on one GPU."""
    tensors = weights()
    return {
        "trainer": counted(in_buckets(tensors, BUCKET_BYTES)).counts.total(),
        "server": counted([tensors]).counts.total(),
    }
