"""A cache read as it is used in training: any response by its index, in any order, in memory that
does not grow with the cache.

Index: the position among all rows in the order of the shards. A shard's file is hashed once, at its
first read, and trusted afterwards; of what is decoded the newest row groups are kept, up to a
bound. ``rows`` streams everything from the first response to the last.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lopd.artifacts import read_manifest, sha256_file
from lopd.cache.table import scored_rows
from lopd.errors import ArtifactError
from lopd.records import Floats, Manifest, Response, ShardInfo, TeacherScores

Row: TypeAlias = tuple[Response, Floats | None]
ScoredRow: TypeAlias = tuple[Response, TeacherScores | None]
_OPEN_SHARDS = 64


class CacheReader:
    """Rows of an artifact of responses by index. Not for several threads at once; one a process.

    kept_tokens: bound of decoded response tokens that are kept (about 30 bytes each).
    without_sampling: read caches that have no sampling_logprobs, too: they are NaN. leave_out:
    columns that are not read (a top-K and routed experts take many times the room of all the rest).
    ArtifactError: no complete manifest; at a first read, a damaged shard.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kept_tokens: int = 1 << 20,
        without_sampling: bool = False,
        leave_out: Collection[str] = (),
    ) -> None:
        self._without_sampling, self._leave_out = without_sampling, frozenset(leave_out)
        self.folder, self.manifest = folder, _complete(folder)
        self._shards: list[ShardInfo] = [
            shard for shard in self.manifest.shards if shard.name.endswith(".parquet")
        ]
        self._starts = np.cumsum(
            [0, *(shard.rows for shard in self._shards)]
        )  # first index of each shard
        self._kept_tokens = kept_tokens
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # the newest last
        self._verified: set[int] = set()
        self._groups: OrderedDict[tuple[int, int], tuple[pa.Table, int]] = (
            OrderedDict()
        )  # decoded row groups, the newest last
        self._num_kept = 0
        self._lengths: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_tokens(self) -> int:
        """Response tokens, as the manifest counts them."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Prompt and response tokens of every row [len(self)], from one pass over the ids; 4 bytes
        a row are kept.
        """
        if self._lengths is None:
            parts: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
            for shard in range(len(self._shards)):
                file = self._shard(shard).file
                for group in range(file.num_row_groups):
                    ids = file.read_row_group(
                        group, columns=["prompt_ids", "token_ids"], use_threads=False
                    )
                    both = [
                        pc.list_value_length(ids.column(name)).to_numpy()
                        for name in ("prompt_ids", "token_ids")
                    ]
                    parts.append((both[0] + both[1]).astype(np.int32))
            self._lengths = np.concatenate(parts)
        return self._lengths

    @property
    def columns(self) -> frozenset[str]:
        """Of the first shard; none where there is no shard."""
        return frozenset(self._shard(0).file.schema_arrow.names) if self._shards else frozenset()

    def require_unique(self) -> None:
        """ArtifactError: a response occurs twice. One pass over the keys; 8 bytes a row."""
        parts: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for shard in range(len(self._shards)):
            table = self._shard(shard).file.read(
                columns=["prompt_id", "sample_index"], use_threads=False
            )
            named = zip(
                *(table.column(name).to_pylist() for name in ("prompt_id", "sample_index")),
                strict=True,
            )
            parts.append(np.fromiter(map(hash, named), np.int64, table.num_rows))
        every = np.concatenate(parts)
        order = np.argsort(every, kind="stable")
        same = np.flatnonzero(every[order][1:] == every[order][:-1])
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            keys = [row[0].key for row in self.fetch_scored([first, second])]
            if keys[0] == keys[1]:
                where = self._path(int(np.searchsorted(self._starts, second, side="right")) - 1)
                raise ArtifactError(
                    f"response {keys[0]} occurs twice",
                    where=where,
                    remedy="remove one of the shards",
                )

    def __getitem__(self, index: int) -> Row:
        return self.fetch([index])[0]

    def fetch(self, indices: Sequence[int] | NDArray[Any]) -> list[Row]:
        """The rows of these indices, in their order; each row group that is touched is decoded
        once. IndexError: beyond the end.
        """
        return [_plain(row) for row in self.fetch_scored(indices)]

    def fetch_scored(self, indices: Sequence[int] | NDArray[Any]) -> list[ScoredRow]:
        """The same with all that the cache has of the teacher."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < -len(self) or wanted.max() >= len(self)):
            raise IndexError(
                f"index {int(wanted[np.argmax(np.abs(wanted))])} of a cache of {len(self)} responses"
            )
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        found: list[ScoredRow | None] = [None] * len(wanted)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            within = wanted[places] - self._starts[shard]
            starts = self._shard(int(shard)).group_starts
            group_of = np.searchsorted(starts, within, side="right") - 1
            for group in np.unique(group_of):
                members = places[group_of == group]
                table = self._group(int(shard), int(group)).take(
                    pa.array(wanted[members] - self._starts[shard] - starts[group])
                )
                for place, row in zip(members.tolist(), self._rows(table, int(shard)), strict=True):
                    found[place] = row
        return [row for row in found if row is not None]

    def rows(self) -> Iterator[Row]:
        """All rows in order; one row group in memory."""
        yield from map(_plain, self.scored_rows())

    def scored_rows(self) -> Iterator[ScoredRow]:
        """The same with all that the cache has of the teacher."""
        for shard in range(len(self._shards)):
            file = self._shard(shard).file
            for group in range(file.num_row_groups):
                yield from self._rows(self._read(file, group), shard)

    def _read(self, file: pq.ParquetFile, group: int) -> pa.Table:
        names = (
            [name for name in file.schema_arrow.names if name not in self._leave_out]
            if self._leave_out
            else None
        )
        return file.read_row_group(group, columns=names, use_threads=False)

    def _rows(self, table: pa.Table, shard: int) -> Iterator[ScoredRow]:
        return scored_rows(table, where=self._path(shard), without_sampling=self._without_sampling)

    def _path(self, shard: int) -> str:
        return str(self.folder / self._shards[shard].name)

    def _shard(self, index: int) -> _Shard:
        """Opened, and at the first time verified; the oldest is closed where too many are open,
        because footers grow with the cache.
        """
        if index not in self._open:
            self._open[index] = _Shard(
                self.folder / self._shards[index].name,
                None if index in self._verified else self._shards[index].sha256,
            )
            self._verified.add(index)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def _group(self, shard: int, group: int) -> pa.Table:
        """A decoded row group; the oldest ones make room."""
        key = (shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key][0]
        table = self._read(self._shard(shard).file, group).combine_chunks()
        tokens = pc.sum(pc.list_value_length(table.column("token_ids"))).as_py() or 0
        self._groups[key] = (table, tokens)
        self._num_kept += tokens
        while self._num_kept > self._kept_tokens and len(self._groups) > 1:
            _, (_, oldest) = self._groups.popitem(last=False)
            self._num_kept -= oldest
        return table


def _plain(row: ScoredRow) -> Row:
    return row[0], None if row[1] is None else row[1].teacher_logprobs


class _Shard:
    """A verified file: its footer in memory, its pages read when they are asked for."""

    def __init__(self, path: Path, sha256: str | None) -> None:
        """sha256: to compare with; None where that was done before."""
        try:
            digest = sha256 and sha256_file(path)
            if digest != sha256:
                limit = f"sha256 {str(sha256)[:16]}..."
                raise ArtifactError(
                    "the file was truncated or changed: its checksum differs",
                    where=str(path),
                    limit=limit,
                    remedy=_REMEDY,
                )
            self.file = pq.ParquetFile(
                path, memory_map=False, pre_buffer=True
            )  # mapped pages would count as ours, and grow with the cache
        except FileNotFoundError:
            raise ArtifactError("file is missing", where=str(path), remedy=_REMEDY) from None
        rows = [
            self.file.metadata.row_group(group).num_rows
            for group in range(self.file.num_row_groups)
        ]
        self.group_starts = np.array([0, *itertools.accumulate(rows)][:-1], dtype=np.int64)


_REMEDY = "run the stage that made it again; it makes this shard and keeps the others"


def _complete(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise ArtifactError("is not complete", where=str(folder), remedy="run its stage to the end")
    return manifest
