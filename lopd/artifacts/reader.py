"""Reading of shards. Every read holds the bytes against the sha256 in the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts.fingerprints import sha256_file
from lopd.artifacts.manifests import MANIFEST
from lopd.errors import ArtifactError
from lopd.records import Manifest, ShardInfo

_CHANGED = "the file was truncated or changed: its checksum differs"


def parse_shard(path: Path, content: bytes) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_shard(path, error) from None


def damaged_shard(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"damaged shard ({str(error).splitlines()[0]})",
        where=str(path),
        remedy="remove this file and run its stage again",
    )


def read_shard(folder: Path, shard: ShardInfo) -> pa.Table:
    """One shard's rows. ArtifactError: missing, or its checksum is not the manifest's."""
    path = folder / shard.name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(
            "file is missing", where=str(path), remedy=_remake(folder, shard)
        ) from None
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ArtifactError(
            f"{_CHANGED} ({len(content)} bytes)",
            where=str(path),
            limit=f"sha256 {shard.sha256[:16]}...",
            remedy=_remake(folder, shard),
        )
    return parse_shard(path, content)


def verify(folder: Path, manifest: Manifest) -> None:
    """Checks that every file of a complete artifact is there with its checksum. ArtifactError names
    the first that is not.
    """
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ArtifactError("file is missing", where=str(path), remedy=_remake(folder, shard))
        if sha256_file(path) != shard.sha256:
            raise ArtifactError(
                _CHANGED,
                where=str(path),
                limit=f"sha256 {shard.sha256[:16]}...",
                remedy=_remake(folder, shard),
            )


def _remake(folder: Path, shard: ShardInfo) -> str:
    """How to have a damaged file made again with the least work."""
    if shard.name.endswith(".parquet"):
        return f"remove this file and {folder / MANIFEST}, then run stage {folder.name} again: it makes this shard and keeps the others"
    return f"remove the folder {folder}, then run stage {folder.name} again"


def published_rows(folder: Path) -> int:
    """Rows in the shards that are on disk, listed in a manifest or not yet. Reads only their
    footers. ArtifactError: one is damaged.
    """
    rows = 0
    for path in folder.glob("shard-*.parquet"):
        try:
            rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise damaged_shard(path, error) from None
    return rows
