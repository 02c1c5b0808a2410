"""What ``lopd status`` and ``lopd check`` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
