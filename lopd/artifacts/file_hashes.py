"""Remembered sha256 of files, so that a file of 60 GB is read once and not at every command.

A hash is kept under what the file system says of the file: resolved path, size, time of the last
change of its content (mtime_ns) and of its entry (ctime_ns), and inode. Where any of them differs,
the file is read again. So a changed file is noticed, and a copied folder is read once more.

What this cannot notice is a disk that returns other bytes than were written. ``run.rehash`` reads
every file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A file that was changed less than this many nanoseconds before it was read is not remembered. A
# second change within one tick of the file system's clock would leave mtime and ctime as they are.
# Two seconds is the coarsest tick in use (FAT; most file systems have milliseconds).
_TICK_NS = 2 * 10**9
_MAX_THREADS = 16


class FileHashes:
    """Hashes of files, kept in memory and, where it has a store, in a JSON file.

    It may be used by several threads. Several processes may share a store: each adds what it has
    found, and an entry that another process overwrote costs one more reading.
    """

    def __init__(self, store: str | Path | None = None, *, rehash: bool = False) -> None:
        """Read the store.

        Args:
            store: The JSON file. Without it hashes are kept in memory alone.
            rehash: Forget what the store has, so that every file is read once.
        """
        store = Path(store) if store is not None else None
        self._store = store
        self._lock = threading.Lock()
        self._changed = False
        self._known: dict[str, str] = {}
        if store is not None and not rehash:
            self._known = _read_store(store)

    def sha256(self, path: str | Path) -> str:
        """Return the sha256 of a file in hexadecimal digits.

        Raises:
            OSError: The file cannot be read.
        """
        path = Path(path)
        # The state before the reading: a change during the reading then differs from what is kept.
        key, changed_ns = _state(path)
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            return known
        began_ns = time.time_ns()
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if began_ns - changed_ns > _TICK_NS:
            with self._lock:
                self._known[key] = digest
                self._changed = True
        return digest

    def sha256_all(
        self, paths: Sequence[str | Path], *, read: Callable[[int], None] | None = None
    ) -> list[str]:
        """Return the sha256 of each file, in the order given. Files are read side by side.

        Args:
            paths: The files.
            read: Called with the number of bytes of a file once it is done.

        Raises:
            OSError: A file cannot be read.
        """

        def one(path: Path) -> str:
            digest = self.sha256(path)
            if read is not None:
                read(path.stat().st_size)
            return digest

        # hashlib releases the interpreter's lock, so threads hash on all cores.
        threads = min(_MAX_THREADS, os.cpu_count() or 1, max(1, len(paths)))
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, map(Path, paths)))

    def unknown_bytes(self, paths: Iterable[str | Path]) -> int:
        """Return how many bytes sha256_all would read: those of the files that are not known."""
        total = 0
        for path in map(Path, paths):
            key, _ = _state(path)
            if key not in self._known:
                total += path.stat().st_size
        return total

    def save(self) -> None:
        """Write the store, where there is one and something was found. A failure is no error."""
        if self._store is None or not self._changed:
            return
        with contextlib.suppress(OSError, ValueError):
            # What another process has found in the meantime.
            others = _read_store(self._store)
            # Entries of files that are gone, or have changed, would pile up for ever.
            entries = {
                key: value for key, value in {**others, **self._known}.items() if _is_current(key)
            }
            partial = self._store.with_name(f"{self._store.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(entries, indent=0, sort_keys=True), encoding="utf-8")
            partial.replace(self._store)
            self._changed = False


_current = FileHashes()


def current_hashes() -> FileHashes:
    """Return the hashes that this process uses now."""
    return _current


@contextlib.contextmanager
def remembered_hashes(store: str | Path, *, rehash: bool = False) -> Iterator[FileHashes]:
    """Use a store for as long as the block lasts, and write it at the end.

    Args:
        store: The JSON file.
        rehash: Read every file again, whatever the store says.
    """
    store = Path(store)
    global _current
    before = _current
    _current = FileHashes(store, rehash=rehash)
    try:
        yield _current
    finally:
        _current.save()
        _current = before


def _read_store(store: Path) -> dict[str, str]:
    try:
        stored = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # The store saves time and proves nothing, so one that cannot be read is as good as none.
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: value for key, value in stored.items() if _is_sha256(value)}


def _state(path: Path) -> tuple[str, int]:
    """Return what identifies a file's content, and when it was last changed in nanoseconds."""
    resolved = path.resolve()
    found = resolved.stat()
    key = f"{resolved}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"
    return key, max(found.st_mtime_ns, found.st_ctime_ns)


def _is_current(key: str) -> bool:
    try:
        return _state(Path(key.rsplit("|", 4)[0]))[0] == key
    except OSError:
        return False


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64
