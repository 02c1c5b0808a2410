"""Names on the Hugging Face hub as paths of this machine: ``hf://org/name@revision`` is a folder,
whether it has been downloaded or not. Pure: no network.

    hf://Qwen/Qwen3-8B-Base@49e3418                               models/Qwen--Qwen3-8B-Base@49e3418
    hf://datasets/HuggingFaceH4/aime_2024@main/data/train.parquet   datasets/HuggingFaceH4--aime_2024@main/data/train.parquet

below ``$LOPD_HUB`` (absent: lopd/hub in $XDG_CACHE_HOME or ~/.cache). The form is the one of
huggingface_hub's file system. ``lopd fetch CONFIG`` downloads (lopd/machine/hub.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PREFIX = "hf:/"  # a Path has made one slash of two
DATASETS = "datasets"
MODELS = "models"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?"
_NAME = re.compile(
    rf"(?P<datasets>datasets/)?(?P<owner>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9_.-]*))?(?P<file>/.+)?"
)
_FOLDER = re.compile(
    rf"(?P<owner>{_PART})--(?P<name>{_PART})@(?P<revision>[A-Za-z0-9][A-Za-z0-9_.-]*)"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository at a revision (branch, tag or commit). dataset: it holds data, not a model."""

    owner: str
    name: str
    revision: str
    dataset: bool = False

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def folder(self) -> Path:
        return (
            hub_folder()
            / (DATASETS if self.dataset else MODELS)
            / f"{self.owner}--{self.name}@{self.revision}"
        )

    @property
    def is_pinned(self) -> bool:
        """By a commit, which cannot change."""
        return re.fullmatch(r"[0-9a-f]{7,40}", self.revision) is not None

    def __str__(self) -> str:
        return f"{PREFIX}/{'datasets/' if self.dataset else ''}{self.repository}@{self.revision}"


def hub_folder() -> Path:
    """Where downloads are."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("LOPD_HUB") or caches / "lopd" / "hub").expanduser().absolute()


def local_path(text: str) -> Path:
    """Where ``hf://...`` lies once it is downloaded. ValueError: it is no such name. A missing
    revision is ``main``.
    """
    found = _NAME.fullmatch(text.removeprefix(PREFIX).removeprefix("/"))
    file = (found["file"] or "").strip("/") if found else ""
    if (
        found is None
        or "--" in found["owner"]
        or any(part in ("", ".", "..") for part in file.split("/") if file)
    ):
        raise ValueError(
            "no name on the hub: hf://org/name@revision, or hf://datasets/org/name@revision/file"
        )
    return (
        HubName(
            found["owner"],
            found["name"],
            found["revision"] or "main",
            found["datasets"] is not None,
        ).folder
        / file
    )


def hub_name(path: Path) -> HubName | None:
    """The repository in whose folder a path lies; None: it is not below the hub's folder."""
    try:
        kind, folder, *_ = path.relative_to(hub_folder()).parts
    except ValueError:
        return None
    found = _FOLDER.fullmatch(folder)
    return (
        None
        if found is None or kind not in (MODELS, DATASETS)
        else HubName(found["owner"], found["name"], found["revision"], kind == DATASETS)
    )


def remedy_for(absent: Path, otherwise: str) -> str:
    """What to do about a model or a prompt file that is not there: download it, where it is one of
    the hub's.
    """
    name = hub_name(absent)
    return otherwise if name is None else f"download {name}: lopd fetch CONFIG"
