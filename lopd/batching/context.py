"""Context parallelism: which tokens of a packed microbatch each rank computes. numpy only.

Causal attention makes the end of a sequence dearer than its beginning. So each sequence is cut into
2 * size chunks of one length, and rank r takes chunks r and 2 * size - 1 - r: as much work as every
other rank. For that it is padded at its end, which no token before sees. It is the order in which
Transformer Engine's attention over packed sequences takes them (its thd_get_partitioned_indices).

    tokens      a0 a1 a2 a3 a4 b0 b1            two sequences, size 2
    padded      a0 a1 a2 a3 a4 __ __ __ b0 b1 __ __
    rank 0      a0 a1 __ __ b0 __               chunks 0 and 3 of each
    rank 1      a2 a3 a4 __ b1 __               chunks 1 and 2

Only the model sees parts. Labels, masks and scores stay with the whole microbatch, which was
shifted by one before: nothing crosses the border of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.records import Ints


@dataclass(frozen=True, slots=True)
class ContextPart:
    """One rank's part [P] of a microbatch of T tokens. Every rank has as many; tokens of samples
    are on one rank each.

    cu_seqlens, max_seqlen: of the padded sequences over all ranks, as attention and rotary
    embeddings take them.
    """

    index: NDArray[np.int64]  # [P], the token in each place of this rank; T where there is padding
    place: NDArray[
        np.int64
    ]  # [T], where each token is among the places of all ranks, one rank after the other; size * P for one that nobody computes
    cu_seqlens: Ints  # [S+1], from 0 to size * P
    max_seqlen: int

    def take(self, rows: NDArray[Any]) -> NDArray[Any]:
        """This rank's part [P, ...] of rows [T, ...]; zeros where there is padding."""
        return np.concatenate([rows, np.zeros((1, *rows.shape[1:]), dtype=rows.dtype)])[self.index]


def multiples(size: int, tensor: int) -> tuple[int, int]:
    """(of each sequence, of all together): to what they are padded. tensor: ranks that divide a
    part's tokens among them once more.
    """
    return (1, tensor) if size == 1 else (2 * size, size * math.lcm(2, tensor))


def padded_lengths(lengths: Sequence[int] | NDArray[Any], size: int) -> NDArray[np.int64]:
    """Of sequences, each padded so that it can be cut."""
    multiple, _ = multiples(size, 1)
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def cut(
    cu_seqlens: Ints, num_sequences: int, *, rank: int, size: int, tensor: int = 1
) -> ContextPart:
    """The part of this rank of ``size`` context ranks. cu_seqlens [S+1], num_sequences: of a
    Microbatch.

    Its padding belongs to no part: what is missing to ``multiples`` is one more sequence, and all
    there is where it has no samples. Of a single rank the part is the microbatch as it stands.
    """
    num_tokens = int(cu_seqlens[-1])
    if size == 1:
        everything = np.arange(num_tokens)
        return ContextPart(everything, everything, cu_seqlens, int(np.diff(cu_seqlens).max()))
    bounds = cu_seqlens[: num_sequences + 1].astype(np.int64)
    _, multiple = multiples(size, tensor)
    lengths = padded_lengths(np.diff(bounds), size)
    missing = -int(lengths.sum()) % multiple if num_sequences else multiple
    lengths = np.append(lengths, missing) if missing else lengths
    padded = np.concatenate([[0], np.cumsum(lengths)])
    sequence = np.repeat(np.arange(len(lengths)), lengths)  # [size * P]
    position = np.arange(padded[-1]) - padded[sequence]
    real = np.append(np.diff(bounds), 0)[sequence] > position
    token = np.where(real, bounds[sequence] + position, num_tokens)
    chunk = position // (lengths // (2 * size))[sequence]
    owner = np.minimum(chunk, 2 * size - 1 - chunk).astype(np.int16)
    by_rank = token[np.argsort(owner, kind="stable")]
    place = np.full(num_tokens + 1, len(by_rank))
    place[by_rank] = np.arange(len(by_rank))
    place_of_tokens = place[:-1]
    own = len(by_rank) // size
    return ContextPart(
        by_rank[rank * own : (rank + 1) * own],
        place_of_tokens,
        padded.astype(np.int32),
        int(lengths.max()),
    )
