"""Publishing of files and folders: write, fsync, rename.

The rename is atomic. A file that has its final name is therefore complete, whatever killed its
writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopd.errors import ArtifactError

# The file in an exported checkpoint that says how it was made. Only an export writes it.
EXPORT_MARK = "lopd.json"
# Errors of the storage that a user can correct. Any other OSError is a bug of ours.
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


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear error line.

    Args:
        path: What the body writes. The error names it if the system does not name a file.

    Raises:
        ArtifactError: The storage refused, for a reason that the user can correct.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        # PermissionError stands for two numbers, EACCES and EPERM.
        if isinstance(error, PermissionError) or error.errno in _STORAGE_ERRORS:
            reason = _STORAGE_ERRORS.get(error.errno or 0, "permission denied")
            remedy = (
                "free disk space or permit writing, then run the same command again: "
                "finished work is kept"
            )
            raise ArtifactError(
                f"the file or folder cannot be written: {reason}",
                where=str(error.filename or path),
                remedy=remedy,
            ) from error
        raise


def publish_bytes(path: str | Path, content: bytes, *, private: bool = False) -> None:
    """Write a file so that after a crash it is there whole or not at all.

    Args:
        private: Whether only the owner may read the file.

    Raises:
        ArtifactError: The disk is full, read-only or forbidden.
    """
    path = Path(path)
    # The random part keeps apart the workers of one stage, which may publish the same manifest at
    # the same time. The last rename wins, and each of them is whole.
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb", opener=_open_private if private else None) as handle:
                handle.write(content)
                handle.flush()
                # The content must be on the disk before the name is. Otherwise a power failure can
                # leave the final name on an empty file.
                os.fsync(handle.fileno())
            partial.rename(path)
        except OSError:
            # On a full disk the unfinished file would take up the space that is missing.
            partial.unlink(missing_ok=True)
            raise
        # Without this a power failure could bring the previous file back, although a later stage
        # has used the new one.
        fsync_folder(path.parent)


def _open_private(path: str, flags: int) -> int:
    """Open a file that from its first moment only the owner may read."""
    return os.open(path, flags, 0o600)


def publish_json(path: str | Path, value: Any, *, private: bool = False) -> None:
    """Publish a value as indented JSON with sorted keys. See publish_bytes() for the errors."""
    path = Path(path)
    # With sorted keys, equal values are equal files, and two manifests can be compared by eye.
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    publish_bytes(path, (text + "\n").encode(), private=private)


def fsync_folder(folder: str | Path) -> None:
    """Make the renames inside this folder durable."""
    folder = Path(folder)
    # A rename changes the folder and not the file, so a fsync of the file does not keep it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(folder: str | Path, mark: str) -> None:
    """Refuse to replace a folder that we have not written ourselves.

    Args:
        mark: The name of a file that only we write. A folder that has it is ours.

    Raises:
        ArtifactError: The folder has files, and the mark is not among them.
    """
    folder = Path(folder)
    # An empty folder has nothing to lose. The mark decides and not the name of the folder, because
    # export.dir may name any folder of the user.
    if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
        what = f"the folder has no {mark}, so lopd did not make its files and does not replace them"
        raise ArtifactError(
            what,
            where=str(folder),
            limit="a new folder, an empty folder, or the folder of an earlier export",
            remedy="set export.dir to another folder",
        )


def remove_folder(folder: str | Path) -> None:
    """Remove a folder. After a kill it is there whole or not at all, under its own name."""
    folder = Path(folder)
    # The rename takes the name away at once. The slow removal then works under another name, which
    # nobody reads, and the next call removes what a kill has left there.
    # Beside the folder and not in /tmp: a rename works only within one file system.
    renamed = folder.with_name(folder.name + ".removing")
    shutil.rmtree(renamed, ignore_errors=True)
    if folder.exists():
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
