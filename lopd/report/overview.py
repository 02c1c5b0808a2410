"""What ``lopd status``, ``lopd check`` and ``lopd knobs`` show."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.report.console import duration

# The colour of a stage's state.
_STATE_STYLE = {
    "done": "green",
    "partial": "yellow",
    "outdated": "yellow",
    "absent": "dim",
    "damaged": "red",
}
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


def status_table(rows: Sequence[Mapping[str, Any]], run_dir: Path) -> None:
    """Print one line per stage.

    Args:
        rows: ``name``, ``state``, ``rows``, ``seconds`` (of the command that finished the stage, or
            None), ``fingerprint`` and ``note`` of each stage.
    """
    table = Table()
    for title in ("stage", "state", "rows", "seconds", "fingerprint", "note"):
        table.add_column(
            title,
            justify="right" if title in ("rows", "seconds") else "left",
            no_wrap=title in ("stage", "state"),
        )
    for row in rows:
        # A stage that never finished has no duration, and one of a model has no rows.
        seconds = duration(row["seconds"]) if row["seconds"] is not None else ""
        count = f"{row['rows']:,}" if row["rows"] else ""
        cells = (row["name"], row["state"], count, seconds, row["fingerprint"], row["note"])
        # As Text: a path may hold [brackets], which rich would take for markup.
        table.add_row(*(Text(cell) for cell in cells), style=_STATE_STYLE[row["state"]])
    console = Console(highlight=False)
    # Not as the title of the table, which would break a long path.
    console.print(Text(f"run {run_dir}"), soft_wrap=True)
    console.print(table)


def check_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per check.

    Args:
        rows: ``ok``, ``name`` and ``finding`` of each check. The finding is what was found right,
            or an error line.
    """
    console = Console(highlight=False)
    for row in rows:
        mark = ("ok   ", "green") if row["ok"] else ("wrong", "bold red")
        # An error of another program may have several lines.
        finding = " ".join(row["finding"].split())
        console.print(Text.assemble(mark, f" {row['name']:14} ", finding), soft_wrap=True)


def knob_lines(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Yield two lines per knob: key, default, type and bounds, then the meaning.

    Args:
        fields: The fields of the configuration by their dotted key.
    """
    for key, field in fields.items():
        # The type that a user can write. TOML has no null, so "or None" is of no use.
        kind = _without_none(field.annotation)
        # A section is no knob. Its fields have keys of their own.
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            continue
        # Lists and tables have a factory for their default.
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = key if default is None else f"{key} = {json.dumps(default, default=str)}"
        about = [_type_name(kind), *_bounds(field)]
        if field.is_required():
            about.append("required")
        elif default is None:
            # Leaving such a knob out is a choice of its own, and the description says which.
            about.append("absent")
        marks = field.json_schema_extra
        # Such a knob can be changed without any stage running again.
        if isinstance(marks, Mapping) and marks.get("speed_only"):
            about.append("changes no result")
        yield f"{shown}  ({', '.join(about)})"
        yield f"    {field.description}"


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
