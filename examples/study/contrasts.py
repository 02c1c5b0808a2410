"""Sums and differences of several arms with 95% intervals, and tables, for claims 2 and 5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.study.figures import Figures, Interval, MissingFigures, interval_of

# Equal means: no difference of accuracy larger than this. It was named before any arm was made.
MARGIN = 0.02
# One value of an arm for each seed.
Column = Callable[[str], Mapping[int, float]]


def of_metric(figures: Figures, metric: str) -> Column:
    """Return what reads a metric of an arm."""
    return lambda arm: figures.values(arm, metric)


def at_the_start(figures: Figures) -> Column:
    """Return what reads an arm's reverse KL from its OPD teacher before the first update."""

    def column(arm: str) -> dict[int, float]:
        # The responses of the first step are the student's own, so it is unbiased.
        return {seed: points[0][1] for seed, points in figures.steps(arm, "reverse_kl").items()}

    return column


def contrast(column: Column, weights: Mapping[str, float]) -> Interval:
    """Return the mean over seeds of a weighted sum of arms, paired by seed.

    Args:
        column: The values of an arm.
        weights: What the value of each arm is multiplied by.

    Raises:
        MissingFigures: Fewer than two seeds have all of the arms.
    """
    columns = {arm: column(arm) for arm in weights}
    seeds = set.intersection(*(set(values) for values in columns.values()))
    if len(seeds) < 2:
        raise MissingFigures(f"{', '.join(weights)} have {len(seeds)} seeds in common")
    return interval_of(
        [
            sum(weight * columns[arm][seed] for arm, weight in weights.items())
            for seed in sorted(seeds)
        ]
    )


def difference(column: Column, arm: str, other: str) -> Interval:
    return contrast(column, {arm: 1.0, other: -1.0})


def points(interval: Interval) -> str:
    """Return a difference of accuracy in points, with its interval."""
    return f"{interval.text(scale=100)} points"


def nats(interval: Interval) -> str:
    return interval.text(form=".4f")


def is_above(interval: Interval, limit: float = 0.0) -> bool:
    return interval.low > limit


def is_small(interval: Interval) -> bool:
    """Return whether the interval lies within the margin on both sides."""
    return interval.low > -MARGIN and interval.high < MARGIN


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    arm: str
    title: str
    # What it is compared with; "" for nothing.
    other: str = ""


def table(figures: Figures, rows: Sequence[Row], other_title: str) -> str:
    """Return a table in Markdown: an arm a line, each figure with its interval.

    Args:
        figures: What was measured.
        rows: The lines.
        other_title: What the arms are that they are compared with.
    """
    head = (
        f"| model | greedy, % | T=1, % | reverse KL, nats per token | {other_title}, T=1, points |"
    )
    lines = [head, "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row.title]
        for metric in ("greedy", "sampled"):
            cells.append(figures.mean(row.arm, metric).text(form=".1f", scale=100))
        cells.append(nats(figures.mean(row.arm, "reverse_kl")))
        sampled = of_metric(figures, "sampled")
        cells.append(difference(sampled, row.arm, row.other).text(scale=100) if row.other else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def teachers_text(result: Path) -> str:
    """Return a sentence about the two teachers, of the file that second_teacher.py has written."""
    if not result.exists():
        return "The two teachers have not been measured."
    measured = json.loads(result.read_text())["measured"]
    a = measured["teacher_a by teacher_b"]
    b = measured["teacher_b by teacher_a"]
    base = measured["two_notations by teacher_a"]
    return (
        f"At T=1 teacher A is right in {100 * a['sampled']:.1f}% and teacher B in "
        f"{100 * b['sampled']:.1f}% of the held-out problems (greedy {100 * a['greedy']:.1f}% and "
        f"{100 * b['greedy']:.1f}%), the base student in {100 * base['sampled']:.1f}%. The reverse "
        f"KL of A from B is {a['reverse_kl']:.4f} nats per token "
        f"({a['reverse_kl'] * a['tokens']:.2f} a response), of B from A {b['reverse_kl']:.4f} "
        f"({b['reverse_kl'] * b['tokens']:.2f}), of the base student from A "
        f"{base['reverse_kl']:.4f} ({base['reverse_kl'] * base['tokens']:.2f})."
    )
