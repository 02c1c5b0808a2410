"""Remembered sha256 of files, so that a file of 60 GB is read once and not at every command.

A hash is kept under what the file system says of the file: resolved path, size, time of the last
change of its content (mtime_ns) and of its entry (ctime_ns), and inode. Where any of them differs,
the file is read again. So a changed file is noticed, and a copied folder is read once more.

What this cannot notice is a disk that returns other bytes than were written. The knob
``run.rehash`` has every file read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeAlias

# A file that was changed less than this many nanoseconds before it was read is not remembered. A
# second change within one tick of the file system's clock would leave mtime and ctime as they are.
# Two seconds is the coarsest tick in use (FAT; most file systems have milliseconds).
_TICK_NS = 2 * 10**9
_MAX_THREADS = 16
# Files with fewer bytes to read together take a second or two, and a bar would only be noise.
SHOWN_BYTES = 2 * 2**30
# How many bytes of a file are read between two moves of a bar.
_TOLD_BYTES = 64 * 2**20
# Shows a bar for this number of bytes, and yields what is called with the bytes that were read.
ShowReading: TypeAlias = Callable[[int], AbstractContextManager[Callable[[int], None]]]
# The store, in a run directory.
STORE = "hashes.json"


class _Counted:
    """A file that says how many bytes have been read from it."""

    def __init__(self, handle: BinaryIO, read: Callable[[int], None]) -> None:
        self.name = handle.name
        self._handle = handle
        self._read = read
        self._num_new = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = int(self._handle.readinto(buffer))  # type: ignore[attr-defined]
        self._num_new += count
        # Not for each block of 256 KiB: many files are read side by side under one bar.
        if self._num_new >= _TOLD_BYTES or count == 0:
            self._read(self._num_new)
            self._num_new = 0
        return count


class FileHashes:
    """Hashes of files that this process has read, and those that a store remembers.

    Several threads may use it. Several processes may share a store: each adds what it has found,
    and an entry that another process has overwritten costs one more reading.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        # Whether there is something that the store does not have.
        self._is_new = False
        self._show: ShowReading | None = None

    def show_with(self, show: ShowReading) -> None:
        """Have a bar shown where many bytes are to be read. This package knows no screen."""
        self._show = show

    def load(self, store: str | Path) -> None:
        """Take over what a store has. A store that is missing or damaged has nothing."""
        stored = _read_store(Path(store))
        with self._lock:
            # What this process has read itself is at least as new.
            self._known = stored | self._known

    def forget(self) -> None:
        """Forget everything, so that every file is read again."""
        with self._lock:
            self._known = {}
            self._is_new = False

    def sha256(self, path: str | Path, *, read: Callable[[int], None] | None = None) -> str:
        """Return the sha256 of a file in hexadecimal digits.

        Args:
            path: The file.
            read: A function that is called with the number of bytes that have been read since the
                last call. A file whose hash is known is not read.

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
            # A bar moves while the file is read, and not only when it has been read.
            counted = handle if read is None else _Counted(handle, read)
            digest = hashlib.file_digest(counted, "sha256").hexdigest()  # type: ignore[arg-type]
        # A file that was changed a moment ago may change again within the same tick of its clock,
        # unseen.
        if began_ns - changed_ns > _TICK_NS:
            with self._lock:
                self._known[key] = digest
                self._is_new = True
        return digest

    def wrote(self, path: str | Path, digest: str) -> None:
        """Remember the hash of a file that this process has just written.

        Here a young file is remembered: its bytes were hashed in memory, and its state is taken
        right after the rename.
        """
        key, _ = _state(Path(path))
        with self._lock:
            self._known[key] = digest
            self._is_new = True

    def sha256_all(
        self, paths: Sequence[str | Path], *, read: Callable[[int], None] | None = None
    ) -> list[str]:
        """Return the sha256 of each file, in the order given. Files are read side by side.

        Args:
            paths: The files.
            read: See sha256. Without it a bar is shown if the files are large.

        Raises:
            OSError: A file cannot be read.
        """
        if read is None and self._show is not None:
            num_bytes = self.unknown_bytes(paths)
            if num_bytes >= SHOWN_BYTES:
                with self._show(num_bytes) as advance:
                    return self.sha256_all(paths, read=advance)

        def one(path: Path) -> str:
            return self.sha256(path, read=read)

        # hashlib releases the interpreter's lock, so threads hash on all cores.
        threads = min(_MAX_THREADS, os.cpu_count() or 1, max(1, len(paths)))
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, map(Path, paths)))

    def unknown_bytes(self, paths: Iterable[str | Path]) -> int:
        """Return the total size in bytes of those files whose hash is not stored yet."""
        total = 0
        for path in map(Path, paths):
            key, _ = _state(path)
            if key not in self._known:
                # In bytes and not in files: one file of a large model takes as long as all others
                # together.
                total += path.stat().st_size
        return total

    def save(self, store: str | Path) -> None:
        """Write what is known into a store. A failure is no error: it only costs time later."""
        if not self._is_new:
            return
        store = Path(store)
        # What another process has found in the meantime.
        others = _read_store(store)
        # Entries of files that are gone, or have changed, would pile up for ever.
        entries = {
            key: value for key, value in {**others, **self._known}.items() if _is_current(key)
        }
        partial = store.with_name(f"{store.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(entries, indent=0, sort_keys=True), encoding="utf-8")
            partial.replace(store)
            self._is_new = False
        except OSError:
            # A full disk, or a run directory that is gone. The half-written file must not stay.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


# Of this process. A file is read once, whoever asks for its hash.
HASHES = FileHashes()


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
