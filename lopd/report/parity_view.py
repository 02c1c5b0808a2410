"""What ``lopd parity`` shows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_FIGURES = {
    "mean": "mean",
    "p50": "p50",
    "p99": "p99",
    "largest": "largest",
    "bias": "bias",
    "k3": "k3 KL",
}


def show_parity(found: Mapping[str, Any]) -> None:
    """found: title -> lopd.audit.parity.Agreement."""
    console = Console(highlight=False)
    table = Table(
        title="|difference of log-probabilities|, nats", title_justify="left", title_style="bold"
    )
    figures = [agreement.as_dict() for agreement in found.values()]
    table.add_column("")
    # a column each: a line of so many figures would be cut off where a screen is 80 columns wide
    for title in found:
        table.add_column(title, justify="right")
    for name in ("responses", "tokens"):
        table.add_row(name, *(f"{of[f'num_{name}']:,}" for of in figures))
    for name, title in _FIGURES.items():
        table.add_row(title, *(f"{of[name]:.2e}" for of in figures))
    console.print(table)
    for title, agreement in found.items():
        worst = agreement.as_dict()["worst"][0]
        console.print(
            f"{title}: largest at {worst['response']}, token {worst['token']}", soft_wrap=True
        )
