"""Artifacts: a folder of atomically published Parquet shards (or model files) and a manifest that
says from what they were made, and by whom.

Publishing is write, fsync, rename; what was renamed is complete, so a stage that was killed goes on
at the first shard that is missing. Shard ``i`` always holds the same keys, so a resumed artifact is
file for file the one of a run never killed. Every shard's sha256 stands in the manifest and is
checked on read.
"""

from __future__ import annotations

from lopd.artifacts.fingerprints import (
    identify_model,
    sha256_file,
    sha256_json,
    software_versions,
)
from lopd.artifacts.manifests import (
    MANIFEST,
    SCHEMA_VERSION,
    fingerprint,
    origin_of,
    read_manifest,
    write_manifest,
)
from lopd.artifacts.publishing import (
    check_replaceable,
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    storage_errors,
)
from lopd.artifacts.reader import (
    published_rows,
    read_shard,
    verify,
)
from lopd.artifacts.writer import (
    ArtifactWriter,
    Share,
)

EXPORT_MARK = "lopd.json"  # in an exported checkpoint: how it was made

__all__ = [
    "EXPORT_MARK",
    "MANIFEST",
    "SCHEMA_VERSION",
    "ArtifactWriter",
    "Share",
    "check_replaceable",
    "fingerprint",
    "fsync_folder",
    "identify_model",
    "origin_of",
    "publish_bytes",
    "publish_json",
    "published_rows",
    "read_manifest",
    "read_shard",
    "remove_folder",
    "sha256_file",
    "sha256_json",
    "software_versions",
    "storage_errors",
    "verify",
    "write_manifest",
]
