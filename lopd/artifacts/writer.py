"""Writing of an artifact, shard by shard.

A second writer with the same inputs continues where the first was killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.artifacts.file_hashes import HASHES
from lopd.artifacts.fingerprints import sha256_file, software_versions
from lopd.artifacts.manifests import (
    MANIFEST,
    ORIGIN_KEY,
    SCHEMA_VERSION,
    as_json,
    fingerprint,
    origin_of,
    read_manifest,
    write_manifest,
)
from lopd.artifacts.publishing import publish_bytes, publish_json, storage_errors
from lopd.artifacts.reader import parse_shard
from lopd.errors import ArtifactError
from lopd.records import Manifest, ModelIdentity, ShardInfo

# The file in an artifact's folder that says how many shards it will have.
EXPECTED = "expected.json"
# The key of a manifest's `extra` that keeps the shard size for a later writer.
_SHARD_SIZE = "shard_size"
# A reader decodes a whole row group to get one response. A row group has about this many tokens.
_ROW_GROUP_TOKENS = 16384


def expected_shards(folder: str | Path) -> int | None:
    """Return how many shards the artifact in a folder will have; None if nothing says so."""
    try:
        count = json.loads((Path(folder) / EXPECTED).read_text(encoding="utf-8"))["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        # The file is a convenience, and older artifacts have none.
        return None
    return count if isinstance(count, int) else None


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a stage that one of ``count`` workers does. Nothing is merged afterwards."""

    index: int
    count: int

    def takes(self, shard: int) -> bool:
        """Return whether this worker publishes the shard."""
        # One shard after the other and not in blocks. Prompts with long responses are then
        # spread over all workers.
        return shard % self.count == self.index


class ArtifactWriter:
    """Publishes one artifact into a folder, shard by shard.

    A second writer with the same inputs continues where the first was killed.

    Args:
        kind: What the artifact is, for example "teacher_cache".
        inputs: Every configuration key that the content depends on, with its value.
        parents: The fingerprint of each parent artifact, by the parent's kind.
        models: The models by their role, for example "teacher".
        sampling: The sampling parameters of the responses.
        lineage: Which teacher made the demonstrations (see lopd/artifacts/lineage.py).
        shard_size: Rows per shard of an artifact that begins here. An artifact that continues keeps
            the size that it began with.
        share: Publish only these shards. Other workers publish the others into the same folder, and
            a writer without a share completes the artifact.

    Raises:
        ArtifactError: The folder holds an artifact, or a shard, that was made from other inputs.
    """

    def __init__(
        self,
        folder: str | Path,
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
        folder = Path(folder)
        self.folder = folder
        self._share = share
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
            # Of the software that completes the artifact. A resumed one may have shards of an older
            # version.
            versions=software_versions(),
            extra={} if shard_size is None else {_SHARD_SIZE: shard_size},
        )
        # Written into each shard, so that a shard of another artifact is never adopted.
        self._origin = origin_of(self._manifest).encode()
        # What is published, by name and by index.
        self._shards: dict[str, ShardInfo] = {}
        self._published: set[int] = set()
        if (folder / MANIFEST).exists():
            self._continue(read_manifest(folder))
        else:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            # The manifest comes before the first shard. A run that is killed in between leaves a
            # folder that says what it was to become.
            write_manifest(folder, self._manifest)
        self._adopt_shards()

    def _continue(self, found: Manifest) -> None:
        """Take over the shards and the shard size of the manifest that is in the folder."""
        ours = self._manifest
        # The inputs from disk have gone through JSON, so ours must too before they are compared.
        expected = (ours.kind, as_json(ours.inputs), as_json(ours.parents))
        if (found.kind, found.inputs, found.parents) != expected:
            raise ArtifactError(
                "this folder holds an artifact that was made from other inputs",
                where=str(self.folder),
                remedy="remove this folder, or set run.dir to another folder",
            )
        extra = dict(ours.extra)
        # The former size stays: with another one the published shards would hold other responses.
        if _SHARD_SIZE in found.extra:
            extra[_SHARD_SIZE] = found.extra[_SHARD_SIZE]
        self._manifest = dataclasses.replace(
            ours, shards=found.shards, rows=found.rows, extra=extra
        )

    def _adopt_shards(self) -> None:
        """Count the shards that a killed writer has renamed into place as published."""
        # Shards are not listed one by one: a shard is published before any manifest lists it,
        # because the manifest is written only when the artifact is complete.
        for shard in self._manifest.shards:
            self._add(shard)
        for path in sorted(self.folder.glob("shard-*.parquet")):
            if path.name in self._shards:
                continue
            table = parse_shard(path, path.read_bytes())
            # Its name alone does not prove that a shard belongs here: it may have been copied.
            if (table.schema.metadata or {}).get(ORIGIN_KEY) != self._origin:
                raise ArtifactError(
                    "this shard belongs to an artifact that was made from other inputs",
                    where=str(path),
                    remedy="remove this file and run the stage that makes it again",
                )
            rows = table.num_rows
            self._add(ShardInfo(path.name, rows, _num_tokens(table), sha256_file(path)))
        # With a share these files may belong to another worker, which is writing them now.
        if self._share is None:
            for leftover in self.folder.glob("*.partial"):
                leftover.unlink()

    def _add(self, shard: ShardInfo) -> None:
        # Shard by shard, without a look at the others: there may be thousands.
        self._shards[shard.name] = shard
        self._published.add(int(shard.name.removeprefix("shard-").removesuffix(".parquet")))

    def _with_shards(self) -> Manifest:
        """Return the manifest with the shards that are published."""
        # By name, which is by index. The fingerprint depends on this order, and workers publish in
        # any.
        ordered = tuple(sorted(self._shards.values(), key=lambda shard: shard.name))
        rows = sum(shard.rows for shard in ordered)
        return dataclasses.replace(self._manifest, shards=ordered, rows=rows)

    @property
    def published(self) -> frozenset[int]:
        """The indices of the shards that are on disk. A loop over indices asks is_published()."""
        return frozenset(self._published)

    def is_published(self, index: int) -> bool:
        """Return whether a shard is on disk."""
        return index in self._published

    def shard_named(self, name: str) -> ShardInfo:
        """Return a shard that is on disk, also if no manifest lists it yet."""
        return self._shards[name]

    def expect(self, num_shards: int) -> None:
        """Set the number of shards that the artifact will have, so that progress can be shown.

        The number decides nothing, so it is in a file of its own and not in the manifest.
        """
        publish_json(self.folder / EXPECTED, {"shards": num_shards})

    def missing(self, num_shards: int) -> list[int]:
        """Return the indices below num_shards that this writer still has to publish."""
        return [
            index
            # In ascending order, so that what a kill leaves is a beginning and a few shards in
            # flight.
            for index in range(num_shards)
            if not self.is_published(index) and self.is_mine(index)
        ]

    def is_mine(self, index: int) -> bool:
        """Return whether a shard is this writer's to publish."""
        return self._share is None or self._share.takes(index)

    @property
    def shard_size(self) -> int:
        """Rows per shard. The index of a shard says which rows it holds, so this never changes."""
        # From the manifest and not from the configuration: shard_size may be changed between two
        # starts, and the shards on disk were cut with the first value.
        size = self._manifest.extra[_SHARD_SIZE]
        assert isinstance(size, int)
        return size

    def publish_shard(self, index: int, table: pa.Table) -> None:
        """Publish shard ``index``. Each shard is published exactly once.

        Raises:
            ArtifactError: The disk is full, read-only or forbidden. Earlier shards are kept.
        """
        # A published shard never changes, because a reader may have it open.
        assert not self.is_published(index), f"shard {index} is already published"
        # The origin goes into the shard itself, because no manifest lists a shard before the
        # artifact is complete.
        metadata = {**(table.schema.metadata or {}), ORIGIN_KEY: self._origin}
        content = _encoded(table.replace_schema_metadata(metadata))
        name = f"shard-{index:05d}.parquet"
        publish_bytes(self.folder / name, content)
        # The checksum is of the bytes in memory. A disk that has stored others is noticed on read:
        # read_shard() hashes what it reads, whatever is remembered.
        checksum = hashlib.sha256(content).hexdigest()
        HASHES.wrote(self.folder / name, checksum)
        self._add(ShardInfo(name, table.num_rows, _num_tokens(table), checksum))

    def finish(self, *, files: Iterable[str | Path] = (), **extra: Any) -> Manifest:
        """Publish the manifest that makes the artifact complete, and return it.

        A writer with a share publishes nothing here and returns the incomplete manifest.

        Args:
            files: Published files that are no Parquet shards, for example a checkpoint. A file
                outside the folder is listed by its whole path.
            extra: Figures of the stage.
        """
        # One worker cannot know whether the others have published their shards.
        if self._share is not None:
            return self._with_shards()
        # Other files have no rows, but a checksum like any shard, so verify() covers them.
        ordered = sorted(map(Path, files))
        listed = [ShardInfo(self._name_of(path), 0, 0, sha256_file(path)) for path in ordered]
        manifest = self._with_shards()
        manifest = dataclasses.replace(
            manifest,
            shards=(*manifest.shards, *listed),
            complete=True,
            extra={**manifest.extra, **as_json(extra)},
        )
        (self.folder / EXPECTED).unlink(missing_ok=True)
        # The fingerprint is of the manifest with all its shards, so it is put in last.
        manifest = dataclasses.replace(manifest, fingerprint=fingerprint(manifest))
        write_manifest(self.folder, manifest)
        return manifest

    def _name_of(self, path: Path) -> str:
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)


def _encoded(table: pa.Table) -> bytes:
    """Return the table as the bytes of a Parquet file."""
    # Log-probabilities and entropies. Every other column holds few different values, or ids.
    floats = [
        f"{field.name}.list.element"
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    # Rows of an average length, in whole numbers so that the file is the same everywhere.
    group_size = max(1, _ROW_GROUP_TOKENS * table.num_rows // max(1, _num_tokens(table)))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=group_size,
        compression="zstd",
        compression_level=9,
        # Log-probabilities hardly repeat, so a dictionary only costs. Their sign and exponent bytes
        # are alike, and become long runs when the bytes of each place are stored together. Only
        # those of a model that is sure of almost every token repeat, and would be smaller plain.
        use_byte_stream_split=floats,
        use_dictionary=[name for name in _leaf_paths(table.schema) if name not in floats],
        # Nobody searches by a range of values, and the statistics would cost bytes.
        write_statistics=False,
        write_page_checksum=True,
        store_schema=True,
    )
    return bytes(sink.getvalue().to_pybytes())


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Return the Parquet path of each column's values."""
    # The options of write_table() name a list column by the path of its elements.
    return [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
    ]


def _num_tokens(table: pa.Table) -> int:
    """Count the response tokens of a table. Artifacts without responses have none."""
    if "token_ids" not in table.column_names:
        return 0
    # flatten() leaves out what lies outside a slice. The attribute `values` would count it.
    return sum(len(chunk.flatten()) for chunk in table.column("token_ids").chunks)
