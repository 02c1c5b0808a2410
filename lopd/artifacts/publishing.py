"""Publishing of files and folders: write, fsync, rename. A file that was renamed is complete."""

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
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into one clear line about ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in _STORAGE_ERRORS:
            reason = _STORAGE_ERRORS.get(error.errno or 0, "permission denied")
            remedy = "free space or permit writing, then run the same command again: what is published stays and is not repeated"
            raise ArtifactError(
                f"cannot publish: {reason}", where=str(error.filename or path), remedy=remedy
            ) from error
        raise


def publish_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write, fsync, rename: after a crash the file is there whole or not at all. private: for its
    owner alone. ArtifactError where the disk is full.
    """
    partial = path.with_name(
        f"{path.name}.{os.urandom(4).hex()}.partial"
    )  # workers of one stage may publish the same manifest at the same time
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
    publish_bytes(
        path,
        (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
        private=private,
    )


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(folder: Path, mark: str) -> None:
    """ArtifactError unless the folder is absent, empty, or holds the file ``mark`` that only we
    write: nothing foreign is ever removed.
    """
    if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
        what = f"holds files that are not ours (no {mark}) and would be replaced"
        raise ArtifactError(
            what,
            where=str(folder),
            limit="a new or empty folder, or a former export",
            remedy="give another export.dir",
        )


def remove_folder(folder: Path) -> None:
    """Removes a folder by renaming it first, so that a kill in between leaves nothing half removed
    under its name.
    """
    doomed = folder.with_name(folder.name + ".removing")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
