"""Parts of a checkpoint tensor, as the ranks of a server hold them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from torch import Tensor


class Part(NamedTuple):
    """Where the elements of a part stand in the full tensor, in row-major order of the tensor.

    Attributes:
        offset: The position of the part's first element.
        shape: The shape of the part.
        strides: The distances of its elements, for each dimension.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Part:
        """Return the part that was written as a JSON list."""
        offset, shape, strides = value
        return cls(int(offset), tuple(map(int, shape)), tuple(map(int, strides)))

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this part of a full tensor. Only a tensor with gaps is copied."""
        whole = tensor.contiguous()
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.offset)

    def _runs(self) -> tuple[int, list[int], list[int]]:
        """Return the elements that follow each other, and the lengths and strides of the rest."""
        run = 1
        outer = [
            (length, stride)
            for length, stride in zip(self.shape, self.strides, strict=True)
            if length != 1
        ]
        # A dimension whose stride equals the run so far continues it, as in a row-major tensor.
        while outer and outer[-1][1] == run:
            run *= outer.pop()[0]
        return run, [length for length, _ in outer], [stride for _, stride in outer]


def cover(parts: Collection[Part], num_elements: int) -> bool:
    """Return whether every element of a tensor is in one of the parts, and none is outside."""
    # A part without elements covers nothing, and its offset may lie behind the end.
    parts = [part for part in parts if math.prod(part.shape)]
    # The largest number that divides every offset, run and stride. All elements of such a unit lie
    # in the same parts.
    unit = num_elements
    for part in parts:
        last = part.offset + sum(
            (length - 1) * stride for length, stride in zip(part.shape, part.strides, strict=True)
        )
        # as_strided() below does not check this, and would write outside of the marks.
        if min(part.offset, *part.strides, 0) < 0 or last >= num_elements:
            return False
        run, _, strides = part._runs()
        unit = math.gcd(unit, part.offset, run, *strides)
    # A mark stands for as many elements as no part cuts. So a shard of a large tensor has few.
    marks = np.zeros(num_elements // unit if unit else 0, dtype=np.bool_)
    for part in parts:
        run, lengths, strides = part._runs()
        held = as_strided(
            marks[part.offset // unit :],
            (*lengths, run // unit),
            (*(stride // unit for stride in strides), 1),
        )
        held[...] = True
    return bool(marks.all())
