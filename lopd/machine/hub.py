"""Downloads what a configuration names on the Hugging Face hub.

Only this file and lopd.machine.facts talk to the hub. A download is an explicit step: ``lopd fetch
CONFIG``. Of a model, weights as safetensors, JSON files and the tokenizer's files are fetched. Code
and pickles never are. A folder is made under another name, and renamed when it is whole. A note in
it names the commit that it came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.config import Config
from lopd.config.hub import HubName, hub_name, local_path
from lopd.errors import ConfigError, LopdError

# The file that marks a folder as whole, and names its source and commit.
NOTE = "lopd-source.json"
# Patterns of the files that are fetched. None of them matches code or pickled weights.
# Licences come along with the files that they cover.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
DATA_FILES = ("*.json", "*.jsonl", "*.parquet", "LICENSE", "LICENSE.txt", "LICENSE.md")
# Files of a folder that an error line lists.
_LISTED = 12
# huggingface_hub.snapshot_download, or what stands in for it in tests.
Snapshot = Callable[..., str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something on the hub that a run needs.

    Attributes:
        key: The key of the configuration that names it.
        name: Its name on the hub.
        path: Where it must be on this machine. It may be a file in the repository's folder.
    """

    key: str
    name: HubName
    path: Path

    @property
    def is_there(self) -> bool:
        # A folder without a note is not whole.
        return (self.name.folder / NOTE).is_file() and self.path.exists()


def named_paths(config: Config) -> dict[str, Path | None]:
    """Return every path of a configuration that may be a name on the hub, by its key."""
    # The keys are those of the configuration, so that a message names what the user has written.
    paths: dict[str, Path | None] = {
        "models.teacher": config.models.teacher,
        "models.student": config.models.student,
    }
    paths |= {f"models.teachers.{domain}": path for domain, path in config.models.teachers.items()}
    paths["models.teacher_base"] = config.models.teacher_base
    paths |= {
        f"prompts.{name}.file": getattr(config.prompts, name).file
        for name in ("sft", "opd", "eval")
    }
    # A declared teacher is only compared, but its files are what it is compared by.
    paths["sft.declared_teacher"] = config.sft.declared_teacher
    paths["sft.checkpoint"] = config.sft.checkpoint
    return paths


def wanted(config: Config) -> Iterator[Wanted]:
    """Yield everything that a configuration names on the hub."""
    for key, path in named_paths(config).items():
        # Loading the configuration has already turned names into paths in the hub's folder.
        # hub_name turns such a path back.
        name = hub_name(path) if path is not None else None
        if name is not None and path is not None:
            yield Wanted(key, name, path)


def named(text: str) -> Wanted:
    """Return what a name on the hub stands for.

    Args:
        text: A name such as ``hf://org/name@revision``. No configuration holds it.

    Raises:
        ConfigError: The text is no such name.
    """
    try:
        # The same reading of names as in a configuration.
        path = local_path(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r:.120}: {error}",
            where="hub",
            remedy="write for example hf://datasets/HuggingFaceH4/aime_2024@main/data",
        ) from None
    name = hub_name(path)
    assert name is not None, "local_path gives paths in the hub's folder"
    return Wanted(text, name, path)


def fetch(
    items: Iterable[Wanted], show_line: Callable[[str], None], *, snapshot: Snapshot | None = None
) -> list[dict[str, Any]]:
    """Download what is not on this machine yet. What is there is left alone.

    Args:
        items: The files and folders to fetch.
        show_line: Prints a line of progress.
        snapshot: Downloads a repository. None takes huggingface_hub.snapshot_download.

    Returns:
        One dict for each repository: key, source, folder, commit, and whether it was there.

    Raises:
        LopdError: Downloads are forbidden, the repository or revision is unknown, there is no room,
            or the repository has no such file.
    """
    # Several keys may name one repository, or files of it. It is fetched once.
    done: dict[HubName, dict[str, Any]] = {}
    for item in items:
        name = item.name
        was_there = item.is_there
        if not was_there and name not in done:
            show_line(f"{item.key}: fetching {name}")
            _download(item, snapshot or _snapshot_download())
        # The repository is here, but it has no such file or folder in it.
        if not item.path.exists():
            raise ConfigError(
                f"{item.key}: {name} has no file {item.path.relative_to(name.folder)}",
                where=str(name.folder),
                remedy=f"choose one of its files: {', '.join(_listing(name.folder))}",
            )
        # What was there already is listed too: its commit belongs into a report.
        commit = json.loads((name.folder / NOTE).read_text(encoding="utf-8"))["commit"]
        done[name] = {
            "key": item.key,
            "source": str(name),
            "folder": str(name.folder),
            "commit": commit,
            "was_there": was_there,
        }
        line = f"{item.key}: {name} is in {name.folder}"
        # A branch such as main may be another commit tomorrow.
        if not name.is_pinned:
            line += f"; to pin it, write {str(name).rpartition('@')[0]}@{commit}"
        show_line(line)
    return list(done.values())


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids downloads."""
    # These are the words that huggingface_hub takes for yes.
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _snapshot_download() -> Snapshot:
    # The error is raised here and not at the start, so that what is there already is still found.
    if offline():
        raise LopdError(
            "HF_HUB_OFFLINE forbids downloads",
            where="lopd fetch",
            remedy=f"unset HF_HUB_OFFLINE, or copy the files there by other means, with a {NOTE} "
            "(docs/recipes.md)",
        )
    from huggingface_hub import snapshot_download

    return snapshot_download


def _download(item: Wanted, snapshot: Snapshot) -> None:
    """Download one repository into its folder."""
    name = item.name
    # This folder stays after a failure, and the next attempt continues from it.
    partial = name.folder.with_name(f"{name.folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # huggingface_hub continues files that an earlier attempt left unfinished.
        snapshot(
            repo_id=name.repository,
            repo_type="dataset" if name.dataset else "model",
            revision=name.revision,
            local_dir=str(partial),
            # Only files that lopd reads: repositories often hold the same weights in a second form.
            allow_patterns=list(DATA_FILES if name.dataset else MODEL_FILES),
        )
    except Exception as error:
        # huggingface_hub raises its own errors, those of its connection, and the system's. All of
        # them mean that the download failed.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise LopdError(
            f"{item.key}: cannot fetch {name}: {reason}",
            where=str(partial),
            remedy="check the name, the revision, the network, the free disk space and (for "
            "gated repositories) hf auth login, then run the same command again: it "
            "continues",
        ) from error
    # Before the cache is removed, which is where the commit stands.
    commit = _commit(partial)
    note = json.dumps({"source": str(name), "commit": commit}, indent=1)
    (partial / NOTE).write_text(f"{note}\n", encoding="utf-8")
    # The cache beside the files is of use to a download that continues, and this one is whole.
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    # A folder that is there has no note, or it would not have been fetched again. It is the
    # user's own, or a damaged one, and no folder of a user is ever removed.
    if name.folder.exists():
        raise LopdError(
            "this folder exists, and lopd did not fetch it",
            where=str(name.folder),
            remedy="move this folder to another place",
        )
    partial.rename(name.folder)


def _commit(folder: Path) -> str:
    """Return the commit that a downloaded folder came from."""
    # huggingface_hub writes a note for each file. Its first line is the commit, the same in all.
    for note in sorted((folder / ".cache" / "huggingface" / "download").rglob("*.metadata")):
        lines = note.read_text(encoding="utf-8").splitlines()
        if lines:
            return lines[0].strip()
    return "unknown"


def _listing(folder: Path) -> list[str]:
    """Return the first files of a folder, for an error line."""
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        # The note is lopd's own and not part of the download.
        if path.is_file() and path.name != NOTE
    )
    return files[:_LISTED] or ["nothing"]
