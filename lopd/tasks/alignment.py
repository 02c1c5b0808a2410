"""Brings log-probabilities from one tokenization of a text to another one.

Two tokenizers cut one text into different tokens. Where both cut at the same byte, the text falls
into *chunks*: the shortest segments that begin and end at a token of either side. The teacher's
log-probability of a chunk is the sum over its tokens of the chunk. It is a property of the text
and not of the tokens, so it can be compared with the student's sum over the same bytes.

Bytes are compared and not characters: a character may be cut into several tokens, and the spans
that tokenizers report in characters then overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.records import Floats, float32

# Where two texts differ, they are taken to agree again where this number of bytes is the same.
_SAME_BYTES = 8
# And at most this number of bytes apart, on either side. A normaliser changes single characters.
_WINDOW = 96
# How many bytes are compared at once while the texts agree.
_BLOCK = 4096
# A chunk of the student that is as certain as this has no proportions to go by.
_CERTAIN = -1e-6


@dataclass(frozen=True, slots=True)
class Chunks:
    """The shortest common segments of two tokenizations. C is the number of chunks.

    Chunk c has the first side's tokens first_ends[c - 1] to first_ends[c] - 1, and likewise the
    second side's. The chunks cover every token of both sides.

    Attributes:
        same: True where both sides have the same bytes. A chunk with other bytes has no common
            text, so no log-probability can be brought over.
    """

    first_ends: NDArray[np.int64]  # [C]
    second_ends: NDArray[np.int64]  # [C]
    same: NDArray[np.bool_]  # [C]

    @property
    def first_sizes(self) -> NDArray[np.int64]:
        """The number of the first side's tokens in each chunk [C]."""
        return np.diff(self.first_ends, prepend=0)

    @property
    def second_sizes(self) -> NDArray[np.int64]:
        """The number of the second side's tokens in each chunk [C]."""
        return np.diff(self.second_ends, prepend=0)


def common_chunks(first: Sequence[bytes], second: Sequence[bytes]) -> Chunks:
    """Cut two tokenizations of one text into their shortest common segments.

    Args:
        first: The bytes of each token of one side.
        second: The bytes of each token of the other side. Its text may differ in places, as a
            normaliser leaves it.

    Example:
        >>> chunks = common_chunks([b"un", b"able", b" to"], [b"una", b"ble", b" ", b"to"])
        >>> chunks.first_ends.tolist(), chunks.second_ends.tolist()
        ([2, 3], [2, 4])
    """
    first_bytes = b"".join(first)
    second_bytes = b"".join(second)
    first_offsets = _ends(first)
    second_offsets = _ends(second)
    first_ends: list[NDArray[np.int64]] = []
    second_ends: list[NDArray[np.int64]] = []
    starts_inside: list[NDArray[np.bool_]] = []
    for start, other, length in _matches(first_bytes, second_bytes):
        # Offsets within this stretch at which both sides cut, its two ends included.
        own = _inside(first_offsets, start, length)
        theirs = _inside(second_offsets, other, length)
        cuts = np.intersect1d(own, theirs)
        if start == other == 0:
            # Nothing ends at the first byte. Tokens without bytes go with the first chunk.
            cuts = cuts[cuts > 0]
        # The token that ends at an offset is the last one, if tokens without bytes follow it.
        first_ends.append(np.searchsorted(first_offsets, start + cuts, side="right"))
        second_ends.append(np.searchsorted(second_offsets, other + cuts, side="right"))
        # A chunk that ends at the first cut of a stretch began before it, among other bytes.
        inside = np.ones(len(cuts), bool)
        inside[:1] = start == other == 0
        starts_inside.append(inside)
    return _closed(
        np.concatenate([np.zeros(0, np.int64), *first_ends]),
        np.concatenate([np.zeros(0, np.int64), *second_ends]),
        np.concatenate([np.zeros(0, bool), *starts_inside]),
        (len(first), len(second)),
    )


def _ends(pieces: Sequence[bytes]) -> NDArray[np.int64]:
    """Return the byte at which each token ends."""
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64)


def _inside(ends: NDArray[np.int64], start: int, length: int) -> NDArray[np.int64]:
    """Return the cuts within a stretch of bytes, counted from its start."""
    # Byte 0 is a cut of every text, although no token ends there.
    cuts = ends if start else np.concatenate([np.zeros(1, np.int64), ends])
    low = np.searchsorted(cuts, start, side="left")
    high = np.searchsorted(cuts, start + length, side="right")
    return cuts[low:high] - start


def _closed(
    first_ends: NDArray[np.int64],
    second_ends: NDArray[np.int64],
    same: NDArray[np.bool_],
    lengths: tuple[int, int],
) -> Chunks:
    """Return the chunks without empty ones, and with one more for what is left at the end."""
    before = (np.diff(first_ends, prepend=0), np.diff(second_ends, prepend=0))
    # A cut that two stretches share ends no chunk of its own.
    kept = (before[0] > 0) | (before[1] > 0)
    first_ends = first_ends[kept]
    second_ends = second_ends[kept]
    same = same[kept]
    last = (int(first_ends[-1]), int(second_ends[-1])) if len(first_ends) else (0, 0)
    if last != lengths:
        first_ends = np.append(first_ends, lengths[0])
        second_ends = np.append(second_ends, lengths[1])
        same = np.append(same, False)
    # Tokens without bytes of one side only, such as an unknown token, are no common text.
    empty = (np.diff(first_ends, prepend=0) == 0) | (np.diff(second_ends, prepend=0) == 0)
    return Chunks(first_ends, second_ends, same & ~empty)


def _matches(first: bytes, second: bytes) -> list[tuple[int, int, int]]:
    """Return the stretches in which two texts agree: start in each, and length."""
    found: list[tuple[int, int, int]] = []
    here = 0
    there = 0
    while True:
        length = _common_length(first, second, here, there)
        found.append((here, there, length))
        here += length
        there += length
        if here >= len(first) or there >= len(second):
            return found
        # Only a window of the rest is searched. A search of the whole rest would take quadratic
        # time.
        skips = _resumption(first[here : here + 2 * _WINDOW], second[there : there + 2 * _WINDOW])
        if skips is None:
            # The rest has no common text that could be told from a chance agreement.
            return found
        here += skips[0]
        there += skips[1]


def _common_length(first: bytes, second: bytes, here: int, there: int) -> int:
    """Return how many bytes are the same from these two places on."""
    length = 0
    while True:
        # Block by block through numpy: a loop over bytes would take seconds for a long response.
        own = np.frombuffer(first[here + length : here + length + _BLOCK], np.uint8)
        theirs = np.frombuffer(second[there + length : there + length + _BLOCK], np.uint8)
        width = min(len(own), len(theirs))
        differing = np.flatnonzero(own[:width] != theirs[:width])
        if differing.size:
            return length + int(differing[0])
        length += width
        if width < _BLOCK:
            return length


def _resumption(first: bytes, second: bytes) -> tuple[int, int] | None:
    """Return how many bytes to leave out on either side until the texts agree again."""
    # The fewest bytes in all: what a normaliser changes is short.
    for total in range(1, 2 * _WINDOW):
        for skip in range(max(0, total - _WINDOW), min(total, _WINDOW) + 1):
            own = first[skip : skip + _SAME_BYTES]
            theirs = second[total - skip : total - skip + _SAME_BYTES]
            # Near the end of both texts fewer bytes are left, and all of them must agree.
            if own and own == theirs:
                return skip, total - skip
    return None


def chunk_sums(logprobs: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sum of the log-probabilities in each chunk, float64 [C]."""
    # In float64: the difference of two running sums of a long response would lose digits in
    # float32.
    totals = np.concatenate([[0.0], np.cumsum(logprobs, dtype=np.float64)])
    sums: NDArray[np.float64] = np.diff(totals[ends], prepend=0.0)
    return sums


def distribute(
    sums: NDArray[np.float64], ends: NDArray[np.int64], own_logprobs: NDArray[Any]
) -> Floats:
    """Distribute the teacher's log-probability of each chunk over the student's tokens of it.

    Token i of a chunk gets ``sum * l_i / sum(l)``, where l are the student's own log-probabilities.
    Three things follow. No value is positive. Where teacher and student give the chunk the same
    probability, every token has an advantage of 0. Otherwise the advantages of all tokens of a
    chunk have the sign of the chunk's. Equal parts would have neither of the last two: a token of
    which the student is certain would be pushed down although the teacher agrees with the chunk.
    Equal parts are used where the student is certain of the whole chunk, or its log-probabilities
    are not known.

    Args:
        sums: The teacher's log-probability of each chunk [C], in nats.
        ends: The end of each chunk among the student's tokens [C].
        own_logprobs: The student's log-probability of each of its tokens [R], in nats.

    Returns:
        Float32 [R]. Their sum over a chunk is the teacher's, to the rounding of one float32.
    """
    sizes = np.diff(ends, prepend=0)
    num_chunks = len(ends)
    # Which chunk each of the student's tokens belongs to.
    chunk = np.repeat(np.arange(num_chunks), sizes)
    own = np.asarray(own_logprobs, dtype=np.float64)
    totals = np.bincount(chunk, own, minlength=num_chunks)
    # NaN fails the comparison, so an unknown log-probability leads to equal parts as well.
    proportional = (totals < _CERTAIN)[chunk]
    share = np.where(proportional, own / np.where(proportional, totals[chunk], 1.0), 1.0)
    share = np.where(proportional, share, 1.0 / np.maximum(sizes, 1)[chunk])
    parts = float32(sums[chunk] * share)
    # Rounding to float32 has changed the sum. The largest part can take the difference with the
    # smallest relative change.
    missing = sums - np.bincount(chunk, parts.astype(np.float64), minlength=num_chunks)
    order = np.lexsort((np.abs(parts), chunk))
    largest = order[(np.cumsum(sizes) - 1)[sizes > 0]]
    parts[largest] = float32(parts[largest] + missing[sizes > 0])
    # The correction above may have lifted a value that was nearly 0 above it, and a log-probability
    # is never positive.
    return np.minimum(parts, 0.0, out=parts)
