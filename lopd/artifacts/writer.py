"""Writing of an artifact, shard by shard. A second writer with the same inputs goes on where the
first was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts.fingerprints import sha256_file, software_versions
from lopd.artifacts.manifests import (
    MANIFEST,
    SCHEMA_VERSION,
    as_json,
    fingerprint,
    origin_of,
    read_manifest,
    write_manifest,
)
from lopd.artifacts.publishing import publish_bytes, storage_errors
from lopd.artifacts.reader import parse_shard
from lopd.errors import ArtifactError
from lopd.records import Manifest, ModelIdentity, ShardInfo

_SHARD_SIZE = "shard_size"  # in a manifest's extra
# A row group is what a reader by index decodes to get one response. It has about this many tokens.
_ROW_GROUP_TOKENS = 16384
# In a shard's metadata: the hash of what its artifact is made from, so that no shard is taken for
# a shard of another artifact.
_ORIGIN = b"lopd.origin"


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of ``count`` workers of a stage does: the shards i with i mod count = index. Nothing
    is merged afterwards: the shards are the artifact.
    """

    index: int
    count: int

    def takes(self, shard: int) -> bool:
        return shard % self.count == self.index


class ArtifactWriter:
    """Publishes one artifact into ``folder``, shard by shard; a second writer with the same inputs
    goes on where the first was killed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        inputs: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        models: Mapping[str, ModelIdentity] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
        shard_size: int | None = None,
        share: Share | None = None,
    ) -> None:
        """shard_size: rows per shard, for one that is begun here; one that goes on keeps the size
        it was begun with. share: only these shards are to be published; other writers work in the
        same folder, and one without a share completes it.

        ArtifactError: the folder holds an artifact, or a shard of one, made from other inputs.
        """
        self.folder, self._share = folder, share
        self._manifest = Manifest(
            kind=kind,
            schema_version=SCHEMA_VERSION,
            complete=False,
            inputs=dict(inputs),
            parents=dict(parents or {}),
            models=dict(models or {}),
            sampling=dict(sampling or {}),
            lineage=dict(lineage or {}),
            rows=0,
            shards=(),
            versions=software_versions(),
            extra={} if shard_size is None else {_SHARD_SIZE: shard_size},
        )
        self._origin = origin_of(self._manifest)
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)
            if (found.kind, found.inputs, found.parents) != (
                kind,
                as_json(inputs),
                as_json(parents or {}),
            ):
                raise ArtifactError(
                    "holds an artifact made from other inputs",
                    where=str(folder),
                    remedy="remove it or use another run directory",
                )
            begun = {_SHARD_SIZE: found.extra[_SHARD_SIZE]} if _SHARD_SIZE in found.extra else {}
            self._manifest = dataclasses.replace(
                self._manifest,
                shards=found.shards,
                rows=found.rows,
                extra={**self._manifest.extra, **begun},
            )
        else:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_manifest(folder, self._manifest)
        self._adopt_shards()

    def _adopt_shards(self) -> None:
        """Shards renamed into place by a writer that was killed before it finished count as
        published.
        """
        known = {shard.name: shard for shard in self._manifest.shards}
        for path in sorted(self.folder.glob("shard-*.parquet")):
            if path.name not in known:
                table = parse_shard(path, path.read_bytes())
                if (table.schema.metadata or {}).get(_ORIGIN) != self._origin.encode():
                    raise ArtifactError(
                        "a shard of an artifact made from other inputs",
                        where=str(path),
                        remedy="remove this file and run its stage again",
                    )
                known[path.name] = ShardInfo(
                    path.name, table.num_rows, _num_tokens(table), sha256_file(path)
                )
        for leftover in (
            self.folder.glob("*.partial") if self._share is None else ()
        ):  # with a share they may be another worker's at work
            leftover.unlink()
        self._set_shards(known.values())

    def _set_shards(self, shards: Iterable[ShardInfo]) -> None:
        ordered = tuple(sorted(shards, key=lambda shard: shard.name))
        self._manifest = dataclasses.replace(
            self._manifest, shards=ordered, rows=sum(shard.rows for shard in ordered)
        )
        # Made here, not when it is asked for: missing() asks for every index, and there may be
        # thousands of shards.
        self._published = frozenset(
            int(shard.name.removeprefix("shard-").removesuffix(".parquet")) for shard in ordered
        )

    @property
    def published(self) -> frozenset[int]:
        """Indices of the shards that are on disk."""
        return self._published

    def missing(self, num_shards: int) -> list[int]:
        """Indices below num_shards that are not on disk and are this writer's to publish."""
        return [
            index
            for index in range(num_shards)
            if index not in self.published and self.is_mine(index)
        ]

    def is_mine(self, index: int) -> bool:
        """Whether a shard is this writer's to publish."""
        return self._share is None or self._share.takes(index)

    @property
    def shard_size(self) -> int:
        """Rows per shard; a shard's index says which rows it holds, so this never changes between
        the first shard and the last.
        """
        size = self._manifest.extra[_SHARD_SIZE]
        assert isinstance(size, int)
        return size

    def publish_shard(self, index: int, table: pa.Table) -> None:
        """Publishes shard ``index`` (exactly once). ArtifactError where the disk is full; nothing
        published before is touched.
        """
        assert index not in self.published, f"shard {index} is already published"
        floats = [
            f"{field.name}.list.element"
            for field in table.schema
            if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
        ]
        others = [name for name in _leaf_paths(table.schema) if name not in floats]
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(
                {**(table.schema.metadata or {}), _ORIGIN: self._origin.encode()}
            ),
            sink,
            row_group_size=max(1, _ROW_GROUP_TOKENS * table.num_rows // max(1, _num_tokens(table))),
            compression="zstd",
            compression_level=9,
            use_dictionary=others,
            use_byte_stream_split=floats,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=True,
        )
        content = sink.getvalue().to_pybytes()
        name = f"shard-{index:05d}.parquet"
        publish_bytes(self.folder / name, content)
        self._set_shards(
            [
                *self._manifest.shards,
                ShardInfo(
                    name, table.num_rows, _num_tokens(table), hashlib.sha256(content).hexdigest()
                ),
            ]
        )

    def finish(self, *, files: Iterable[Path] = (), **extra: Any) -> Manifest:
        """Publishes the manifest that makes the artifact complete; not from a share, of which the
        incomplete manifest is returned.

        files: published files that are no Parquet shards (a checkpoint), by checksum; one outside
        the folder is listed by its whole path.
        """
        if self._share is not None:
            return self._manifest
        listed = [
            ShardInfo(
                str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path),
                0,
                0,
                sha256_file(path),
            )
            for path in sorted(files)
        ]
        manifest = dataclasses.replace(
            self._manifest,
            shards=(*self._manifest.shards, *listed),
            complete=True,
            extra={**self._manifest.extra, **as_json(extra)},
        )
        manifest = dataclasses.replace(manifest, fingerprint=fingerprint(manifest))
        write_manifest(self.folder, manifest)
        return manifest


def _leaf_paths(schema: pa.Schema) -> list[str]:
    return [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
    ]


def _num_tokens(table: pa.Table) -> int:
    if "token_ids" not in table.column_names:
        return 0
    return sum(len(chunk.flatten()) for chunk in table.column("token_ids").chunks)
