"""What ``lopd knobs`` and the reference pages of the documentation say about each knob."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lopd.config import Config
from lopd.config.secrets import scrubbed
from lopd.report.text_width import wrapped

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
    """Return the name, type, default, bound and sentence of one knob.

    A field that is a section itself is no knob, and must not be given."""
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


def overview_lines(fields: Mapping[str, FieldInfo], width: int) -> Iterator[str]:
    """Yield one line for each section: its name, its number of knobs, and what it is about.

    Args:
        fields: The fields of the configuration by their dotted key.
        width: The columns.
    """
    sections = _by_section(fields)
    longest = max(map(len, sections))
    for name, knobs in sections.items():
        indent = f"{name:{longest}} {len(knobs):4}  "
        yield from wrapped(_about(name), width, indent=indent, later=" " * len(indent))
    count = sum(map(len, sections.values()))
    yield ""
    yield from wrapped(
        f"{count} knobs. Those of one section: lopd knobs distill. By a word: lopd knobs --search "
        "checkpoint. What a file changes: lopd knobs --changed CONFIG. All: lopd knobs --all.",
        width,
    )


def section_lines(fields: Mapping[str, FieldInfo], width: int) -> Iterator[str]:
    """Yield a heading for each section, and for each knob its key, default, bounds and meaning.

    Args:
        fields: The fields of the configuration by their dotted key.
        width: The columns.
    """
    for number, (name, knobs) in enumerate(_by_section(fields).items()):
        if number:
            yield ""
        yield from wrapped(f"[{name}]  {_about(name)}", width, later="    ")
        for key, field in knobs.items():
            yield from _knob_lines(key, describe_knob(field), width)


def _knob_lines(key: str, knob: Knob, width: int) -> Iterator[str]:
    shown = key
    if knob.default is not None:
        shown = f"{key} = {json.dumps(knob.default, default=str)}"
    about = [knob.kind, *knob.bounds]
    if knob.required:
        about.append("required")
    elif knob.default is None:
        # Leaving such a knob out is a choice of its own, and the meaning says which.
        about.append("absent")
    # A change of such a knob makes no stage run again.
    if knob.speed_only:
        about.append("changes no result")
    yield from wrapped(f"{shown}  ({', '.join(about)})", width, later="      ")
    yield from wrapped(knob.meaning, width, indent="    ")


def changed_lines(config: Config, fields: Mapping[str, FieldInfo], width: int) -> Iterator[str]:
    """Yield what a configuration sets to another value than the default, with the default.

    Args:
        config: The configuration.
        fields: The fields to look at by their dotted key.
        width: The columns.
    """
    sections: dict[str, list[str]] = {}
    for key, field in fields.items():
        if _is_section(field):
            continue
        default = json.loads(json.dumps(describe_knob(field).default, default=str))
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        # A screen is read by others too, so secrets are hidden. Through JSON, so that paths are
        # text and tuples are lists, as the default is.
        plain = json.loads(json.dumps(scrubbed({key: value}), default=str))[key]
        if plain == default:
            continue
        was = "default: absent" if default is None else f"default: {json.dumps(default)}"
        if field.is_required():
            was = "has no default"
        line = f"{key} = {json.dumps(plain, ensure_ascii=False)}  ({was})"
        sections.setdefault(key.rpartition(".")[0], []).append(line)
    for number, (name, lines) in enumerate(sections.items()):
        if number:
            yield ""
        yield f"[{name}]"
        for line in lines:
            yield from wrapped(line, width, later="    ")
    if not sections:
        yield "nothing differs from the defaults"


def _by_section(fields: Mapping[str, FieldInfo]) -> dict[str, dict[str, FieldInfo]]:
    """Return the knobs by the section that they stand in. A section itself is no knob."""
    found: dict[str, dict[str, FieldInfo]] = {}
    for key, field in fields.items():
        # A section comes before those within it, although some of its own knobs come after them.
        if _is_section(field):
            found.setdefault(key, {})
        else:
            found.setdefault(key.rpartition(".")[0], {})[key] = field
    return {name: knobs for name, knobs in found.items() if knobs}


def _is_section(field: FieldInfo) -> bool:
    kind = _without_none(field.annotation)
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _about(section: str) -> str:
    """Return what a section is about: the first paragraph of its class, without its own name."""
    kind: Any = Config
    for part in section.split("."):
        kind = _without_none(kind.model_fields[part].annotation)
    # The docstring is the only description of a section, so pages and commands say the same.
    text = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    # Some docstrings begin with the name of the table, which stands before the text here.
    about = re.sub(r"^The tables? \[.*?: ", "", text)
    return about[:1].upper() + about[1:]


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
