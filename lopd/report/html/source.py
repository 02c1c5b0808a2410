"""What a folder is that a report is asked for: a run, an evaluation, or a bare artifact.

Only published files are read, and nothing is changed. A run may still be in progress: the report
then shows the stages that have published something.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lopd.artifacts import MANIFEST, read_manifest
from lopd.errors import ArtifactError, DataError
from lopd.records import Manifest

# In the order of the pipeline. The names are also those of the folders.
STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
# The folder of the answers of `lopd evaluate`.
_ANSWERS = "answers"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of which a report is made.

    Attributes:
        folder: The folder.
        name: How the page calls it. No two sources of a page have the same name.
        kind: "run" for a run directory, "evaluation" for a folder of ``lopd evaluate --model``,
            "artifact" for a cache, rollouts, demonstrations or other responses.
        manifests: Those of a run by stage. Otherwise there is one: "answers" or "artifact".
        summary: The content of summary.json; {} where there is none.
        config: The knobs of the last command, flat; {} where they are not recorded.
    """

    folder: Path
    name: str
    kind: Literal["run", "evaluation", "artifact"]
    manifests: Mapping[str, Manifest]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]


def open_sources(folders: Sequence[Path]) -> list[Source]:
    """Return the source of each folder, with names that tell them apart.

    Raises:
        LopdError: A folder is none that a report can be made of.
    """
    names = _names([folder.resolve() for folder in folders])
    return [_open(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that decides nothing: empty where it is missing or damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    if len(set(folders)) < len(folders):
        raise DataError(
            "the same folder is given twice",
            where=", ".join(map(str, folders)),
            remedy="give each folder once",
        )
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _open(folder: Path, name: str) -> Source:
    if not folder.is_dir():
        raise DataError(
            "there is no such folder",
            where=str(folder),
            remedy="give a run directory, a folder of lopd evaluate, or a cache",
        )
    if (folder / MANIFEST).is_file():
        return _open_artifact(folder, name)
    summary = read_json(folder / "summary.json")
    if (folder / _ANSWERS / MANIFEST).is_file():
        manifests = {_ANSWERS: read_manifest(folder / _ANSWERS)}
        return Source(folder, name, "evaluation", manifests, summary, {})
    stages = {}
    for stage in STAGES:
        # A stage that has not begun has no manifest. A damaged manifest is an error of its own.
        if (folder / stage / MANIFEST).is_file():
            stages[stage] = read_manifest(folder / stage)
    if not stages:
        raise DataError(
            "holds neither a run, nor an evaluation, nor responses",
            where=str(folder),
            remedy="give a run directory, a folder of lopd evaluate, or a cache",
        )
    return Source(folder, name, "run", stages, summary, read_json(folder / "config.json"))


def _open_artifact(folder: Path, name: str) -> Source:
    manifest = read_manifest(folder)
    if not any(shard.name.endswith(".parquet") for shard in manifest.shards):
        run = folder.parent
        known = any((run / stage / MANIFEST).is_file() for stage in STAGES)
        raise ArtifactError(
            f"this {manifest.kind} holds no responses itself",
            where=str(folder),
            remedy=f"give the run directory: lopd report {run}" if known else "give another folder",
        )
    return Source(folder, name, "artifact", {"artifact": manifest}, {}, {})


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete artifact."""
    with contextlib.suppress(ArtifactError):
        return read_manifest(folder).complete
    return False
