"""The last rows of a shard, for a look at a cache that is being made."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts.reader import damaged_shard
from lopd.cache.table import scored_rows
from lopd.records import Response


def last_rows(path: str | Path, count: int) -> list[Response]:
    """Return the last responses of a shard, at most those of its last row group.

    The file is not hashed and only its end is read, because a shard may have hundreds of MB.

    Raises:
        ArtifactError: The shard is damaged.
    """
    try:
        file = pq.ParquetFile(path)
        groups = file.metadata.num_row_groups
        if groups == 0:
            return []
        # The last group alone: a shard may have thousands of long responses, and a few are shown.
        table = file.read_row_group(groups - 1, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise damaged_shard(Path(path), error) from None
    newest = table.slice(max(0, table.num_rows - count)).combine_chunks()
    return [response for response, _ in scored_rows(newest, str(path), without_sampling=True)]
