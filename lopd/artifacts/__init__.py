"""Artifacts: what a stage publishes for the next one.

An artifact is a folder. It holds Parquet shards or the files of a model, each published atomically,
and a manifest that says from what they were made, and by whom.

Publishing is write, fsync, rename. What has its final name is complete, so a killed stage continues
at the first missing shard. Shard ``i`` always holds the same keys. A resumed artifact is therefore
equal, file by file, to the artifact of a run that was never killed. The manifest holds the sha256
of every shard, and every read checks it.

    publishing.py    write, fsync, rename; removal of folders; errors of the disk
    fingerprints.py  names of values, files, models and software by their content
    file_hashes.py   hashes of large files that are remembered from call to call
    manifests.py     the manifest: writing, reading, and what names an artifact
    writer.py        publishes an artifact shard by shard, and resumes
    reader.py        reads and verifies shards
    lineage.py       whether the scoring teacher made the student's SFT data
"""

from __future__ import annotations

from lopd.artifacts.fingerprints import (
    identify_model,
    identify_tokenizer,
    published_weights,
    sha256_file,
    sha256_json,
    software_versions,
)
from lopd.artifacts.manifests import (
    MANIFEST,
    ORIGIN_KEY,
    SCHEMA_VERSION,
    fingerprint,
    origin_of,
    read_complete,
    read_manifest,
    write_manifest,
)
from lopd.artifacts.publishing import (
    EXPORT_MARK,
    check_replaceable,
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    storage_errors,
)
from lopd.artifacts.reader import published_rows, read_shard, verify
from lopd.artifacts.writer import ArtifactWriter, Share, expected_shards

__all__ = [
    "EXPORT_MARK",
    "MANIFEST",
    "ORIGIN_KEY",
    "SCHEMA_VERSION",
    "ArtifactWriter",
    "Share",
    "check_replaceable",
    "expected_shards",
    "fingerprint",
    "fsync_folder",
    "identify_model",
    "identify_tokenizer",
    "origin_of",
    "publish_bytes",
    "publish_json",
    "published_rows",
    "published_weights",
    "read_complete",
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
