"""The models of a configuration by their shapes alone.

A shape comes from the model's folder, from a given config.json, or from what is known of public
models. Weights are not looked at.
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
    """A model by its shape.

    Attributes:
        name: The public name, without its organisation and revision.
        arch: The shape.
        source: Where the shape comes from, in words.
    """

    name: str
    arch: Architecture
    source: str


def planned_models(config: Config, given: Mapping[str, Path]) -> dict[str, PlannedModel]:
    """Return the models of a configuration.

    Args:
        config: The configuration.
        given: A config.json file (or a folder with one) by role. It wins over the folder that the
            configuration names.

    Returns:
        The models by role: teacher, student, and teachers.DOMAIN for each domain with a teacher of
        its own.

    Raises:
        LopdError: The shape of a model cannot be found.
    """
    folders = {role: Path(getattr(config.models, role)) for role in ROLES}
    # Teachers of domains have no option for their config.json. They need a folder or a known name.
    for domain, folder in config.models.teachers.items():
        folders[f"teachers.{domain}"] = Path(folder)
    return {role: planned_model(role, folder, given.get(role)) for role, folder in folders.items()}


def teacher_roles(models: Mapping[str, PlannedModel]) -> list[str]:
    """Return the roles of all teachers: that of the other domains, then those of a domain."""
    return [role for role in models if role.startswith("teacher")]


def planned_model(role: str, folder: Path, given: Path | None) -> PlannedModel:
    """Return a model from a given config.json, from its folder, or from its public name.

    Raises:
        LopdError: The shape of the model cannot be found.
    """
    # The order is from the surest source to the least sure one.
    name = public_name(folder)
    if given is not None:
        return PlannedModel(name, _read_shape(given), str(given))
    if (folder / "config.json").is_file():
        return PlannedModel(name, read_architecture(folder), str(folder / "config.json"))
    if name in KNOWN_MODELS:
        # The same function reads this table and a real config.json, so both are judged alike.
        table = KNOWN_MODELS[name]
        arch = Architecture(**FAMILIES[table["model_type"]](table, name))
        return PlannedModel(name, arch, f"what is known of {name} (not downloaded)")
    # Only the two main roles have an option for their config.json.
    remedy = "give a folder that has a config.json"
    if role in ROLES:
        remedy = (
            f"run lopd plan CONFIG --{role}-config FILE with its config.json, or lopd fetch CONFIG"
        )
    raise ConfigError(
        f"models.{role}: this folder does not exist, so the shape of the model is not known",
        where=str(folder),
        remedy=remedy,
    )


def public_name(folder: Path) -> str:
    """Return a model's name from a folder called org--name@revision, name@revision or name."""
    return folder.name.partition("@")[0].rpartition("--")[2]


def _read_shape(path: Path) -> Architecture:
    """Return the shape that a config.json file describes, whatever the file is called."""
    # A folder is read as a whole, with what else its model may need.
    if path.is_dir():
        return read_architecture(path)
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LopdError(
            f"cannot be read ({error})", where=str(path), remedy="give a Hugging Face config.json"
        ) from None
    # A file of another kind, such as a tokenizer's, is JSON too but has no model_type.
    family = table.get("model_type") if isinstance(table, dict) else None
    # Other families differ in ways that a trainer must know, so none is guessed.
    if family not in FAMILIES:
        raise LopdError(
            f"model_type {family!r} is not supported",
            where=str(path),
            limit=f"one of {', '.join(sorted(FAMILIES))}",
            remedy="choose a model of one of these families",
        )
    return Architecture(**FAMILIES[family](table, str(path)))
