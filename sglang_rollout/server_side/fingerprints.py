"""A number for the bits of a tensor that can be added up from the tensor's parts.

With it the shards of a server can be compared with the trainer's full tensor. For rows of 64-bit
words w[r, c] the fingerprint is

    sum of a(r) * b(c) * m(w[r, c]) modulo 2^64,

where a and b are odd pseudo-random numbers and m is a mixing. Any block of rows and columns
contributes its own terms. Two tensors that differ have the same number with a probability of about
2^-60, unless they were made for it on purpose. It finds mistakes, not attacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A tensor is read in blocks of this many bytes. The copies of a block then stay in the processor's
# cache.
_BLOCK_BYTES = 2**19
_MODULUS = 2**64
_WORD_BYTES = 8
# Bytes of an element -> the integer type of that size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> int:
    """Return the fingerprint of a full tensor, from 0 to 2^64 - 1."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    return part_fingerprint(tensor, 0, _contiguous_strides(tensor.shape), columns)


def part_fingerprint(part: Tensor, offset: int, strides: Sequence[int], columns: int) -> int:
    """Return what a part adds to the fingerprint of its tensor, from 0 to 2^64 - 1.

    Args:
        part: The values of the part, in any memory layout.
        offset: The position of the part's first element in the full tensor, in elements.
        strides: The distances of the part's elements in the full tensor, in elements.
        columns: The number of columns of the full tensor.

    Raises:
        ValueError: The part is no block of rows and columns, or it cuts a 64-bit word.
    """
    if part.numel() == 0:
        return 0
    if part.dim() == 0:
        part = part.reshape(1)
        strides = [1]
    # Several elements of a row make one word. Where the rows do not divide into words, each element
    # is a word by itself.
    row_bytes = columns * part.element_size()
    elements = _WORD_BYTES // part.element_size() if row_bytes % _WORD_BYTES == 0 else 1
    width = part.shape[-1]
    first_column = offset % columns
    starts = offset // columns + _row_starts(part.shape[:-1], strides[:-1], columns)  # [R]
    is_spread = width > 1 and strides[-1] != 1
    leaves_row = first_column + width > columns
    cuts_word = bool(width % elements or first_column % elements)
    if is_spread or leaves_row or cuts_word:
        raise ValueError(
            f"a part of shape {list(part.shape)} at {offset} with strides {list(strides)} cannot "
            f"be told from a tensor of {columns} columns"
        )
    word = torch.int64 if elements > 1 else _INTEGERS[part.element_size()]
    first_word = first_column // elements
    last_word = (first_column + width) // elements
    column_index = torch.arange(first_word, last_word, device=part.device)
    by_column = _odd_numbers(column_index, 1)  # [C]
    by_row = _odd_numbers(starts.to(part.device), 2)  # [R]
    rows = part.reshape(-1, width)
    # Plain torch and no sha256: that would bring a server's weights from the GPU to the host. All
    # sums and products wrap at 2^64, as the formula wants.
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    step = max(1, _BLOCK_BYTES // max(1, width * part.element_size()))
    for first in range(0, len(rows), step):
        words = rows[first : first + step].contiguous().view(word).to(torch.int64)  # [r, C]
        # The mixing. An odd factor moves a change of the top bit to no other bit, so two changed
        # top bits would cancel. In bfloat16 those are signs.
        words = words ^ ((words >> 32) & 0xFFFFFFFF)
        words *= by_column
        total += (words.sum(1) * by_row[first : first + step]).sum()
    return int(total.item()) % _MODULUS


def _row_starts(shape: Sequence[int], strides: Sequence[int], columns: int) -> Tensor:
    """Return the rows of the full tensor in which a part's rows stand, counted from its first."""
    starts = torch.zeros(1, dtype=torch.int64)  # [R] in the end
    for length, stride in zip(shape, strides, strict=True):
        if length > 1 and stride % columns:
            raise ValueError(f"strides {list(strides)} do not go by rows of {columns}")
        starts = (starts[:, None] + torch.arange(length)[None] * (stride // columns)).flatten()
    return starts


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _odd_numbers(index: Tensor, stream: int) -> Tensor:
    """Return odd pseudo-random 64-bit numbers that depend on the index and the stream alone."""
    # The mixing of splitmix64, whose constants stand here as signed numbers. Products and sums
    # wrap. The masks make a logical shift of torch's arithmetic one.
    x = (index.to(torch.int64) + 1 + (stream << 40)) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    # An odd factor can be undone, so no bit of a word is lost.
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) | 1
