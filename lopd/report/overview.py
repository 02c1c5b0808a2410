"""What ``lopd status`` and ``lopd check`` show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopd.errors import LopdError, NotFetched
from lopd.report.console import duration

# The colour of a stage's state.
_STATE_STYLE = {
    "done": "green",
    "partial": "yellow",
    "outdated": "yellow",
    "absent": "dim",
    "damaged": "red",
}


_FINDING_STYLE = {"ok": "green", "fetch": "bold yellow", "wrong": "bold red"}


def status_table(
    rows: Sequence[Mapping[str, Any]], run_dir: Path, process: int | None = None
) -> None:
    """Print one line per stage, and that a command is running.

    Args:
        rows: ``name``, ``state``, ``progress``, ``rows``, ``seconds`` (of the command that
            finished the stage, or None), ``fingerprint`` and ``note`` of each stage.
        run_dir: The run directory.
        process: The process of this machine that runs a command there now, if there is one.
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
        cells = (row["name"], shown_state(row), count, seconds, row["fingerprint"], row["note"])
        # As Text: a path may hold [brackets], which rich would take for markup.
        table.add_row(*(Text(cell) for cell in cells), style=_STATE_STYLE[row["state"]])
    console = Console(highlight=False)
    # Not as the title of the table, which would break a long path.
    console.print(Text(f"run {run_dir}"), soft_wrap=True)
    console.print(table)
    if process is not None:
        # Nothing on disk has the overrides of a command before its first stage is done. Without
        # them its stages look outdated.
        line = (
            f"process {process} runs a command here now. If it has overrides (KEY=VALUE), repeat "
            "them after lopd status CONFIG to see its state; lopd watch needs none"
        )
        console.print(Text(line), soft_wrap=True)


def shown_state(row: Mapping[str, Any]) -> str:
    """Return how far a stage is, or its state where nothing says how far."""
    progress = row.get("progress")
    return row["state"] if progress is None else str(progress["text"])


def finding_row(name: str, finding: str | LopdError) -> dict[str, Any]:
    """Return a finding of ``lopd check`` or ``lopd doctor`` as a row.

    Returns:
        ``name``, ``ok``, ``state`` ("ok", "fetch" or "wrong") and ``finding``, a line.
    """
    state = "wrong" if isinstance(finding, LopdError) else "ok"
    # A download that is still to come is no mistake.
    if isinstance(finding, NotFetched):
        state = "fetch"
    return {"name": name, "ok": state == "ok", "state": state, "finding": str(finding)}


def print_finding(row: Mapping[str, Any]) -> None:
    """Print the row of a finding as one line."""
    # An error of another program may have several lines.
    finding = " ".join(row["finding"].split())
    mark = (f"{row['state']:5}", _FINDING_STYLE[row["state"]])
    Console(highlight=False).print(
        Text.assemble(mark, f" {row['name']:14} ", finding), soft_wrap=True
    )
