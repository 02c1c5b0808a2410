"""What ``lopd parity`` shows in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = {"mean": "mean", "p50": "p50", "p99": "p99", "largest": "largest", "bias": "bias", "k3": "k3 KL"}


def show_parity(found: Mapping[str, Any]) -> None:
    """found: title -> lopd.parity.Agreement."""
    console = Console(highlight=False)
    table = Table(title="|difference of log-probabilities|, nats", title_justify="left", title_style="bold")
    table.add_column("")
    for title in ("responses", "tokens", *_COLUMNS.values()):
        table.add_column(title, justify="right")
    for title, agreement in found.items():
        figures = agreement.as_dict()
        table.add_row(title, f"{figures['num_responses']:,}", f"{figures['num_tokens']:,}", *(f"{figures[name]:.2e}" for name in _COLUMNS))
    console.print(table)
    for title, agreement in found.items():
        worst = agreement.as_dict()["worst"][0]
        console.print(f"{title}: largest at {worst['response']}, token {worst['token']}", soft_wrap=True)
