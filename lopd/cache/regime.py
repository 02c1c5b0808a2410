"""The regime of a cache: how far the teacher is from the policy that wrote the responses.

Few tokens carry most of a loss on the sampled token: those that the student samples and the teacher
all but excludes. This file measures them before any training. lopd/cache/recommendation.py says
what came of such caches in measured settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lopd.artifacts import read_manifest
from lopd.artifacts.reader import damaged_shard
from lopd.cache.columns import (
    ENTROPY,
    LOSS_MASK,
    TAIL,
    TOP_IDS,
    TOP_LOGPROBS,
    flat,
    loss_tokens,
)
from lopd.records import Floats

# Nats. Beyond it, one model finds a token twenty times as likely as the other.
FAR = 3.0
# Nats. The objective clips the advantage to +-10, as in the paper (arXiv 2604.13010).
ADVANTAGE_CLIP = 10.0
# A measurement before a training reads at most so many shards and response tokens. A share of 0.1%
# of a million tokens is known to a thirtieth of itself, and a cache may have 60 GB.
MOST_SHARDS = 16
MOST_TOKENS = 1 << 20
# A response of an agent may have 100,000 tokens with 16 ids each, so few rows are decoded at once.
_ROWS_AT_ONCE = 16
# Tokens whose top-K is computed at once. Its intermediate values take 8 * K bytes for each.
_BLOCK = 1 << 16
# What is read of a column at once, in bytes.
_BUFFER_BYTES = 1 << 20
_SAMPLED = "sampling_logprobs"
_SCORED = "teacher_logprobs"
_COLUMNS = ("token_ids", LOSS_MASK, _SAMPLED, _SCORED, ENTROPY, TOP_IDS, TOP_LOGPROBS, TAIL)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RegimeFigures:
    """What was measured, over tokens that carry loss. The advantage is that of the first step.

    Attributes:
        num_tokens: The tokens that were measured.
        num_shards: The shards that they are from.
        num_shards_in_cache: All shards of the cache.
        mean_advantage: The mean of log pi_teacher - log pi_student, in nats per token.
        min_advantage: Its least value, in nats.
        far_share: The share of tokens whose advantage is beyond FAR nats, to either side.
        clipped_share: The share of tokens whose advantage is beyond ADVANTAGE_CLIP nats.
        teacher_entropy: The mean entropy of the teacher, in nats per token. None where the cache
            has neither its entropy nor its top-K.
        entropy_is_bound: Whether that is the entropy of the top-K and the rest as one outcome,
            which is a lower bound.
        top_k: The number of the teacher's likeliest tokens at each place, or 0.
        top_k_coverage: The share of the sampled tokens that are among these. For rollouts at
            temperature 1 it is the student's probability of the top-K. None without a top-K.
    """

    num_tokens: int
    num_shards: int
    num_shards_in_cache: int
    mean_advantage: float
    min_advantage: float
    far_share: float
    clipped_share: float
    teacher_entropy: float | None = None
    entropy_is_bound: bool = False
    top_k: int = 0
    top_k_coverage: float | None = None

    @property
    def num_far(self) -> int:
        """The number of tokens whose advantage is beyond FAR nats."""
        return round(self.far_share * self.num_tokens)

    @property
    def num_excluded(self) -> int:
        """The number of tokens whose advantage is beyond ADVANTAGE_CLIP nats."""
        return round(self.clipped_share * self.num_tokens)

    @property
    def excluded_share(self) -> float:
        """The share of these among the tokens that are beyond FAR nats; 0 where there is none."""
        return share_excluded(self.num_far, self.num_excluded)


def share_excluded(num_far: int, num_excluded: int) -> float:
    """Return the share of the tokens beyond ADVANTAGE_CLIP among those beyond FAR, or 0."""
    return num_excluded / num_far if num_far else 0.0


class RegimeScan:
    """Adds up the figures of tables of rows, in constant memory."""

    def __init__(self) -> None:
        # Of all tokens that were read, whether they carry loss or not.
        self.num_read = 0
        self._num_tokens = 0
        self._total = 0.0
        self._least = np.inf
        self._num_far = 0
        self._num_clipped = 0
        self._entropy = 0.0
        self._num_entropies = 0
        self._entropy_is_bound = False
        self._top_k = 0
        self._num_covered = 0
        self._num_with_top = 0

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table. One without scores or without sampling_logprobs adds nothing."""
        # Rollouts have no scores, and some imported caches do not say how they were sampled.
        if not {_SCORED, _SAMPLED} <= set(table.column_names):
            return
        teacher = flat(table, _SCORED)[0]
        sampled = flat(table, _SAMPLED)[0]
        carries_loss = loss_tokens(table)
        self.num_read += len(carries_loss)
        # A damaged cache is inspected, too.
        if not len(teacher) == len(sampled) == len(carries_loss):
            return
        advantage = teacher.astype(np.float64) - sampled
        chosen = carries_loss & np.isfinite(advantage)
        self._add_advantage(advantage[chosen])
        if ENTROPY in table.column_names:
            self._add_entropy(flat(table, ENTROPY)[0], chosen)
        if {TOP_IDS, TOP_LOGPROBS, TAIL} <= set(table.column_names):
            self._add_top_k(table, chosen)

    def _add_advantage(self, advantage: NDArray[np.float64]) -> None:
        if not advantage.size:
            return
        self._num_tokens += advantage.size
        self._total += float(advantage.sum())
        self._least = min(self._least, float(advantage.min()))
        self._num_far += int((np.abs(advantage) > FAR).sum())
        self._num_clipped += int((np.abs(advantage) > ADVANTAGE_CLIP).sum())

    def _add_entropy(self, entropy: Floats, chosen: NDArray[np.bool_]) -> None:
        if len(entropy) == len(chosen):
            values = entropy[chosen].astype(np.float64)
            values = values[np.isfinite(values)]
            self._entropy += float(values.sum())
            self._num_entropies += values.size

    def _add_top_k(self, table: pa.Table, chosen: NDArray[np.bool_]) -> None:
        """Add the coverage, and the entropy where the cache does not have it."""
        tokens = flat(table, "token_ids")[0]
        ids = flat(table, TOP_IDS)[0]
        logprobs = flat(table, TOP_LOGPROBS)[0]
        tail = flat(table, TAIL)[0]
        num_tokens = len(tokens)
        # K is written nowhere. It is the number of ids per token.
        k = len(ids) // max(1, num_tokens)
        if not (k and len(ids) == len(logprobs) == k * num_tokens and len(tail) == num_tokens):
            return
        self._top_k = k
        # In blocks, because [tokens, K] in 64 bits would be the largest array by far.
        for start in range(0, num_tokens, _BLOCK):
            part = slice(start, start + _BLOCK)
            kept = chosen[part]
            of_part = slice(start * k, (start + _BLOCK) * k)
            is_there = ids[of_part].reshape(-1, k) == tokens[part, None]
            self._num_covered += int(is_there.any(1)[kept].sum())
            self._num_with_top += int(kept.sum())
            if ENTROPY not in table.column_names:
                top = logprobs[of_part].reshape(-1, k)[kept]
                outcomes = np.concatenate([top, tail[part][kept, None]], 1).astype(np.float64)
                # All other tokens together are one outcome: what is one cannot have more entropy
                # than what it is made of.
                self._entropy -= float((np.exp(outcomes) * outcomes).sum())
                self._num_entropies += len(outcomes)
                self._entropy_is_bound = True

    def figures(self, num_shards: int, num_shards_in_cache: int) -> RegimeFigures | None:
        """Return the figures, or None where no token has an advantage."""
        if not self._num_tokens:
            return None
        return RegimeFigures(
            num_tokens=self._num_tokens,
            num_shards=num_shards,
            num_shards_in_cache=num_shards_in_cache,
            mean_advantage=self._total / self._num_tokens,
            min_advantage=self._least,
            far_share=self._num_far / self._num_tokens,
            clipped_share=self._num_clipped / self._num_tokens,
            teacher_entropy=_ratio(self._entropy, self._num_entropies),
            entropy_is_bound=self._entropy_is_bound,
            top_k=self._top_k,
            top_k_coverage=_ratio(self._num_covered, self._num_with_top),
        )


def measure_regime(
    folder: str | Path, *, most_shards: int = MOST_SHARDS, most_tokens: int = MOST_TOKENS
) -> RegimeFigures | None:
    """Measure a cache from a part of it, in bounded time and memory.

    The shards are evenly spaced, and each is read from its beginning, so the same cache gives the
    same figures. Pages are compared with their own checksums and not with those of the manifest.

    Args:
        folder: The cache.
        most_shards: How many shards are read at most.
        most_tokens: After about how many response tokens the reading ends.

    Returns:
        The figures, or None where the cache lacks one of the two log-probabilities.

    Raises:
        ArtifactError: There is no manifest, or a shard is damaged.
    """
    folder = Path(folder)
    names = [one.name for one in read_manifest(folder).shards if one.name.endswith(".parquet")]
    chosen = evenly_spaced(names, most_shards)
    scan = RegimeScan()
    for index, name in enumerate(chosen):
        # Each shard has an equal share of what the shards before it have left.
        limit = scan.num_read + (most_tokens - scan.num_read) // (len(chosen) - index)
        for table in _pieces(folder / name):
            if scan.num_read >= limit:
                break
            scan.add(table)
    return scan.figures(len(chosen), len(names))


def evenly_spaced(values: Sequence[_T], count: int) -> list[_T]:
    """Return so many values with the first and the last one, or all where there are fewer."""
    if len(values) <= count:
        return list(values)
    return [values[index] for index in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _pieces(path: Path) -> Iterator[pa.Table]:
    """Yield the rows of a shard, a few at a time, with the columns that are measured."""
    try:
        # Not by read_shard(), which hashes the whole file: a training does that when it reads all.
        file = pq.ParquetFile(
            path, memory_map=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        with file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_shard(path, error) from None


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
