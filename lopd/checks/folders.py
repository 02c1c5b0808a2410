"""The folders that a run writes: they can be written, belong to no one else, and have room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lopd.artifacts import EXPORT_MARK, MANIFEST, check_replaceable, read_manifest
from lopd.checks.findings import ALL_STAGES, Finding, attempt
from lopd.config import Config
from lopd.errors import ConfigError, LopdError
from lopd.planning.disk import disk_of, judge_room, room_needed


def folders(config: Config) -> Iterator[Finding]:
    """Check that the run directory and the export folder can be written.

    Nothing foreign may be in them. What an earlier run has published must be readable.
    """
    yield attempt(partial(_run_dir, config.run.dir))
    if config.export.dir is not None:
        yield attempt(partial(_export_dir, config.export.dir))
    if not config.run.dir.is_dir():
        return
    for path in sorted(config.run.dir.glob(f"*/{MANIFEST}")):
        # A readable manifest is no news. lopd status lists them.
        finding = attempt(partial(_manifest, path.parent))
        if isinstance(finding, LopdError):
            yield finding


def _run_dir(folder: Path) -> str:
    _check_writable(folder, "run.dir")
    if folder.is_dir():
        # A new file system has lost+found at its root.
        foreign = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
        # A stage removes what it replaces. In a folder that no run made, that could be a user's own
        # files.
        if foreign and not _is_run(folder):
            raise ConfigError(
                f"run.dir holds files that no run made, for example {foreign[0]!r}",
                where=str(folder),
                limit="a new folder, an empty folder, or the folder of an earlier run",
                remedy="set run.dir to another folder",
            )
    return f"run.dir {folder}"


def _is_run(folder: Path) -> bool:
    """Return whether a run has used a folder."""
    # A run leaves its lock or a stage's manifest.
    has_manifest = any((folder / stage / MANIFEST).exists() for stage in ALL_STAGES)
    if (folder / ".lock").exists() or has_manifest:
        return True
    # A run that ended before its first stage left only the keys that it remembers. Any
    # Hugging Face model has a config.json too, but no key of this name in it.
    try:
        return '"run.seed"' in (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _export_dir(folder: Path) -> str:
    _check_writable(folder, "export.dir")
    # An export replaces an earlier export, which a mark in the folder tells from anything else.
    check_replaceable(folder, EXPORT_MARK)
    return f"export.dir {folder}"


def _manifest(folder: Path) -> str:
    read_manifest(folder)
    return ""


def _check_writable(folder: Path, key: str) -> None:
    """Raise a ConfigError if a folder cannot be made or written."""
    try:
        # The folder need not exist yet. The nearest one above it decides.
        parent = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        # The name is too long, or a folder on the way may not be entered.
        raise ConfigError(
            f"{key}: {error.strerror}",
            where=f"{folder!s:.200}",
            remedy=f"set {key} to another folder",
        ) from None
    if not parent.is_dir():
        raise ConfigError(
            f"{key} cannot be created: a file has this path",
            where=str(parent),
            remedy=f"set {key} to another folder",
        )
    # Making files in a folder needs both permissions.
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key} cannot be written",
            where=str(parent),
            remedy=f"set {key} to another folder, or permit writing in this one",
        )


def disk(config: Config) -> Iterator[Finding]:
    """Check that there is room for what the run publishes, and for models to fetch."""
    try:
        needs = room_needed(config)
        disks = {folder: disk_of(folder) for folder in needs}
    except (LopdError, OSError):
        # The checks of the models and of the folders have said so.
        return
    yield from judge_room(needs, disks)
