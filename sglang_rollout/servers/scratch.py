"""A server's private folder for sockets and temporary files. It goes with the server; what a killed
command has left behind goes when the next server starts.

A folder belongs to a living process as long as that holds the lock of its file ``owner``: the
kernel lets go of a lock with its process, however that ends, and unlike a process number it means
the same in every container that shares /tmp.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _OWNER = "lopd-sglang-", "owner"
# bytes; a Unix socket's path may have 107, and SGLang puts sockets of random names into its TMPDIR
PATH_MAX = 80


class Scratch:
    """A new folder: in TMPDIR, or in /tmp where TMPDIR is too long a path for a socket. remove() it
    in the end.
    """

    def __init__(self) -> None:
        remove_orphans()
        self.path = _new_folder()
        new = self.path / f"{_OWNER}.new"
        self._lock = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _OWNER)  # seen by others only once it is locked

    def remove(self) -> None:
        """Safe to call twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_orphans() -> None:
    """Removes the folders whose owners have ended without doing it."""
    for folder in {
        folder
        for place in (tempfile.gettempdir(), "/tmp")
        for folder in Path(place).glob(f"{_PREFIX}*")
    }:
        with contextlib.suppress(
            OSError
        ):  # somebody else's, still in use, or being made or removed at this moment
            lock = os.open(folder / _OWNER, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _new_folder() -> Path:
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    if len(os.fsencode(folder)) > PATH_MAX:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    return Path(folder)
