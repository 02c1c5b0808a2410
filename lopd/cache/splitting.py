"""Several caches from one, by prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from lopd.artifacts import ArtifactWriter, read_complete, read_shard
from lopd.cache.columns import without_origin
from lopd.cache.merging import carried
from lopd.errors import LopdError
from lopd.records import Manifest


def split(source: str | Path, out: str | Path, parts: int) -> list[Manifest]:
    """Publish ``out/part-00``, ``out/part-01`` and so on.

    Every prompt is in exactly one part, with all its responses. A hash of its id decides.

    Raises:
        ArtifactError: The source is not complete or is damaged.
        LopdError: The number of parts or the place of ``out`` is impossible.
    """
    source = Path(source)
    out = Path(out)
    manifest = read_complete(source)
    _check_split(source, manifest, out, parts)
    writers = [
        ArtifactWriter(
            out / f"part-{part:02d}",
            kind=manifest.kind,
            # The number of parts is an input, too: part 0 of 2 is not part 0 of 3.
            inputs={"split.part": part, "split.parts": parts},
            parents={manifest.kind: manifest.fingerprint},
            models=manifest.models,
            sampling=manifest.sampling,
            lineage=manifest.lineage,
        )
        for part in range(parts)
    ]
    # Each shard is read once and dealt to all parts. A shard keeps its number in each part, so a
    # killed split finds what it has published.
    for index, shard in enumerate(manifest.shards):
        table = without_origin(read_shard(source, shard))
        owners = [part_of(name, parts) for name in table.column("prompt_id").to_pylist()]
        for part, writer in enumerate(writers):
            rows = np.flatnonzero(np.array(owners, dtype=np.int64) == part)
            # A shard may have no prompt of this part. Numbers of shards may be missing.
            if len(rows) and not writer.is_published(index):
                writer.publish_shard(index, table.take(pa.array(rows)))
    return [writer.finish(**carried(manifest)) for writer in writers]


def _check_split(source: Path, manifest: Manifest, out: Path, parts: int) -> None:
    """Raise LopdError if the split is impossible."""
    if parts < 2:
        raise LopdError(
            f"{parts} parts",
            where="lopd cache split",
            limit="at least 2",
            remedy="give --parts 2 or more",
        )
    # At least one part would be empty, and an empty cache can train nothing.
    if parts > manifest.rows:
        raise LopdError(
            f"{parts} parts",
            where="lopd cache split",
            limit=f"at most {manifest.rows}, the number of responses in the cache",
            remedy="lower --parts",
        )
    # The parts would be foreign files in the folder that they were made from.
    if out.resolve().is_relative_to(source.resolve()):
        raise LopdError(
            "the parts would lie inside the cache",
            where=str(out),
            limit="a folder outside the cache",
            remedy="set --out to another folder",
        )


def part_of(prompt_id: str, parts: int, seed: str = "") -> int:
    """Return which of the parts a prompt belongs to.

    It is the same on every machine. Another seed gives an independent division.
    """
    # Python's hash() differs from process to process. The zero byte keeps the seed and the id
    # apart, so that no two pairs of them make the same text.
    digest = hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % parts
