"""What ``lopd status`` and ``lopd check`` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
