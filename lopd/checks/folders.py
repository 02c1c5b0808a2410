"""Where a run writes: permitted, nobody else's, with room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lopd.artifacts import EXPORT_MARK, MANIFEST, check_replaceable, read_manifest
from lopd.checks.findings import ALL_STAGES, Finding, attempt
from lopd.config import Config
from lopd.errors import ConfigError, LopdError


def folders(config: Config) -> Iterator[Finding]:
    """The run directory and the export folder can be written, and nothing foreign is in them; what
    is published can be read.
    """
    yield attempt(partial(_run_dir, config.run.dir))
    if config.export.dir is not None:
        yield attempt(partial(_export_dir, config.export.dir))
    if config.run.dir.is_dir():
        for path in sorted(config.run.dir.glob(f"*/{MANIFEST}")):
            yield from (
                finding
                for finding in [attempt(partial(_manifest, path.parent))]
                if isinstance(finding, LopdError)
            )


def _run_dir(folder: Path) -> str:
    _check_writable(folder, "run.dir")
    if folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
        if foreign and not _is_run(folder):
            what = f"run.dir holds files that no run made, first {foreign[0]!r}"
            raise ConfigError(
                what,
                where=str(folder),
                limit="an empty or new folder, or one of a former run",
                remedy="give another run.dir",
            )
    return f"run.dir {folder}"


def _is_run(folder: Path) -> bool:
    """Whether lopd has worked there: its lock, a stage's manifest, or the keys that it remembers."""
    if (folder / ".lock").exists() or any(
        (folder / stage / MANIFEST).exists() for stage in ALL_STAGES
    ):
        return True
    try:
        return '"run.seed"' in (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _export_dir(folder: Path) -> str:
    _check_writable(folder, "export.dir")
    check_replaceable(folder, EXPORT_MARK)
    return f"export.dir {folder}"


def _manifest(folder: Path) -> str:
    read_manifest(folder)
    return ""


def _check_writable(folder: Path, key: str) -> None:
    try:
        parent = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise ConfigError(
            f"{key}: {error.strerror}", where=f"{folder!s:.200}", remedy=f"give another {key}"
        ) from None
    if not parent.is_dir():
        raise ConfigError(
            f"{key}: a file is in the way", where=str(parent), remedy=f"give another {key}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key} cannot be written",
            where=str(parent),
            remedy=f"give another {key}, or permit writing",
        )


def disk(config: Config) -> Iterator[Finding]:
    """Room for the checkpoints to resume from (weights and two Adam moments in float32, each kept
    one), exports and syncs.
    """
    weights = sum(path.stat().st_size for path in config.models.student.glob("*.safetensors"))
    kept = (
        config.sft.keep_checkpoints + config.distill.keep_checkpoints + 2
    )  # one more of each while it is written
    needed = weights * (3 * kept + 6)
    try:
        parent = next(
            folder for folder in (config.run.dir, *config.run.dir.parents) if folder.is_dir()
        )
    except OSError:  # ``folders`` has said so
        return
    free = shutil.disk_usage(parent).free
    if free < needed:
        remedy = "free space or give another run.dir"
        raise ConfigError(
            f"{free / 2**30:.2f} GiB free",
            where=str(parent),
            limit=f"about {needed / 2**30:.2f} GiB",
            remedy=remedy,
        )
    yield f"{free / 2**30:.1f} GiB free, about {needed / 2**30:.2f} GiB needed"
