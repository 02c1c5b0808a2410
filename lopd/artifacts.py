"""Artifacts: a folder of atomically published Parquet shards (or model files) and a manifest that says from what they were made, and by whom.

Publishing is write, fsync, rename; what was renamed is complete, so a stage that was killed goes on at the first shard that is missing. Shard ``i`` always
holds the same keys, so a resumed artifact is file for file the one of a run never killed. Every shard's sha256 stands in the manifest and is checked on read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lopd.errors import ArtifactError
from lopd.records import Manifest, ModelIdentity, ShardInfo

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
EXPORT_MARK = "lopd.json"  # in an exported checkpoint: how it was made
_VERSIONED = ("lopd", "sglang", "megatron-core", "torch", "transformers", "pyarrow")
_SHARD_SIZE = "shard_size"  # in a manifest's extra
_ROW_GROUP_TOKENS = 16384  # about: a row group is what a reader by index decodes to get one response
_ORIGIN = b"lopd.origin"  # in a shard's metadata: hash of what its artifact is made from, so that no shard is taken for another artifact's
_STORAGE_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "read-only file system",
    errno.EFBIG: "file too large",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.EEXIST: "a file is in the way of a folder",
    errno.EISDIR: "a folder is in the way of a file",
    errno.ENAMETOOLONG: "the path is too long",
}


# ---- publishing -----------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into one clear line about ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in _STORAGE_ERRORS:
            reason = _STORAGE_ERRORS.get(error.errno or 0, "permission denied")
            remedy = "free space or permit writing, then run the same command again: what is published stays and is not repeated"
            raise ArtifactError(f"cannot publish: {reason}", where=str(error.filename or path), remedy=remedy) from error
        raise


def publish_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write, fsync, rename: after a crash the file is there whole or not at all. private: for its owner alone. ArtifactError where the disk is full."""
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")  # workers of one stage may publish the same manifest at the same time
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb", opener=_open_private if private else None) as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def publish_json(path: Path, value: Any, *, private: bool = False) -> None:
    publish_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(), private=private)


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- fingerprints ---------------------------------------------------------------------------------------------------------------------------------


def sha256_json(value: Any) -> str:
    """Fingerprint of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def identify_model(folder: Path) -> ModelIdentity:
    """A Hugging Face folder by content: weights (config.json and every safetensors file), tokenizer, chat template.

    ArtifactError: config.json is missing, or it or tokenizer_config.json is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError("no config.json", where=str(folder), remedy="give the folder of a Hugging Face checkpoint")
    template, tokenizer, tokenizer_config = (folder / name for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"))
    about = _read_table(tokenizer_config) if tokenizer_config.is_file() else {}
    template_bytes = template.read_bytes() if template.is_file() else json.dumps(about.get("chat_template")).encode()
    config = _read_table(folder / "config.json")
    for volatile in ("transformers_version", "_name_or_path"):  # who wrote the file, not what the model is
        config.pop(volatile, None)
    weights = [sha256_json(config)] + [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return ModelIdentity(
        path=str(folder),
        weights=sha256_json(weights),
        tokenizer=sha256_file(tokenizer) if tokenizer.is_file() else "",
        template=hashlib.sha256(template_bytes).hexdigest(),
    )


def _read_table(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot be read ({error})", where=str(path), remedy="copy it again from where it came") from None
    if not isinstance(table, dict):
        raise ArtifactError("not a JSON object", where=str(path), remedy="copy it again from where it came")
    return table


def software_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


# ---- manifests ------------------------------------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    publish_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact. ArtifactError: missing, not JSON, of a newer schema, or with unknown fields."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError("no manifest.json", where=str(folder), remedy="run the stage that makes it") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"manifest cannot be read ({error})", where=str(path), remedy="remove the stage's folder and run the stage again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"manifest of schema version {version}", where=str(path), limit=f"this lopd reads up to {SCHEMA_VERSION}", remedy="use a newer lopd"
        )
    try:
        raw["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
        raw["models"] = {role: ModelIdentity(**identity) for role, identity in raw["models"].items()}
        return Manifest(**raw)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"manifest has wrong fields ({error})", where=str(path), remedy="remove the stage's folder and run the stage again") from None


def fingerprint(manifest: Manifest) -> str:
    """Names an artifact by what it was made from and by its content."""
    shards = [(shard.name, shard.sha256) for shard in manifest.shards]
    return sha256_json([manifest.kind, manifest.schema_version, manifest.inputs, manifest.parents, shards])


def origin_of(manifest: Manifest) -> str:
    """Names what an artifact is made from, before there is any content: it stands in every shard's metadata as ``lopd.origin``."""
    return sha256_json([manifest.kind, _as_json(manifest.inputs), _as_json(manifest.parents)])


# ---- writing --------------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of ``count`` workers of a stage does: the shards i with i mod count = index. Nothing is merged afterwards: the shards are the artifact."""

    index: int
    count: int

    def takes(self, shard: int) -> bool:
        return shard % self.count == self.index


class ArtifactWriter:
    """Publishes one artifact into ``folder``, shard by shard; a second writer with the same inputs goes on where the first was killed."""

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
        """shard_size: rows per shard, for one that is begun here; one that goes on keeps the size it was begun with. share: only these shards are to be
        published; other writers work in the same folder, and one without a share completes it.

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
            if (found.kind, found.inputs, found.parents) != (kind, _as_json(inputs), _as_json(parents or {})):
                raise ArtifactError("holds an artifact made from other inputs", where=str(folder), remedy="remove it or use another run directory")
            begun = {_SHARD_SIZE: found.extra[_SHARD_SIZE]} if _SHARD_SIZE in found.extra else {}
            self._manifest = dataclasses.replace(self._manifest, shards=found.shards, rows=found.rows, extra={**self._manifest.extra, **begun})
        else:
            with storage_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_manifest(folder, self._manifest)
        self._adopt_shards()

    def _adopt_shards(self) -> None:
        """Shards renamed into place by a writer that was killed before it finished count as published."""
        known = {shard.name: shard for shard in self._manifest.shards}
        for path in sorted(self.folder.glob("shard-*.parquet")):
            if path.name not in known:
                table = _parse(path, path.read_bytes())
                if (table.schema.metadata or {}).get(_ORIGIN) != self._origin.encode():
                    raise ArtifactError("a shard of an artifact made from other inputs", where=str(path), remedy="remove this file and run its stage again")
                known[path.name] = ShardInfo(path.name, table.num_rows, _num_tokens(table), sha256_file(path))
        for leftover in self.folder.glob("*.partial") if self._share is None else ():  # with a share they may be another worker's at work
            leftover.unlink()
        self._set_shards(known.values())

    def _set_shards(self, shards: Iterable[ShardInfo]) -> None:
        ordered = tuple(sorted(shards, key=lambda shard: shard.name))
        self._manifest = dataclasses.replace(self._manifest, shards=ordered, rows=sum(shard.rows for shard in ordered))
        # Made here, not when it is asked for: missing() asks for every index, and there may be thousands of shards.
        self._published = frozenset(int(shard.name.removeprefix("shard-").removesuffix(".parquet")) for shard in ordered)

    @property
    def published(self) -> frozenset[int]:
        """Indices of the shards that are on disk."""
        return self._published

    def missing(self, num_shards: int) -> list[int]:
        """Indices below num_shards that are not on disk and are this writer's to publish."""
        return [index for index in range(num_shards) if index not in self.published and self.is_mine(index)]

    def is_mine(self, index: int) -> bool:
        """Whether a shard is this writer's to publish."""
        return self._share is None or self._share.takes(index)

    @property
    def shard_size(self) -> int:
        """Rows per shard; a shard's index says which rows it holds, so this never changes between the first shard and the last."""
        size = self._manifest.extra[_SHARD_SIZE]
        assert isinstance(size, int)
        return size

    def publish_shard(self, index: int, table: pa.Table) -> None:
        """Publishes shard ``index`` (exactly once). ArtifactError where the disk is full; nothing published before is touched."""
        assert index not in self.published, f"shard {index} is already published"
        floats = [f"{field.name}.list.element" for field in table.schema if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)]
        others = [name for name in _leaf_paths(table.schema) if name not in floats]
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({**(table.schema.metadata or {}), _ORIGIN: self._origin.encode()}),
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
        self._set_shards([*self._manifest.shards, ShardInfo(name, table.num_rows, _num_tokens(table), hashlib.sha256(content).hexdigest())])

    def finish(self, *, files: Iterable[Path] = (), **extra: Any) -> Manifest:
        """Publishes the manifest that makes the artifact complete; not from a share, of which the incomplete manifest is returned.

        files: published files that are no Parquet shards (a checkpoint), by checksum; one outside the folder is listed by its whole path.
        """
        if self._share is not None:
            return self._manifest
        listed = [
            ShardInfo(str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path), 0, 0, sha256_file(path)) for path in sorted(files)
        ]
        manifest = dataclasses.replace(
            self._manifest, shards=(*self._manifest.shards, *listed), complete=True, extra={**self._manifest.extra, **_as_json(extra)}
        )
        manifest = dataclasses.replace(manifest, fingerprint=fingerprint(manifest))
        write_manifest(self.folder, manifest)
        return manifest


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def published_rows(folder: Path) -> int:
    """Rows in the shards that are on disk, listed in a manifest or not yet. Reads only their footers. ArtifactError: one is damaged."""
    rows = 0
    for path in folder.glob("shard-*.parquet"):
        try:
            rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
    return rows


def _leaf_paths(schema: pa.Schema) -> list[str]:
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


def _num_tokens(table: pa.Table) -> int:
    if "token_ids" not in table.column_names:
        return 0
    return sum(len(chunk.flatten()) for chunk in table.column("token_ids").chunks)


# ---- reading --------------------------------------------------------------------------------------------------------------------------------------


def _parse(path: Path, content: bytes) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"damaged shard ({str(error).splitlines()[0]})", where=str(path), remedy="remove this file and run its stage again")


def read_shard(folder: Path, shard: ShardInfo) -> pa.Table:
    """One shard's rows. ArtifactError: missing, or its checksum is not the manifest's."""
    path = folder / shard.name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError("file is missing", where=str(path), remedy=_remake(folder, shard)) from None
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ArtifactError(f"{_CHANGED} ({len(content)} bytes)", where=str(path), limit=f"sha256 {shard.sha256[:16]}...", remedy=_remake(folder, shard))
    return _parse(path, content)


def verify(folder: Path, manifest: Manifest) -> None:
    """Checks that every file of a complete artifact is there with its checksum. ArtifactError names the first that is not."""
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ArtifactError("file is missing", where=str(path), remedy=_remake(folder, shard))
        if sha256_file(path) != shard.sha256:
            raise ArtifactError(_CHANGED, where=str(path), limit=f"sha256 {shard.sha256[:16]}...", remedy=_remake(folder, shard))


_CHANGED = "the file was truncated or changed: its checksum differs"


def _remake(folder: Path, shard: ShardInfo) -> str:
    """How to have a damaged file made again with the least work."""
    if shard.name.endswith(".parquet"):
        return f"remove this file and {folder / MANIFEST}, then run stage {folder.name} again: it makes this shard and keeps the others"
    return f"remove the folder {folder}, then run stage {folder.name} again"


def check_replaceable(folder: Path, mark: str) -> None:
    """ArtifactError unless the folder is absent, empty, or holds the file ``mark`` that only we write: nothing foreign is ever removed."""
    if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
        what = f"holds files that are not ours (no {mark}) and would be replaced"
        raise ArtifactError(what, where=str(folder), limit="a new or empty folder, or a former export", remedy="give another export.dir")


def remove_folder(folder: Path) -> None:
    """Removes a folder by renaming it first, so that a kill in between leaves nothing half removed under its name."""
    doomed = folder.with_name(folder.name + ".removing")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
