"""What all sections share: strictness, the mark of knobs that change no result, and paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, Strict

from lopd.config.hub import PREFIX, local_path

SPEED_ONLY: dict[str, JsonValue] = {"speed_only": True}


def _usable_path(value: Any) -> Any:
    if isinstance(value, str | Path):
        if not str(value):
            raise ValueError("an empty path")
        if not str(value).isprintable():
            raise ValueError("a path with characters that cannot be shown")
        if (
            any(len(os.fsencode(part)) > 255 for part in Path(value).parts)
            or len(os.fsencode(value)) > 4000
        ):
            raise ValueError("a longer path than the system allows")
        if str(value).startswith(PREFIX):
            return local_path(str(value))
        try:
            return Path(value).expanduser()
        except RuntimeError:
            raise ValueError("a path of an unknown user") from None
    return value


FilePath = Annotated[Path, Strict(False), BeforeValidator(_usable_path)]  # a string in TOML


class Contradiction(ValueError):
    """Knobs of one section that do not go together. what: begins with a knob's name; limit, remedy:
    as in errors.py.
    """

    def __init__(self, what: str, *, limit: str, remedy: str) -> None:
        super().__init__(f"{what}: {limit}")
        self.what, self.limit, self.remedy = what, limit, remedy


class Section(BaseModel):
    """A table of the TOML file. Types are strict: true is no number, "8" is none either, and 1e999
    is none at all.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
