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

_STATE_STYLE = {
    "done": "green",
    "partial": "yellow",
    "outdated": "yellow",
    "absent": "dim",
    "damaged": "red",
}
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


def status_table(rows: Sequence[Mapping[str, Any]], run_dir: Path) -> None:
    """Prints one line a stage: state, rows, seconds of the command that finished it, fingerprint."""
    table = Table()
    for title in ("stage", "state", "rows", "seconds", "fingerprint", "note"):
        table.add_column(
            title,
            justify="right" if title in ("rows", "seconds") else "left",
            no_wrap=title in ("stage", "state"),
        )
    for row in rows:
        seconds = duration(row["seconds"]) if row["seconds"] is not None else ""
        count = f"{row['rows']:,}" if row["rows"] else ""
        cells = (row["name"], row["state"], count, seconds, row["fingerprint"], row["note"])
        table.add_row(
            *(Text(cell) for cell in cells), style=_STATE_STYLE[row["state"]]
        )  # as Text: a path may hold [brackets], which rich would interpret
    console = Console(highlight=False)
    console.print(
        Text(f"run {run_dir}"), soft_wrap=True
    )  # no title of the table, which would break the path
    console.print(table)


def check_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line a finding: what was found right, or what is wrong, where, the limit and the
    remedy.
    """
    console = Console(highlight=False)
    for row in rows:
        mark = ("ok   ", "green") if row["ok"] else ("wrong", "bold red")
        console.print(
            Text.assemble(mark, f" {row['name']:14} ", " ".join(row["finding"].split())),
            soft_wrap=True,
        )


def knob_lines(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Two lines a knob: key, default, type and bounds; then its meaning. Sections have none of
    their own.
    """
    for key, field in fields.items():
        kind = _without_none(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = key if default is None else f"{key} = {json.dumps(default, default=str)}"
        about = [_type_name(kind), *(_bounds(field))]
        if field.is_required():
            about.append("required")
        elif default is None:
            about.append("absent")
        if isinstance(field.json_schema_extra, Mapping) and field.json_schema_extra.get(
            "speed_only"
        ):
            about.append("changes no result")
        yield f"{shown}  ({', '.join(about)})"
        yield f"    {field.description}"


def _without_none(annotation: Any) -> Any:
    """``X | None`` as X, ``Annotated[X, ...]`` as X."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return (
        typing.get_args(annotation)[0]
        if typing.get_origin(annotation) is typing.Annotated
        else annotation
    )


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
