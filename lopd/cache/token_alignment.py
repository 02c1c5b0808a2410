"""What became of each token of a response that a teacher of another tokenizer scored.

lopd.tasks.cross_tokenizer aligns the tokens. Here is what the cache keeps of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd.cache.columns import ALIGNMENT, flat


class Alignment(IntEnum):
    """What became of a token. Only aligned tokens carry loss."""

    ALIGNED = 0
    # A special token that the teacher does not have.
    SPECIAL = 1
    # The teacher's text has other bytes here: its tokenizer normalises, or the bytes are no text.
    OTHER_TEXT = 2
    # The student's tokenizer makes other tokens from the text than those that were sampled.
    NOT_CANONICAL = 3
    # The last chunk of a response that was cut off: what follows would decide its tokens.
    CUT_OFF = 4
    # Behind what fits into the teacher's context. Its tokens of a text may be more than the
    # student's.
    TOO_LONG = 5


REASONS = {
    Alignment.SPECIAL: "special tokens without a counterpart",
    Alignment.OTHER_TEXT: "other bytes in the teacher's text",
    Alignment.NOT_CANONICAL: "not what the text encodes to",
    Alignment.CUT_OFF: "at the end of a response that was cut off",
    Alignment.TOO_LONG: "beyond sglang.context_length in the teacher's tokens",
}


def count_alignment(table: pa.Table) -> dict[str, int]:
    """Return the number of tokens of each ``Alignment`` by its name, and of responses without loss.

    It is empty where the table has no such column.
    """
    if ALIGNMENT not in table.column_names:
        return {}
    values, rows = flat(table, ALIGNMENT)
    counts = {one.name.lower(): int((values == one).sum()) for one in Alignment}
    # minlength counts the responses behind the last aligned token, too.
    num_aligned = np.bincount(rows[values == Alignment.ALIGNED], minlength=table.num_rows)
    return counts | {"responses_without_loss": int((num_aligned == 0).sum())}


def alignment_counts(folder: str | Path) -> dict[str, int]:
    """Return count_alignment() of all shards of a folder."""
    total: dict[str, int] = {}
    # Of the shards and not of what this process has scored: others may have been there before.
    for path in sorted(Path(folder).glob("shard-*.parquet")):
        file = pq.ParquetFile(path)
        if ALIGNMENT not in file.schema_arrow.names:
            return {}
        for name, count in count_alignment(file.read(columns=[ALIGNMENT])).items():
            total[name] = total.get(name, 0) + count
    return total


def alignment_line(counts: Mapping[str, int]) -> str:
    """Return in words how many tokens carry loss, and why the others do not."""
    reasons = {one: counts[one.name.lower()] for one in Alignment}
    total = max(1, sum(reasons.values()))
    told = f"{reasons[Alignment.ALIGNED] / total:.2%} of {total:,} tokens carry loss"
    masked = [
        f"{count:,} {REASONS[one]}"
        for one, count in reasons.items()
        if count and one is not Alignment.ALIGNED
    ]
    # Such a response takes its place in a batch and teaches nothing.
    silent = counts["responses_without_loss"]
    if silent:
        masked.append(f"{silent:,} responses have none at all")
    return f"{told}; without: {', '.join(masked)}" if masked else told
