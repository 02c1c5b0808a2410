"""A server's private folder for sockets and temporary files.

The folder is removed with the server. The folder that a killed command left behind is removed when
the next server starts.

A folder belongs to a living process as long as that process holds the lock of its file ``owner``.
The kernel releases a lock when its process ends, however it ends. And unlike a process id, a lock
means the same in every container that shares /tmp.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

# The beginning of the folders' names, by which orphans are found, and the file that their owner has
# locked.
_PREFIX = "lopd-sglang-"
_OWNER = "owner"
# In bytes. The path of a Unix socket may have 107, and SGLang makes sockets with long random names
# in its TMPDIR.
PATH_MAX = 80


class Scratch:
    """A new folder in TMPDIR, or in /tmp where the path of TMPDIR is too long for a socket.

    The owner must call remove() in the end.
    """

    def __init__(self) -> None:
        remove_orphans()
        self.path = _new_folder()
        # The file gets its name only when it is locked. Otherwise another process could find it
        # between its creation and the lock, take the lock, and remove the folder as an orphan.
        new = self.path / f"{_OWNER}.new"
        self._lock = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _OWNER)

    def remove(self) -> None:
        """Remove the folder. A second call does nothing."""
        if self._lock >= 0:
            # The lock is released last, so that nobody else removes the folder at the same time.
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_orphans() -> None:
    """Remove the folders whose owners have ended without removing them."""
    folders = {
        folder
        # Scratch folders are in /tmp where the usual place has too long a path for a socket.
        for place in (tempfile.gettempdir(), "/tmp")
        for folder in Path(place).glob(f"{_PREFIX}*")
    }
    for folder in folders:
        # An error means that the folder belongs to another user, is in use (the lock is taken), or
        # is being made or removed at this moment. In each case it must stay.
        with contextlib.suppress(OSError):
            lock = os.open(folder / _OWNER, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _new_folder() -> Path:
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    # /tmp is the shortest path that every machine has.
    if len(os.fsencode(folder)) > PATH_MAX:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    return Path(folder)
