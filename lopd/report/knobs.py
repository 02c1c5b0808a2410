"""What ``lopd knobs`` and the reference pages of the documentation say about each knob."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# The types of knobs in words, for a user who does not know Python.
_TYPES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    dict: "table",
    list: "list",
}
# The bounds of a pydantic field.
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Knob:
    """A field of the configuration in words.

    Attributes:
        kind: The type, for example "whole number", or the choices with " | " between them.
        default: None if the knob is required, or if it is absent by default.
        required: Whether a configuration must set it.
        bounds: For example [">= 0", "< 1"].
        speed_only: Whether it can be changed without any stage running again.
        meaning: One sentence about the knob.
    """

    kind: str
    default: Any
    required: bool
    bounds: list[str]
    speed_only: bool
    meaning: str


def describe_knob(field: FieldInfo) -> Knob:
    """Return what a field of a section says. The field is not a section itself."""
    marks = field.json_schema_extra
    return Knob(
        # The type that a user can write. TOML has no null, so "or None" is of no use.
        kind=_type_name(_without_none(field.annotation)),
        # Lists and tables have a factory for their default.
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        required=field.is_required(),
        bounds=_bounds(field),
        speed_only=isinstance(marks, Mapping) and bool(marks.get("speed_only")),
        meaning=field.description or "",
    )


def knob_lines(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Yield two lines per knob: key, default, type and bounds, then the meaning.

    Args:
        fields: The fields of the configuration by their dotted key.
    """
    for key, field in fields.items():
        kind = _without_none(field.annotation)
        # A section is no knob. Its fields have keys of their own.
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            continue
        knob = describe_knob(field)
        shown = key
        if knob.default is not None:
            shown = f"{key} = {json.dumps(knob.default, default=str)}"
        about = [knob.kind, *knob.bounds]
        if knob.required:
            about.append("required")
        elif knob.default is None:
            # Leaving such a knob out is a choice of its own, and the meaning says which.
            about.append("absent")
        if knob.speed_only:
            about.append("changes no result")
        yield f"{shown}  ({', '.join(about)})"
        yield f"    {knob.meaning}"


def _without_none(annotation: Any) -> Any:
    """Return X for ``X | None`` and for ``Annotated[X, ...]``."""
    # Python has two forms of a union: X | None and Optional[X].
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Annotated:
        return typing.get_args(annotation)[0]
    return annotation


def _type_name(kind: Any) -> str:
    """Return a type in words. A choice is shown by its values."""
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(json.dumps(choice) for choice in typing.get_args(kind))
    # list[str] and dict[str, int] are shown as "list" and "table".
    return _TYPES[typing.get_origin(kind) or kind]


def _bounds(field: FieldInfo) -> list[str]:
    """Return the bounds of a knob, for example [">= 0", "< 1"]."""
    bounds = []
    for bound in field.metadata:
        for name, sign in _SIGNS.items():
            limit = getattr(bound, name, None)
            if limit is not None:
                # The format "g" would round a large whole number.
                bounds.append(f"{sign} {limit:g}" if limit < 10**6 else f"{sign} {limit}")
    return bounds
