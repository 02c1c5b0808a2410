"""Manifests: from what an artifact was made, by whom, and the checksum of each of its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lopd.artifacts.fingerprints import sha256_json
from lopd.artifacts.publishing import publish_json
from lopd.errors import ArtifactError
from lopd.records import Manifest, ModelIdentity, ShardInfo

# Raised by a change that an older reader would misread. docs/cache_format.md specifies it.
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# The key of a shard's Parquet metadata that holds origin_of() its artifact.
ORIGIN_KEY = b"lopd.origin"
_MAKE_AGAIN = "remove the stage's folder and run the stage again"


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Publish the manifest of an artifact. See publish_bytes() for the errors."""
    folder = Path(folder)
    publish_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an artifact.

    Raises:
        ArtifactError: The manifest is missing, is not JSON, has a newer schema or wrong fields.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        # NotADirectoryError: the user has given a file where a folder is expected.
        raise ArtifactError(
            f"there is no {MANIFEST} in this folder",
            where=str(folder),
            remedy="run the stage that makes it",
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the manifest cannot be read ({error})", where=str(path), remedy=_MAKE_AGAIN
        ) from None
    # The version is looked at before the fields. A newer schema may have other fields, and the
    # user should read about the version and not about them.
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"the manifest has schema version {version}",
            where=str(path),
            limit=f"at most {SCHEMA_VERSION}, which this lopd reads",
            remedy="install a newer lopd",
        )
    try:
        raw["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
        raw["models"] = {
            role: ModelIdentity(**identity) for role, identity in raw["models"].items()
        }
        return Manifest(**raw)
    except (KeyError, TypeError) as error:
        # A missing, unknown or misspelt key of any of the three records.
        raise ArtifactError(
            f"the manifest has wrong fields ({error})", where=str(path), remedy=_MAKE_AGAIN
        ) from None


def read_complete(folder: str | Path) -> Manifest:
    """Read the manifest of an artifact that must be complete.

    Raises:
        ArtifactError: See read_manifest(), or the artifact is not complete.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    # An incomplete artifact has sound shards. A reader that took them for all would learn from a
    # part.
    if not manifest.complete:
        raise ArtifactError(
            "the artifact is not complete",
            where=str(folder),
            remedy="run the stage that makes it again, until it is complete",
        )
    return manifest


def fingerprint(manifest: Manifest) -> str:
    """Return what names an artifact: from what it was made, together with its content."""
    # The versions of the software, the lineage and the statistics stay out. They tell how the
    # content came about and must not make an artifact another one when the content is the same.
    shards = [(shard.name, shard.sha256) for shard in manifest.shards]
    return sha256_json(
        [manifest.kind, manifest.schema_version, manifest.inputs, manifest.parents, shards]
    )


def origin_of(manifest: Manifest) -> str:
    """Return what names the material of an artifact, before there is any content."""
    # Every shard carries it in its metadata, so that no shard of another run is taken in. The
    # fingerprint cannot do this, because it is known only when the last shard is published.
    return sha256_json([manifest.kind, as_json(manifest.inputs), as_json(manifest.parents)])


def as_json(value: Any) -> Any:
    """Return the value as it is after it was written as JSON and read again."""
    # A path becomes a string and a tuple becomes a list. Only values in this form can be compared
    # with those of a manifest from disk.
    return json.loads(json.dumps(value, default=str))
