"""Names on the Hugging Face hub, as paths on this machine.

``hf://org/name@revision`` names a folder, whether it has been downloaded or not. Nothing here uses
the network; ``lopd fetch CONFIG`` downloads (lopd/machine/hub.py). The names have the form of
huggingface_hub's file system:

    hf://Qwen/Qwen3-8B-Base@49e3418
        models/Qwen--Qwen3-8B-Base@49e3418
    hf://datasets/HuggingFaceH4/aime_2024@main/data/train.parquet
        datasets/HuggingFaceH4--aime_2024@main/data/train.parquet

The folders lie below ``$LOPD_HUB``. If that variable is absent, they lie below lopd/hub in
$XDG_CACHE_HOME or in ~/.cache.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lopd.errors import ConfigError, LopdError, NotFetched

# With one slash: a Path makes one slash of two, so both spellings begin with this.
PREFIX = "hf:/"
DATASETS = "datasets"
MODELS = "models"

# The hub's own rule for names of owners and repositories: they begin and end with a letter, a
# digit, "_" or "-". A revision is a branch, a tag or a commit.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?"
_REVISION = r"(?P<revision>[A-Za-z0-9][A-Za-z0-9_.-]*)"
_REPOSITORY = rf"(?P<datasets>datasets/)?(?P<owner>{_PART})/(?P<name>{_PART})"
_NAME = re.compile(rf"{_REPOSITORY}(?:@{_REVISION})?(?P<file>/.+)?")
_FOLDER = re.compile(rf"(?P<owner>{_PART})--(?P<name>{_PART})@{_REVISION}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository at a revision.

    Attributes:
        owner: The user or organisation.
        name: The name of the repository.
        revision: A branch, a tag or a commit.
        dataset: Whether it holds data. False means a model.
    """

    owner: str
    name: str
    revision: str
    dataset: bool = False

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def folder(self) -> Path:
        """The folder on this machine. It may not exist yet."""
        kind = DATASETS if self.dataset else MODELS
        # The revision is part of the name, so two revisions of one model lie beside each other.
        return hub_folder() / kind / f"{self.owner}--{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Return whether the revision is a commit, which cannot change."""
        # A branch or tag could have such a name too, but hardly anyone gives one.
        return re.fullmatch(r"[0-9a-f]{7,40}", self.revision) is not None

    def __str__(self) -> str:
        # The prefix has one slash, so this writes the second.
        return f"{PREFIX}/{'datasets/' if self.dataset else ''}{self.repository}@{self.revision}"


def hub_folder() -> Path:
    """Return the folder of all downloads."""
    # An empty variable counts as absent, as the XDG specification says.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("LOPD_HUB") or caches / "lopd" / "hub").expanduser().absolute()


def local_path(text: str) -> Path:
    """Return where ``hf://...`` lies after its download.

    Args:
        text: The name. Without a revision it means the revision ``main``.

    Raises:
        ValueError: The text is not such a name.
    """
    found = _NAME.fullmatch(text.removeprefix(PREFIX).removeprefix("/"))
    file = (found["file"] or "").strip("/") if found else ""
    # ".." would lead out of the download. "--" separates owner and name in a folder's name, so an
    # owner with "--" could not be read back.
    escapes = any(part in ("", ".", "..") for part in file.split("/") if file)
    if found is None or "--" in found["owner"] or escapes:
        raise ValueError(
            "this is not a name on the hub: write hf://org/name@revision, or "
            "hf://datasets/org/name@revision/file"
        )
    revision = found["revision"] or "main"
    is_dataset = found["datasets"] is not None
    return HubName(found["owner"], found["name"], revision, is_dataset).folder / file


def hub_name(path: Path) -> HubName | None:
    """Return the repository that holds a path, or None if the path is not in the hub's folder."""
    try:
        # The name is read back from the path: after loading, a configuration holds paths alone.
        kind, folder, *_ = path.relative_to(hub_folder()).parts
    except ValueError:
        # The path lies elsewhere, or it is the hub's folder itself.
        return None
    found = _FOLDER.fullmatch(folder)
    if found is None or kind not in (MODELS, DATASETS):
        return None
    return HubName(found["owner"], found["name"], found["revision"], kind == DATASETS)


def absent(
    path: Path, what: str, *, otherwise: str, kind: type[LopdError] = ConfigError
) -> LopdError:
    """Return the error for a model or a prompt file that does not exist.

    Args:
        path: The path. If it is one of the hub's, nothing is wrong, and the remedy is to download.
        what: The key and what is missing, for a path that is not the hub's.
        otherwise: The remedy for such a path.
        kind: The class for such a path.
    """
    name = hub_name(path)
    if name is None:
        return kind(what, where=str(path), remedy=otherwise)
    # The configuration's key stays in the message, so that a user sees which line needs the
    # download.
    key = what.rpartition(":")[0]
    return NotFetched(
        f"{key}: {name} is not downloaded yet" if key else f"{name} is not downloaded yet",
        where=str(path),
        remedy=f"lopd fetch CONFIG, or lopd fetch {name}",
    )
