"""Log-probabilities in 16 bits: a smaller cache, and the measured change of its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd.cache.columns import BASE, TAIL, TOP_LOGPROBS, loss_tokens, to_arrays, to_lists
from lopd.errors import ArtifactError
from lopd.records import Manifest

# The key of a shard's Parquet metadata that holds what 16 bits changed.
LOSS = b"lopd.logprob_loss"
_HALVED = ("sampling_logprobs", "teacher_logprobs", BASE, TOP_LOGPROBS, TAIL)


def halve(table: pa.Table) -> pa.Table:
    """Return the same rows with log-probabilities as float16.

    The metadata of the table records the number of values, and their largest and summed absolute
    change in nats, over all such columns.

    Raises:
        ArtifactError: A value is below what float16 can hold.
    """
    num_values = 0
    largest = 0.0
    summed = 0.0
    carries_loss = loss_tokens(table)
    for name in _HALVED:
        if name not in table.column_names:
            continue
        # As float32, also if the column was halved before. Halving twice changes no value.
        rows = to_arrays(table.column(name))
        exact = np.concatenate(rows) if rows else np.zeros(0, np.float32)
        # numpy would make such a value infinite without an error.
        if exact.size and np.abs(exact).max() > np.finfo(np.float16).max:
            raise ArtifactError(
                f"{name} has a value of {exact.min()} nats, which float16 cannot hold",
                limit="at least -65504 nats",
                remedy="set score.logprob_bits = 32",
            )
        # In float64, so that the sum of many small changes keeps its digits.
        change = np.abs(exact.astype(np.float64) - exact.astype(np.float16))
        largest = max(largest, float(change.max(initial=0)))
        # Tokens without loss often have a 0, which 16 bits do not change. They are not counted.
        if len(change) == len(carries_loss):
            change = change[carries_loss]
        num_values += len(change)
        summed += float(change.sum())
        halved = to_lists([row.astype(np.float16) for row in rows], pa.float16())
        table = table.set_column(table.column_names.index(name), name, halved)
    # The sum and not the mean is recorded, so that shards of different sizes can be added up.
    loss = {"num_values": num_values, "max_abs": largest, "sum_abs": summed}
    metadata = {**(table.schema.metadata or {}), LOSS: json.dumps(loss).encode()}
    return table.replace_schema_metadata(metadata)


def logprob_loss(folder: str | Path, manifest: Manifest | None = None) -> dict[str, float] | None:
    """Return what 16 bits changed over all shards, from their footers.

    Args:
        manifest: Names the shards. None means all that are in the folder.

    Returns:
        ``max_abs`` and ``mean_abs`` in nats, or None if the artifact is lossless.
    """
    folder = Path(folder)
    if manifest is not None:
        # A complete artifact lists its shards. One that is being written has none in its manifest
        # yet.
        names = [shard.name for shard in manifest.shards]
    else:
        names = sorted(path.name for path in folder.glob("shard-*.parquet"))
    losses: list[dict[str, Any]] = []
    for name in names:
        # Each shard keeps its own loss beside the data, so no column has to be read for it.
        metadata = pq.read_schema(folder / name).metadata or {}
        if LOSS in metadata:
            losses.append(json.loads(metadata[LOSS]))
    if not losses:
        return None
    total = sum(loss["num_values"] for loss in losses)
    return {
        "max_abs": max(loss["max_abs"] for loss in losses),
        # Of a shard with many values the mean counts more, so sums are added and divided once.
        "mean_abs": sum(loss["sum_abs"] for loss in losses) / max(1, total),
    }
