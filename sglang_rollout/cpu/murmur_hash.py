"""The hash of seeded sampling in plain torch, bit for bit that of SGLang's Triton kernel.

It is the 32-bit MurmurHash3 (Austin Appleby, public domain) of four 32-bit words.
"""

from __future__ import annotations

import torch

# The hash computes in words of 32 bits.
_MASK = 0xFFFFFFFF
# The number of bytes that are hashed. It is part of the hash.
_NUM_BYTES = 16


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """Return the hash of the words (low seed, high seed, position, column).

    Args:
        seed: Integers of shape [N].
        positions: Integers of shape [N].
        col_indices: Integers of shape [M].

    Returns:
        Tensor of uint32 of shape [N, M].
    """
    # uint64 has few operators on a CPU. The low 63 bits are all that a non-negative seed has, and
    # int64 wraps as C does.
    seeds = seed.to(torch.int64)[:, None]  # [N, 1]
    words = (
        seeds & _MASK,
        (seeds >> 32) & _MASK,
        positions.to(torch.int64)[:, None] & _MASK,
        col_indices.to(torch.int64)[None, :] & _MASK,
    )
    state = torch.zeros_like(seeds)
    for word in words:
        state = _mix(state, word)
    return _finish(state ^ _NUM_BYTES).to(torch.uint32)


def _times(values: torch.Tensor, factor: int) -> torch.Tensor:
    """Return values * factor modulo 2^32."""
    # Two 32-bit factors can exceed 2^63. The halves keep every product below it.
    low = (values & 0xFFFF) * factor
    high = ((values >> 16) * factor) & 0xFFFF
    return (low + (high << 16)) & _MASK


def _rotate(values: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values << bits) | (values >> (32 - bits))) & _MASK


# The factors, rotations and shifts below are the constants of MurmurHash3_x86_32.


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotate(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _MASK


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)
