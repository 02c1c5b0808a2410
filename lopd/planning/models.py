"""The two models of a configuration by their shapes alone: from their folders, from a given
config.json, or from what is known of public models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.config import Config
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.architecture import Architecture, read_architecture
from lopd.megatron.weights.families import FAMILIES
from lopd.planning.known_models import KNOWN_MODELS

ROLES = ("teacher", "student")


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """source: where its shape comes from, in words."""

    name: str
    arch: Architecture
    source: str


def planned_models(config: Config, given: Mapping[str, Path]) -> dict[str, PlannedModel]:
    """By role: teacher, student, and teachers.DOMAIN of each domain with a teacher of its own.

    given: config.json files (or folders with one) that win over what the configuration names.
    LopdError: one of them cannot be had.
    """
    own = {
        f"teachers.{domain}": _planned_model(f"teachers.{domain}", Path(folder), None)
        for domain, folder in config.models.teachers.items()
    }
    return {
        **{
            role: _planned_model(role, Path(getattr(config.models, role)), given.get(role))
            for role in ROLES
        },
        **own,
    }


def teacher_roles(models: Mapping[str, PlannedModel]) -> list[str]:
    """Of all teachers: that of the other domains, then those of a domain."""
    return [role for role in models if role.startswith("teacher")]


def _planned_model(role: str, folder: Path, given: Path | None) -> PlannedModel:
    if given is not None:
        return PlannedModel(public_name(folder), _read(given), str(given))
    if (folder / "config.json").is_file():
        return PlannedModel(
            public_name(folder), read_architecture(folder), str(folder / "config.json")
        )
    name = public_name(folder)
    if name in KNOWN_MODELS:
        table = KNOWN_MODELS[name]
        return PlannedModel(
            name,
            Architecture(**FAMILIES[table["model_type"]](table, name)),
            f"what is known of {name} (not downloaded)",
        )
    remedy = (
        f"give its config.json: lopd plan CONFIG --{role}-config FILE (or lopd fetch CONFIG)"
        if role in ROLES
        else "name a folder with a config.json"
    )
    raise ConfigError(
        f"models.{role} is not there, and its shape is not known", where=str(folder), remedy=remedy
    )


def public_name(folder: Path) -> str:
    """The last part of a model's name, from a folder called org--name@revision, name@revision or
    name.
    """
    return folder.name.partition("@")[0].rpartition("--")[2]


def _read(path: Path) -> Architecture:
    if path.is_dir():
        return read_architecture(path)
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LopdError(
            f"cannot be read ({error})", where=str(path), remedy="give a Hugging Face config.json"
        ) from None
    family = table.get("model_type") if isinstance(table, dict) else None
    if family not in FAMILIES:
        raise LopdError(
            f"model_type {family!r} is not supported",
            where=str(path),
            limit=f"one of {', '.join(sorted(FAMILIES))}",
        )
    return Architecture(**FAMILIES[family](table, str(path)))
