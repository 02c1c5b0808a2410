"""A cache as training reads it: any response by its index, in bounded memory.

The index of a response is its position among all rows, in the order of the shards. The memory does
not grow with the cache, but for a few bytes per shard and per response.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lopd.artifacts import read_complete, sha256_file
from lopd.cache.columns import ROUTED, flat
from lopd.cache.table import scored_rows
from lopd.errors import ArtifactError, DataError
from lopd.records import Floats, Response, ShardInfo, TeacherScores

Row: TypeAlias = tuple[Response, Floats | None]
ScoredRow: TypeAlias = tuple[Response, TeacherScores | None]
# How many shards are open at a time. Each takes a file descriptor and the memory of its footer.
_OPEN_SHARDS = 64
# The columns of the key and of the token ids, which every artifact of responses has.
_KEY = ("prompt_id", "sample_index")
_IDS = ("prompt_ids", "token_ids")
_REMEDY = "run the stage that made the cache again: it makes this shard and keeps the other shards"


class CacheReader:
    """A reader that returns rows of an artifact of responses by index.

    Only one thread may use it at a time.

    A shard's file is hashed once, at its first read. Each later read trusts it.

    Args:
        kept_tokens: How many decoded response tokens are kept for later reads, at about 30 bytes
            each.
        without_sampling: Whether a cache without sampling_logprobs may be read. The values are then
            NaN.
        leave_out: Columns that are not read. A top-K and routed experts take many times the memory
            of all other columns.

    Raises:
        ArtifactError: The artifact is not complete. A read raises it for a damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kept_tokens: int = 1 << 20,
        without_sampling: bool = False,
        leave_out: Collection[str] = (),
    ) -> None:
        folder = Path(folder)
        self.folder = folder
        self.manifest = read_complete(folder)
        self._without_sampling = without_sampling
        self._leave_out = frozenset(leave_out)
        self._shards: list[ShardInfo] = [
            shard for shard in self.manifest.shards if shard.name.endswith(".parquet")
        ]
        # The index of the first row of each shard, and the number of all rows as the last entry.
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        # The two dictionaries below have what was used last at their end.
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        # Verified once per process: hashing again at each opening would read the whole file each
        # time.
        self._verified: set[int] = set()
        # Decoded row groups by (shard, group), each with its number of tokens.
        self._groups: OrderedDict[tuple[int, int], tuple[pa.Table, int]] = OrderedDict()
        self._kept_tokens = kept_tokens
        self._num_kept = 0
        self._lengths: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_tokens(self) -> int:
        """The number of response tokens, from the manifest."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Prompt and response tokens of every row [rows].

        The first use reads the ids of the whole cache once. The result takes 4 bytes per row.
        """
        # Packing needs all lengths before the first step, and most commands never need them.
        if self._lengths is None:
            # numpy cannot concatenate an empty list, which an empty cache would give.
            parts: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
            for shard in range(len(self._shards)):
                file = self._shard(shard).file
                for group in range(file.num_row_groups):
                    # The ids of one row group are in memory at a time.
                    ids = file.read_row_group(group, columns=[*_IDS], use_threads=False)
                    parts.append(_row_lengths(ids))
            self._lengths = np.concatenate(parts)
        return self._lengths

    @property
    def columns(self) -> frozenset[str]:
        """The columns of the cache. A cache without shards has none."""
        # All shards of an artifact have the columns of its first one.
        return frozenset(self._shard(0).file.schema_arrow.names) if self._shards else frozenset()

    @property
    def routed_shape(self) -> tuple[int, int]:
        """The layers and the experts per token of the column of routed experts; 0, 0 without one.

        The rows are routed to experts of one model, so the first shard says it for all.
        """
        metadata = self._shard(0).file.schema_arrow.metadata or {} if self._shards else {}
        shape = json.loads(metadata.get(ROUTED, b'{"layers": 0, "k": 0}'))
        return int(shape["layers"]), int(shape["k"])

    def prompts_of_rows(self) -> list[str]:
        """Return the prompt_id of every row, in one pass over this column."""
        names: list[str] = []
        for shard in range(len(self._shards)):
            # One column of names: the token ids of a whole cache would not fit into memory.
            table = self._shard(shard).file.read(columns=["prompt_id"], use_threads=False)
            names += table.column("prompt_id").to_pylist()
        return names

    def require_unique(self) -> None:
        """Check that no response occurs twice, in one pass over the keys.

        Raises:
            ArtifactError: A response occurs twice.
        """
        # A set of the keys would take some hundred bytes per row. Their hashes take 8.
        parts: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for shard in range(len(self._shards)):
            table = self._shard(shard).file.read(columns=[*_KEY], use_threads=False)
            keys_of_rows = zip(*(table.column(name).to_pylist() for name in _KEY), strict=True)
            parts.append(np.fromiter(map(hash, keys_of_rows), np.int64, table.num_rows))
        hashes = np.concatenate(parts)
        # Sorted, equal hashes are neighbours. The sort is stable, so the later row is the second.
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            # Two different keys may have one hash, so the keys themselves decide.
            # This reads two rows, and only if two hashes are equal.
            keys = [row[0].key for row in self.fetch_scored([first, second])]
            if keys[0] == keys[1]:
                where = self._path(int(np.searchsorted(self._starts, second, side="right")) - 1)
                raise ArtifactError(
                    f"response {keys[0]} occurs twice",
                    where=where,
                    remedy="remove one of the two shards and run the stage that makes it again",
                )

    def require_ids_below(self, limit: int, owner: str) -> None:
        """Check that a model has a row for every token id, in one pass over prompts and responses.

        The pass sees the lengths of all rows as well, so that ``lengths`` needs none of its own.

        Args:
            limit: The rows of the model.
            owner: The model, for the message.

        Raises:
            DataError: A token id is negative or not below the limit.
        """
        parts: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        for shard in range(len(self._shards)):
            file = self._shard(shard).file
            for group in range(file.num_row_groups):
                # The ids of one row group are in memory at a time.
                table = file.read_row_group(group, columns=[*_KEY, *_IDS], use_threads=False)
                for name in _IDS:
                    self._require_ids_below(table, name, limit, owner, shard)
                parts.append(_row_lengths(table))
        self._lengths = np.concatenate(parts)

    def _require_ids_below(
        self, table: pa.Table, name: str, limit: int, owner: str, shard: int
    ) -> None:
        ids, rows = flat(table, name)
        # An id without a row would fail deep inside of the model.
        wrong = np.flatnonzero((ids < 0) | (ids >= limit))
        if wrong.size:
            key = tuple(table[column][int(rows[wrong[0]])].as_py() for column in _KEY)
            raise DataError(
                f"response {key} has token {int(ids[wrong[0]])} in {name}, for which {owner} "
                "has no row",
                where=self._path(shard),
                limit=f"at least 0 and at most {limit - 1}: {owner} has {limit} rows",
                remedy="remove this response, or give a model that has such a row",
            )

    def __getitem__(self, index: int) -> Row:
        return self.fetch([index])[0]

    def fetch(self, indices: Sequence[int] | NDArray[Any]) -> list[Row]:
        """Return the rows of these indices, in their order. Negative ones count from the end.

        Raises:
            IndexError: An index is beyond the end.
        """
        return [_plain(row) for row in self.fetch_scored(indices)]

    def fetch_scored(self, indices: Sequence[int] | NDArray[Any]) -> list[ScoredRow]:
        """Return the same rows as fetch(), with all that the cache has of the teacher."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < -len(self) or wanted.max() >= len(self)):
            worst = int(wanted[np.argmax(np.abs(wanted))])
            raise IndexError(f"index {worst} is out of range: the cache has {len(self)} responses")
        # A negative index counts from the end, as in a list.
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        found: list[ScoredRow | None] = [None] * len(wanted)
        # "right": an index that equals the start of a shard belongs to that shard, also after an
        # empty one.
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        # All rows of one row group are taken together. In the order that was asked for, a row group
        # could be decoded and dropped again for each of its rows.
        for shard in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == shard)
            within = wanted[places] - self._starts[shard]
            starts = self._shard(shard).group_starts
            group_of = np.searchsorted(starts, within, side="right") - 1
            for group in np.unique(group_of).tolist():
                # Positions in `wanted`, and the row numbers within the row group.
                members = places[group_of == group]
                numbers = within[group_of == group] - starts[group]
                table = self._group(shard, group).take(pa.array(numbers))
                for place, row in zip(members.tolist(), self._rows(table, shard), strict=True):
                    found[place] = row
        # Every place is filled by now. The condition is for the type checker.
        return [row for row in found if row is not None]

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order, with one row group in memory."""
        yield from map(_plain, self.scored_rows())

    def scored_rows(self) -> Iterator[ScoredRow]:
        """Yield the same rows as rows(), with all that the cache has of the teacher."""
        for shard in range(len(self._shards)):
            file = self._shard(shard).file
            for group in range(file.num_row_groups):
                # Not through _group(): a single pass would push out what was kept for random reads.
                yield from self._rows(self._read(file, group), shard)

    def _read(self, file: pq.ParquetFile, group: int) -> pa.Table:
        names = [name for name in file.schema_arrow.names if name not in self._leave_out]
        return file.read_row_group(group, columns=names, use_threads=False)

    def _rows(self, table: pa.Table, shard: int) -> Iterator[ScoredRow]:
        return scored_rows(table, where=self._path(shard), without_sampling=self._without_sampling)

    def _path(self, shard: int) -> str:
        return str(self.folder / self._shards[shard].name)

    def _shard(self, index: int) -> _Shard:
        """Return an open shard. It is verified when it is opened for the first time."""
        if index not in self._open:
            info = self._shards[index]
            sha256 = None if index in self._verified else info.sha256
            self._open[index] = _Shard(self.folder / info.name, sha256)
            self._verified.add(index)
            # The one that was not used for the longest time is closed.
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        # What was used last moves to the end, so the first entry is the one to close.
        self._open.move_to_end(index)
        return self._open[index]

    def _group(self, shard: int, group: int) -> pa.Table:
        """Return a decoded row group, and drop the oldest ones if there are too many tokens."""
        # A training in a random order comes back to a row group for its other rows.
        key = (shard, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key][0]
        table = self._read(self._shard(shard).file, group).combine_chunks()
        # The bound is in tokens and not in row groups, because row groups of other writers may be
        # of any size.
        tokens = pc.sum(pc.list_value_length(table.column("token_ids"))).as_py() or 0
        self._groups[key] = (table, tokens)
        self._num_kept += tokens
        # The newest one stays even if it is above the bound alone: it is about to be used.
        while self._num_kept > self._kept_tokens and len(self._groups) > 1:
            # The first entry was not used for the longest time.
            _, (_, oldest) = self._groups.popitem(last=False)
            self._num_kept -= oldest
        return table


def _row_lengths(table: pa.Table) -> NDArray[np.int32]:
    """Return prompt and response tokens of each row of a table."""
    lengths = [pc.list_value_length(table.column(name)).to_numpy() for name in _IDS]
    total: NDArray[np.int32] = np.sum(lengths, axis=0).astype(np.int32)
    return total


def _plain(row: ScoredRow) -> Row:
    return row[0], None if row[1] is None else row[1].teacher_logprobs


class _Shard:
    """A verified file. Its footer is in memory, and its pages are read when they are needed.

    Args:
        sha256: The expected checksum. None means that the file was verified before.

    Raises:
        ArtifactError: The file is missing or changed.
    """

    def __init__(self, path: Path, sha256: str | None) -> None:
        try:
            digest = sha256 and sha256_file(path)
            # Both are None if the file was verified before.
            if digest != sha256:
                limit = f"exactly the recorded sha256, {str(sha256)[:16]}..."
                raise ArtifactError(
                    "the file was truncated or changed: its checksum differs",
                    where=str(path),
                    limit=limit,
                    remedy=_REMEDY,
                )
            # Mapped pages would count as memory of this process and grow with the cache.
            self.file = pq.ParquetFile(path, memory_map=False, pre_buffer=True)
        except FileNotFoundError:
            raise ArtifactError("the file is missing", where=str(path), remedy=_REMEDY) from None
        metadata = self.file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        # The number of the first row of each row group within the shard.
        self.group_starts = np.array([0, *itertools.accumulate(rows)][:-1], dtype=np.int64)
