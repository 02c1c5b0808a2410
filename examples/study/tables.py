"""Tables and judgements that several claims share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from examples.study.figures import Figures, Interval, MissingFigures

# Two accuracies are called equal if the interval of their difference lies within this margin. It
# was named before the runs.
MARGIN_POINTS = 2.0

# "equal": the interval lies within the margin. "higher", "lower": it lies beyond the margin.
# "open": it lies on both sides of a margin, so the figures do not decide.
Comparison = Literal["equal", "higher", "lower", "open"]


def compare(difference: Interval, margin: float) -> Comparison:
    """Return what the interval of a difference says of equality within a margin."""
    if difference.low >= -margin and difference.high <= margin:
        return "equal"
    if difference.low > margin:
        return "higher"
    if difference.high < -margin:
        return "lower"
    return "open"


def points(difference: Interval) -> str:
    """Return a difference of accuracies in words, in points."""
    return f"{difference.text('+.1f', 100)} points"


def nats(difference: Interval) -> str:
    """Return a difference of reverse KLs in words."""
    return f"{difference.text('+.4f')} nats per token"


def results_table(figures: Figures, rows: Sequence[tuple[str, str]], reference: str) -> str:
    """Return a table of models: accuracy, reverse KL, and their differences from one of them.

    Args:
        figures: What was measured.
        rows: (arm, title) of each line.
        reference: The arm that is subtracted from the others.
    """
    titles = dict(rows)
    lines = [
        "| model | seeds | greedy, % | T=1, % | reverse KL, nats per token "
        f"| greedy minus that of “{titles.get(reference, reference)}” | T=1 | reverse KL |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, title in rows:
        sampled = figures.mean(arm, "sampled")
        cells = [
            title,
            str(sampled.num_seeds),
            figures.mean(arm, "greedy").text(".1f", 100),
            sampled.text(".1f", 100),
            figures.mean(arm, "reverse_kl").text(".4f"),
        ]
        if arm == reference:
            cells += ["", "", ""]
        else:
            cells += [
                figures.difference(arm, reference, "greedy").text("+.1f", 100),
                figures.difference(arm, reference, "sampled").text("+.1f", 100),
                figures.difference(arm, reference, "reverse_kl").text("+.4f"),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_table(figures: Figures, rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of what models have cost since the base student. Unknown costs stay empty.

    Args:
        figures: What was measured.
        rows: (arm, title) of each line.
    """
    columns = {
        "decoded": ("teacher tokens decoded", 1.0),
        "scored": ("teacher tokens scored", 1.0),
        "cache_bytes": ("cache, kB", 1e-3),
        "processor_seconds": ("processor, s", 1.0),
        "wall_seconds": ("wall time, s", 1.0),
    }
    titles = " | ".join(title for title, _ in columns.values())
    lines = [f"| model | {titles} |", "|---|" + "---:|" * len(columns)]
    for arm, title in rows:
        cells = [_cost(figures, arm, metric, scale) for metric, (_, scale) in columns.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(figures: Figures, arm: str, metric: str, scale: float) -> str:
    try:
        cost = figures.mean(arm, metric)
    except MissingFigures:
        return ""
    # Of a command that was killed and went on, the seconds are not known.
    is_part = cost.num_seeds < len(figures.values(arm, "sampled"))
    return cost.text(",.0f", scale) + (f" ({cost.num_seeds} seeds)" if is_part else "")
