"""Sums and differences of several arms with 95% intervals, and tables, for claims 2 and 5."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


def teachers_text(figures: Figures, arm: str, file: str) -> str:
    """Return sentences about the two teachers.

    Args:
        figures: What was measured.
        arm: An arm that keeps what second_teacher.py has measured.
        file: The file of its run with it.
    """
    # It is the same for all seeds.
    measured = next(iter(figures.recorded(arm, file).values()))
    a = measured["teacher_a_by_teacher_b"]
    b = measured["teacher_b_by_teacher_a"]
    base = measured["two_notations_by_teacher_a"]
    return (
        f"At T=1 teacher A is right in {100 * a['sampled']:.1f}% and teacher B in "
        f"{100 * b['sampled']:.1f}% of the held-out problems (greedy {100 * a['greedy']:.1f}% and "
        f"{100 * b['greedy']:.1f}%), the base student in {100 * base['sampled']:.1f}%. The reverse "
        f"KL of A from B is {_distance(a)}, of B from A {_distance(b)}, of the base student from A "
        f"{_distance(base)}."
    )


def _distance(measured: Mapping[str, float]) -> str:
    kl = measured["reverse_kl"]
    return f"{kl:.4f} nats per token ({kl * measured['tokens']:.2f} a response)"


def paragraphs(*texts: str) -> tuple[str, ...]:
    """Return parts of the page: tables as they are, and text in lines of at most 100 columns."""
    return tuple(
        text
        if text.startswith("|")
        else textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in texts
    )
