"""Reading of shards. Every read compares the bytes with the sha256 of the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts.file_hashes import HASHES
from lopd.artifacts.manifests import MANIFEST
from lopd.errors import ArtifactError
from lopd.records import Manifest, ShardInfo


def parse_shard(path: Path, content: bytes) -> pa.Table:
    """Return the rows of a shard's bytes.

    Args:
        path: Where the bytes are from, for the error.

    Raises:
        ArtifactError: The bytes are not a whole Parquet file.
    """
    # A shard that no manifest lists yet has no sha256 to be compared with. Each of its pages has a
    # checksum of its own.
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_shard(path, error) from None


def damaged_shard(path: Path, error: Exception) -> ArtifactError:
    """Return the error for a shard that cannot be read as Parquet."""
    # pyarrow adds a trace of its C++ frames below the first line.
    reason = str(error).splitlines()[0]
    return ArtifactError(
        f"the shard is damaged ({reason})",
        where=str(path),
        remedy="remove this file and run the stage that makes it again",
    )


def read_shard(folder: str | Path, shard: ShardInfo) -> pa.Table:
    """Return the rows of one shard.

    Raises:
        ArtifactError: The file is missing, or its checksum is not the one of the manifest.
    """
    folder = Path(folder)
    path = folder / shard.name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _missing(folder, shard) from None
    # The bytes are hashed in memory and then parsed from memory. The rows are therefore those that
    # were checked, even if the file changes meanwhile.
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise _changed(folder, shard, len(content))
    return parse_shard(path, content)


def verify(folder: str | Path, manifest: Manifest) -> None:
    """Check that every file of an artifact is there with its checksum.

    Raises:
        ArtifactError: A file is missing or changed. The error names the first one.
    """
    folder = Path(folder)
    # In the order of the manifest, so that the error is the same at every call.
    paths = [folder / shard.name for shard in manifest.shards]
    for path, shard in zip(paths, manifest.shards, strict=True):
        if not path.is_file():
            raise _missing(folder, shard)
    for path, shard, found in zip(paths, manifest.shards, HASHES.sha256_all(paths), strict=True):
        if found != shard.sha256:
            raise _changed(folder, shard, path.stat().st_size)


def _missing(folder: Path, shard: ShardInfo) -> ArtifactError:
    return ArtifactError(
        "the file is missing", where=str(folder / shard.name), remedy=_make_again(folder, shard)
    )


def _changed(folder: Path, shard: ShardInfo, size: int) -> ArtifactError:
    return ArtifactError(
        f"the file was truncated or changed: its checksum differs ({size} bytes)",
        where=str(folder / shard.name),
        # Enough digits to find the manifest's line with grep.
        limit=f"exactly the recorded sha256, {shard.sha256[:16]}...",
        remedy=_make_again(folder, shard),
    )


def _make_again(folder: Path, shard: ShardInfo) -> str:
    """Return the remedy that makes a damaged file again with the least work."""
    # Without the manifest the stage counts as unfinished. It then keeps every shard that it finds.
    if shard.name.endswith(".parquet"):
        return (
            f"remove this file and {folder / MANIFEST}, then run stage {folder.name} again: "
            "it makes this shard and keeps the others"
        )
    return f"remove the folder {folder}, then run stage {folder.name} again"


def published_rows(folder: str | Path) -> int:
    """Count the rows of the shards that are on disk, whether a manifest lists them or not.

    Only the footers are read.

    Raises:
        ArtifactError: A shard is damaged.
    """
    folder = Path(folder)
    # This is called for a progress display. Hashing would read gigabytes for one number.
    rows = 0
    for path in folder.glob("shard-*.parquet"):
        try:
            rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise damaged_shard(path, error) from None
    return rows
