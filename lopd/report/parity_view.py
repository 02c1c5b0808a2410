"""What ``lopd parity`` shows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# The rows of the table, after those with counts.
_FIGURES = {
    "mean": "mean",
    "p50": "p50",
    "p99": "p99",
    "largest": "largest",
    "bias": "bias",
    "k3": "k3 KL",
}


def show_parity(found: Mapping[str, Any]) -> None:
    """Print the agreement of each pair of engines as a table.

    Args:
        found: lopd.audit.parity.Agreement by title.
    """
    console = Console(highlight=False)
    title = "|difference of log-probabilities|, nats"
    table = Table(title=title, title_justify="left", title_style="bold")
    figures = [agreement.as_dict() for agreement in found.values()]
    table.add_column("")
    # One column per pair: a line with so many metrics would be cut off on a screen of 80 columns.
    for title in found:
        table.add_column(title, justify="right")
    for name in ("responses", "tokens"):
        table.add_row(name, *(f"{of[f'num_{name}']:,}" for of in figures))
    for name, title in _FIGURES.items():
        # Two engines differ by 1e-7 or by 1, so the metrics have an exponent.
        table.add_row(title, *(f"{of[name]:.2e}" for of in figures))
    console.print(table)
    for title, agreement in found.items():
        # Where the largest difference is tells whether it is one token or the whole of a response.
        worst = agreement.as_dict()["worst"][0]
        place = f"{worst['response']}, token {worst['token']}"
        console.print(f"{title}: largest at {place}", soft_wrap=True)
