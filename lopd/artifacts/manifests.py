"""Manifests: what an artifact was made from, by whom, and the checksum of each of its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lopd.artifacts.fingerprints import sha256_json
from lopd.artifacts.publishing import publish_json
from lopd.errors import ArtifactError
from lopd.records import Manifest, ModelIdentity, ShardInfo

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    publish_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact. ArtifactError: missing, not JSON, of a newer schema, or with
    unknown fields.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            "no manifest.json", where=str(folder), remedy="run the stage that makes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"manifest cannot be read ({error})",
            where=str(path),
            remedy="remove the stage's folder and run the stage again",
        ) from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"manifest of schema version {version}",
            where=str(path),
            limit=f"this lopd reads up to {SCHEMA_VERSION}",
            remedy="use a newer lopd",
        )
    try:
        raw["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
        raw["models"] = {
            role: ModelIdentity(**identity) for role, identity in raw["models"].items()
        }
        return Manifest(**raw)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"manifest has wrong fields ({error})",
            where=str(path),
            remedy="remove the stage's folder and run the stage again",
        ) from None


def fingerprint(manifest: Manifest) -> str:
    """Names an artifact by what it was made from and by its content."""
    shards = [(shard.name, shard.sha256) for shard in manifest.shards]
    return sha256_json(
        [manifest.kind, manifest.schema_version, manifest.inputs, manifest.parents, shards]
    )


def origin_of(manifest: Manifest) -> str:
    """Names what an artifact is made from, before there is any content: it stands in every shard's
    metadata as ``lopd.origin``.
    """
    return sha256_json([manifest.kind, as_json(manifest.inputs), as_json(manifest.parents)])


def as_json(value: Any) -> Any:
    """Return the value as it is after writing it as JSON and reading it again."""
    return json.loads(json.dumps(value, default=str))
