"""What all sections share: strict types, the mark of knobs that change no result, and paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, Strict

from lopd.config.hub import PREFIX, local_path

# The mark of a knob that changes how fast or where a stage runs, but not its result.
SPEED_ONLY: dict[str, JsonValue] = {"speed_only": True}

# Limits of Linux, in bytes: of one name in a path (NAME_MAX), and of a whole path (PATH_MAX is
# 4,096; a path in the configuration gets names of files and shards behind it).
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4000


def _usable_path(value: Any) -> Any:
    # A path that the system cannot open would otherwise fail in the middle of a run, and often with
    # an exception that is no LopdError.
    if isinstance(value, str | Path):
        if not str(value):
            raise ValueError("the path is empty")
        # A null byte or a line break would fail in a system call, far from the configuration.
        if not str(value).isprintable():
            raise ValueError("the path has characters that cannot be printed")
        longest_name = max((len(os.fsencode(part)) for part in Path(value).parts), default=0)
        if longest_name > _MAX_NAME_BYTES or len(os.fsencode(value)) > _MAX_PATH_BYTES:
            raise ValueError("the path is longer than the system allows")
        if str(value).startswith(PREFIX):
            return local_path(str(value))
        try:
            # "~" is the user's folder, as in a shell.
            return Path(value).expanduser()
        except RuntimeError:
            raise ValueError("the path names an unknown user") from None
    return value


# TOML has no paths: a string is accepted here, although all other types are strict.
FilePath = Annotated[Path, Strict(False), BeforeValidator(_usable_path)]


class Contradiction(ValueError):
    """Two knobs of one section do not fit together.

    It is a ValueError, because a validator of pydantic may raise nothing else.

    Args:
        what: The contradiction. It begins with the name of a knob.
        limit: What is allowed, as in lopd.errors.
        remedy: What to change, as in lopd.errors.
    """

    def __init__(self, what: str, *, limit: str = "", remedy: str) -> None:
        super().__init__(f"{what}: {limit}")
        # The three parts are kept apart, because loading.py puts the section's name before the
        # first.
        self.what = what
        self.limit = limit
        self.remedy = remedy


class Section(BaseModel):
    """A table of the TOML file.

    The types are strict: true is not a number, "8" is not a number, and 1e999 (infinity) is
    refused as well. An unknown key is refused.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        # Without this pydantic warns about every knob whose name begins with "model_".
        protected_namespaces=(),
    )
