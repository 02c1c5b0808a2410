"""Results of requests in flight, collected until a shard has all of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from lopd.artifacts import ArtifactWriter
from lopd.records import Key
from lopd.report.console import print_line

T = TypeVar("T")


def tell_resumed(writer: ArtifactWriter, title: str, num_shards: int) -> None:
    """Print at which shard an artifact continues, if a part of it is published."""
    missing = writer.missing(num_shards)
    # A part of an artifact also sees the shards of the other parts, so only its own are counted.
    published = sum(writer.is_published(index) for index in range(num_shards))
    if published == 0 or not missing:
        return
    log = writer.folder / "log.txt"
    print_line(
        f"{title}: continues at shard {missing[0] + 1} of {num_shards} "
        f"({published} of them are published)",
        # The parts of an evaluation have no log of their own.
        log if log.exists() else None,
    )


class OpenShards(Generic[T]):
    """The shards whose requests have begun and which are not complete yet."""

    # Only these shards are in memory. A kill loses their results and no others.

    def __init__(self) -> None:
        # The keys of each open shard, in the order in which it is published.
        self._keys: dict[int, Sequence[Key]] = {}
        # What has come for each open shard, in any order.
        self._results: dict[int, dict[Key, T]] = {}
        # Which shard a request belongs to, as long as it has no result.
        self._shard_of: dict[Key, int] = {}

    def begin(self, index: int, keys: Sequence[Key]) -> None:
        """Expect results for these keys. They become the rows of shard ``index``, in this order."""
        self._keys[index] = keys
        self._results[index] = {}
        self._shard_of.update(dict.fromkeys(keys, index))

    def add(self, key: Key, result: T) -> tuple[int, list[T]] | None:
        """Keep a result until all results of its shard are there.

        Returns:
            The index of the shard and all of its results in the order of its keys, if this result
            completes its shard. Otherwise None.
        """
        index = self._shard_of.pop(key)
        results = self._results[index]
        results[key] = result
        if len(results) < len(self._keys[index]):
            return None
        # The file must not depend on which result came first, so the order is that of the keys.
        ordered = [results[one] for one in self._keys.pop(index)]
        del self._results[index]
        return index, ordered
