"""What ``lopd knobs`` and the reference of the documentation say about each knob."""

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

_TYPES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    dict: "table",
    list: "list",
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Knob:
    """A field of a section of the configuration, in words.

    Attributes:
        kind: The type, such as "whole number", or the choices with " | " between them.
        default: None if the knob is required, or if it is absent by default.
        bounds: Such as ">= 1".
        speed_only: A change of the knob runs no stage again.
    """

    kind: str
    default: Any
    required: bool
    bounds: list[str]
    speed_only: bool
    meaning: str


def describe_knob(field: FieldInfo) -> Knob:
    """Return what a field says; the field must not be a section."""
    extra = field.json_schema_extra
    return Knob(
        kind=_type_name(_without_none(field.annotation)),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        required=field.is_required(),
        bounds=_bounds(field),
        speed_only=isinstance(extra, Mapping) and bool(extra.get("speed_only")),
        meaning=field.description or "",
    )


def knob_lines(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Yield two lines per knob: key, default, type and bounds, and then its meaning.

    Sections have no lines of their own.
    """
    for key, field in fields.items():
        kind = _without_none(field.annotation)
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
            about.append("absent")
        if knob.speed_only:
            about.append("changes no result")
        yield f"{shown}  ({', '.join(about)})"
        yield f"    {knob.meaning}"


def _without_none(annotation: Any) -> Any:
    """Return X for ``X | None`` and for ``Annotated[X, ...]``."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Annotated:
        return typing.get_args(annotation)[0]
    return annotation


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(json.dumps(choice) for choice in typing.get_args(kind))
    return _TYPES[typing.get_origin(kind) or kind]


def _bounds(field: FieldInfo) -> list[str]:
    found = (
        (sign, getattr(bound, name, None))
        for bound in field.metadata
        for name, sign in _SIGNS.items()
    )
    return [
        f"{sign} {limit:g}" if limit < 10**6 else f"{sign} {limit}"
        for sign, limit in found
        if limit is not None
    ]
