"""The columns of a shard as numpy arrays, and back.

A list column of Arrow is one flat array of values with the offsets of its rows. Most work on a
cache is done on the flat values, without a Python object per response.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

# Optional columns of docs/cache_format.md. The first two have K values for each token.
TOP_IDS = "teacher_top_ids"
TOP_LOGPROBS = "teacher_top_logprobs"
TAIL = "teacher_tail_logprob"
ENTROPY = "teacher_entropy"
# One value for each token, by the teacher's own base.
BASE = "teacher_base_logprobs"
# Where the teacher has another tokenizer: what became of each token. 0 is aligned.
ALIGNMENT = "alignment"
# Which tokens carry loss. Without the column all of them do.
LOSS_MASK = "loss_mask"
# The experts that the sampler chose at every position, [P + R - 1, layers, k] flattened.
ROUTED_EXPERTS = "routed_experts"
# The key of a shard's Parquet metadata that says how the column routed_experts is to be read. It is
# there if the column is. Its value is JSON: {"layers", "k"}.
ROUTED = b"lopd.routed_experts"


def to_lists(rows: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    """Return a list column with one list per array."""
    # One array of all values, because Python lists of the values would take much more memory.
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    # One copy of all values, in the order of the rows.
    values = np.concatenate(rows) if rows else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=kind))


def to_arrays(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return one array per row of a list column. float16 becomes float32."""
    array = column.combine_chunks()
    # A table without rows may have no chunk, and then there is nothing to combine.
    if isinstance(array, pa.ChunkedArray):
        return []
    # The offsets of a slice do not begin at 0, but they fit the values that belong to them.
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    # Row i lies between the offsets i and i + 1. The arrays are views, so this copies nothing.
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def flat(table: pa.Table, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return all values of a list column in order, and the row that each belongs to.

    Returns:
        The values [N] and the rows [N]. float16 becomes float32, and null becomes NaN.
    """
    lists = table.column(column)
    values = (
        # Chunk by chunk: combining the chunks first would copy the column once more.
        np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks])
        if lists.num_chunks
        else np.zeros(0)
    )
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    return values, np.repeat(np.arange(table.num_rows), list_lengths(table, column))


def loss_tokens(table: pa.Table) -> NDArray[np.bool_]:
    """Return which of the tokens [N] carry loss, for the statistics of a table.

    Those that do not were written by a tool or a template, or have no score. What stands in their
    log-probabilities says nothing, and is often 0, which would be a model that is certain.
    """
    ids, rows = flat(table, "token_ids")
    if LOSS_MASK not in table.column_names:
        return np.ones(len(ids), bool)
    lengths = list_lengths(table, LOSS_MASK)
    # A damaged cache is inspected, too. Where the mask does not fit, nothing is left out.
    if not np.array_equal(lengths, np.bincount(rows, minlength=table.num_rows)):
        return np.ones(len(ids), bool)
    # A null is no true, so such a token counts as one without loss.
    return np.asarray(flat(table, LOSS_MASK)[0] == 1, dtype=np.bool_)


def list_lengths(table: pa.Table, column: str) -> NDArray[np.int64]:
    """Return the number of values in each row of a list column. A null row has none."""
    # Arrow gives null for the length of a null row, which would become NaN in numpy.
    lengths: NDArray[np.int64] = np.asarray(
        pc.fill_null(pc.list_value_length(table.column(column)), 0).to_numpy(), dtype=np.int64
    )
    return lengths


def without_origin(table: pa.Table) -> pa.Table:
    """Return the rows without what their shard says of the artifact that it was part of.

    What says how the columns are to be read stays.
    """
    # The origin and the loss of 16 bits belong to the shard. The shape of the experts belongs to
    # the rows.
    found = table.schema.metadata or {}
    return table.replace_schema_metadata({ROUTED: found[ROUTED]} if ROUTED in found else None)


def column_bytes(folder: str | Path) -> dict[str, int]:
    """Return the compressed bytes on disk of each column, from the footers of the shards.

    ``footers`` has the bytes that belong to no column.
    """
    folder = Path(folder)
    total: dict[str, int] = {"footers": 0}
    for path in sorted(folder.glob("shard-*.parquet")):
        metadata = pq.read_metadata(path)
        # Everything counts as footer first. What the columns have is then taken off again.
        total["footers"] += path.stat().st_size
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                # A list column is called "token_ids.list.element" here.
                name = column.path_in_schema.partition(".")[0]
                total[name] = total.get(name, 0) + column.total_compressed_size
                total["footers"] -= column.total_compressed_size
    return total
