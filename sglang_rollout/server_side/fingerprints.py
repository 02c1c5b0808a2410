"""A number for the bits of a tensor that can be added up from its parts, so that a server's shards
can be held against the trainer's full tensor.

For a tensor of rows of 64-bit words w[r, c] the fingerprint is sum of a(r) * b(c) * m(w[r, c])
modulo 2^64, a and b odd pseudo-random numbers, m a mixing. Any part of the tensor, rows or columns,
contributes its own terms. Two tensors that differ have the same number with a probability of about
2^-60, unless somebody makes them so: this finds mistakes, not attacks. Plain torch, because sha256
would bring a server's weights from the GPU to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK_BYTES = 2**19  # of a tensor at a time: the copies of a block stay in the processor's cache
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> int:
    """Of a full tensor."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    return part_fingerprint(tensor, 0, _contiguous_strides(tensor.shape), columns)


def part_fingerprint(part: Tensor, offset: int, strides: Sequence[int], columns: int) -> int:
    """What a part adds to the fingerprint of a tensor with rows of so many columns. 0 .. 2^64 - 1.

    part: its values, in any memory layout. offset, strides: where its elements stand in the full
    tensor, in elements. ValueError: the part is no block of rows and columns, or cuts a 64-bit
    word.
    """
    if part.numel() == 0:
        return 0
    if part.dim() == 0:
        part, strides = part.reshape(1), [1]
    elements = (
        8 // part.element_size() if columns * part.element_size() % 8 == 0 else 1
    )  # of a word
    width, first_column = part.shape[-1], offset % columns
    starts = offset // columns + _row_starts(part.shape[:-1], strides[:-1], columns)
    if (
        (width > 1 and strides[-1] != 1)
        or first_column + width > columns
        or width % elements
        or first_column % elements
    ):
        raise ValueError(
            f"a part of shape {list(part.shape)} at {offset} with strides {list(strides)} cannot be told from a tensor of {columns} columns"
        )
    word = torch.int64 if elements > 1 else _INTEGERS[part.element_size()]
    by_column = _odd_numbers(
        torch.arange(
            first_column // elements, (first_column + width) // elements, device=part.device
        ),
        1,
    )  # [C]
    by_row = _odd_numbers(starts.to(part.device), 2)  # [R]
    rows = part.reshape(-1, width)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    step = max(1, _BLOCK_BYTES // max(1, width * part.element_size()))
    for first in range(0, len(rows), step):
        words = rows[first : first + step].contiguous().view(word).to(torch.int64)  # [r, C]
        words = words ^ (
            (words >> 32) & 0xFFFFFFFF
        )  # else two changed top bits, signs of bfloat16 say, would cancel
        words *= by_column
        total += (words.sum(1) * by_row[first : first + step]).sum()
    return int(total.item()) % 2**64


def _row_starts(shape: Sequence[int], strides: Sequence[int], columns: int) -> Tensor:
    """Rows of the full tensor in which a part's rows stand, counted from its first; [R]."""
    starts = torch.zeros(1, dtype=torch.int64)
    for length, stride in zip(shape, strides, strict=True):
        if length > 1 and stride % columns:
            raise ValueError(f"strides {list(strides)} do not go by rows of {columns}")
        starts = (starts[:, None] + torch.arange(length)[None] * (stride // columns)).flatten()
    return starts


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _odd_numbers(index: Tensor, stream: int) -> Tensor:
    """Odd pseudo-random 64-bit numbers, a function of the index (splitmix64); products and sums
    wrap.
    """
    x = (index.to(torch.int64) + 1 + (stream << 40)) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1
