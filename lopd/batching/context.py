"""Context parallelism: which tokens of a packed microbatch each rank computes. numpy only.

Causal attention makes the end of a sequence more expensive than its beginning. So each sequence is
cut into 2 * size chunks of equal length, and rank r takes chunks r and 2 * size - 1 - r. Then every
rank has as much work as every other. To be cut, a sequence is padded at its end, which no earlier
token sees. Transformer Engine's attention over packed sequences takes the tokens in this order (see
its thd_get_partitioned_indices).

    tokens      a0 a1 a2 a3 a4 b0 b1            two sequences, size 2
    padded      a0 a1 a2 a3 a4 __ __ __ b0 b1 __ __
    rank 0      a0 a1 __ __ b0 __               chunks 0 and 3 of each
    rank 1      a2 a3 a4 __ b1 __               chunks 1 and 2

Only the model sees parts. Labels, masks and scores stay with the whole microbatch, which was
shifted by one before. So nothing crosses the border of a chunk.
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
    """The part of one context rank of a microbatch of T tokens.

    Every rank has the same number P of places. Each token of a sample is on exactly one rank.
    """

    # [P], the token at each place of this rank. It is T where the place holds padding.
    index: NDArray[np.int64]
    # [T], where each token is among the places of all ranks, one rank after the other. It is
    # size * P for a token that no rank computes.
    place: NDArray[np.int64]
    # [S+1], the borders of the padded sequences over all ranks, from 0 to size * P. Attention and
    # rotary embeddings take them.
    cu_seqlens: Ints
    # The length of the longest padded sequence.
    max_seqlen: int

    def take(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return this rank's part [P, ...] of rows [T, ...], with zeros where there is padding."""
        # The row of zeros stands at index T, which is what padding points to.
        return np.concatenate([rows, np.zeros((1, *rows.shape[1:]), dtype=rows.dtype)])[self.index]


def padding_multiples(size: int, tensor: int) -> tuple[int, int]:
    """Return to which multiples each sequence, and all sequences together, are padded.

    Args:
        size: The number of context ranks.
        tensor: The number of ranks that divide a part's tokens among them once more.
    """
    if size == 1:
        return 1, tensor
    # A sequence has 2 * size chunks of equal length, so each rank's part of it has an even length.
    # Sequence parallelism divides that part by `tensor`, which must leave no rest either.
    return 2 * size, size * math.lcm(2, tensor)


def padded_lengths(lengths: Sequence[int] | NDArray[Any], size: int) -> NDArray[np.int64]:
    """Return the lengths of sequences, each padded so that it can be cut for `size` ranks."""
    multiple, _ = padding_multiples(size, 1)
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def context_part(
    cu_seqlens: Ints, num_sequences: int, *, rank: int, size: int, tensor: int = 1
) -> ContextPart:
    """Return the part of one context rank.

    The padding of the microbatch itself belongs to no part. Tokens that are missing to
    padding_multiples form one more sequence. A microbatch without samples is that sequence alone.

    Args:
        cu_seqlens: [S+1], of the Microbatch.
        num_sequences: The number of samples in the Microbatch.
        rank: The context rank.
        size: The number of context ranks. With 1 the part is the microbatch as it is.
        tensor: The number of ranks that divide a part's tokens among them once more.
    """
    num_tokens = int(cu_seqlens[-1])
    # Without padding: one rank computes exactly what a training without context parallelism does.
    if size == 1:
        everything = np.arange(num_tokens)
        return ContextPart(everything, everything, cu_seqlens, int(np.diff(cu_seqlens).max()))

    # The padded sequences, and the one that pads the whole.
    bounds = cu_seqlens[: num_sequences + 1].astype(np.int64)
    _, multiple = padding_multiples(size, tensor)
    lengths = padded_lengths(np.diff(bounds), size)
    # A rank without samples still runs the layers, in which the others wait for it.
    missing = -int(lengths.sum()) % multiple if num_sequences else multiple
    if missing:
        lengths = np.append(lengths, missing)
    padded = np.concatenate([[0], np.cumsum(lengths)])

    # For each of the size * P padded positions: its sequence, its position in that sequence, and
    # the token there, or num_tokens for padding. The appended 0 says that the last sequence, where
    # there is one more than samples, has no real token.
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(padded[-1]) - padded[sequence]
    real = np.append(np.diff(bounds), 0)[sequence] > position
    token = np.where(real, bounds[sequence] + position, num_tokens)

    # Chunks c and 2 * size - 1 - c have one owner. The sort must be stable: within a rank the
    # tokens stay in the order of the sequences, as Transformer Engine has them.
    chunk = position // (lengths // (2 * size))[sequence]
    owner = np.minimum(chunk, 2 * size - 1 - chunk).astype(np.int16)
    by_rank = token[np.argsort(owner, kind="stable")]

    # The inverse of by_rank. All padding writes to one entry at the end, which is dropped.
    place = np.full(num_tokens + 1, len(by_rank))
    place[by_rank] = np.arange(len(by_rank))
    own_len = len(by_rank) // size
    return ContextPart(
        by_rank[rank * own_len : (rank + 1) * own_len],
        place[:-1],
        padded.astype(np.int32),
        int(lengths.max()),
    )
