"""Downloads what a configuration names on the Hugging Face hub, by revision, and nothing else: the
one place that talks to it.

A download is an explicit step (``lopd fetch CONFIG``). Models: weights as safetensors, JSON and the
tokenizer's files; never code, never pickles. A folder is made under another name and renamed when
it is whole, with a note of the commit it came from.
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

NOTE = "lopd-source.json"
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
Snapshot = Callable[..., str]  # huggingface_hub.snapshot_download


@dataclass(frozen=True, slots=True)
class Wanted:
    """key: of the configuration. path: what it must become on this machine."""

    key: str
    name: HubName
    path: Path

    @property
    def is_there(self) -> bool:
        return (self.name.folder / NOTE).is_file() and self.path.exists()


def wanted(config: Config) -> Iterator[Wanted]:
    """Every key of the configuration that names something on the hub."""
    paths: dict[str, Path | None] = {
        f"models.{role}": getattr(config.models, role) for role in ("teacher", "student")
    }
    paths |= {f"models.teachers.{domain}": path for domain, path in config.models.teachers.items()}
    paths |= {
        f"prompts.{name}.file": getattr(config.prompts, name).file
        for name in ("sft", "opd", "eval")
    }
    paths |= {
        "sft.declared_teacher": config.sft.declared_teacher,
        "sft.checkpoint": config.sft.checkpoint,
    }
    for key, path in paths.items():
        name = hub_name(path) if path is not None else None
        if name is not None and path is not None:
            yield Wanted(key, name, path)


def named(text: str) -> Wanted:
    """A name on the hub that no configuration holds. ConfigError: it is none."""
    try:
        path = local_path(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r:.120}: {error}",
            where="hub",
            remedy="for example hf://datasets/HuggingFaceH4/aime_2024@main/data",
        ) from None
    name = hub_name(path)
    assert name is not None, "local_path gives paths in the hub's folder"
    return Wanted(text, name, path)


def fetch(
    items: Iterable[Wanted], say: Callable[[str], None], *, snapshot: Snapshot | None = None
) -> list[dict[str, Any]]:
    """Downloads what is not there yet; what is there is left alone. One dict each: key, source,
    folder, commit, and whether it was there.

    snapshot: huggingface_hub.snapshot_download, or what stands in for it. LopdError: offline,
    unknown repository or revision, no room, no such file in it.
    """
    done: dict[HubName, dict[str, Any]] = {}
    for item in items:
        there = item.is_there
        if not there and item.name not in done:
            say(f"{item.key}: fetching {item.name}")
            _download(item, snapshot or _snapshot_download())
        if not item.path.exists():
            what = (
                f"{item.key}: there is no {item.path.relative_to(item.name.folder)} in {item.name}"
            )
            raise ConfigError(
                what,
                where=str(item.name.folder),
                remedy=f"it has: {', '.join(_listing(item.name.folder))}",
            )
        commit = json.loads((item.name.folder / NOTE).read_text(encoding="utf-8"))["commit"]
        done[item.name] = {
            "key": item.key,
            "source": str(item.name),
            "folder": str(item.name.folder),
            "commit": commit,
            "was_there": there,
        }
        pinned = (
            ""
            if item.name.is_pinned
            else f"; to pin it, write {str(item.name).rpartition('@')[0]}@{commit}"
        )
        say(f"{item.key}: {item.name} is in {item.name.folder}{pinned}")
    return [*done.values()]


def offline() -> bool:
    """HF_HUB_OFFLINE is set, in the words that huggingface_hub takes for yes."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _snapshot_download() -> Snapshot:
    if offline():
        remedy = "unset HF_HUB_OFFLINE, or put the files there by other means, with a lopd-source.json: docs/recipes.md"
        raise LopdError("HF_HUB_OFFLINE forbids downloads", where="lopd fetch", remedy=remedy)
    from huggingface_hub import snapshot_download

    return snapshot_download


def _download(item: Wanted, snapshot: Snapshot) -> None:
    name = item.name
    partial = name.folder.with_name(
        name.folder.name + ".partial"
    )  # a download that was cut off goes on from it
    patterns = list(DATA_FILES if name.dataset else MODEL_FILES)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        snapshot(
            repo_id=name.repository,
            repo_type="dataset" if name.dataset else "model",
            revision=name.revision,
            local_dir=str(partial),
            allow_patterns=patterns,
        )
    except Exception as error:  # huggingface_hub raises its own, requests', httpx' and the system's errors: all mean that the download failed
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "check the name, the revision, the network, room on the disk and (gated repositories) hf auth login; the same command goes on"
        raise LopdError(
            f"{item.key}: cannot fetch {name}: {reason}", where=str(partial), remedy=remedy
        ) from error
    commit = _commit(partial)
    (partial / NOTE).write_text(
        json.dumps({"source": str(name), "commit": commit}, indent=1) + "\n", encoding="utf-8"
    )
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    if name.folder.exists():  # without a note: not of ours, or a damaged one
        raise LopdError(
            "a folder that lopd did not fetch is in the way",
            where=str(name.folder),
            remedy="move it away",
        )
    partial.rename(name.folder)


def _commit(folder: Path) -> str:
    """What huggingface_hub notes beside each file it puts into a folder: the commit in the first
    line.
    """
    for note in sorted((folder / ".cache" / "huggingface" / "download").rglob("*.metadata")):
        lines = note.read_text(encoding="utf-8").splitlines()
        if lines:
            return lines[0].strip()
    return "unknown"


def _listing(folder: Path) -> list[str]:
    files = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != NOTE
    )
    return files[:12] or ["nothing"]
