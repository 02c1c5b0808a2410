"""Rows and sentences about differences between arms, for the judgements of claims 4, 7 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from examples.study.figures import Figures, Interval, MissingFigures, interval_of

Answer = Literal["holds", "does not hold", "open"]
# Equal means: no difference of accuracy larger than this. It was named before any arm was made.
MARGIN = 0.02
# The columns of the tables: what a metric is called, its factor, and its number of digits.
COLUMNS = {
    "greedy": ("greedy, %", 100.0, 1),
    "sampled": ("T=1, %", 100.0, 1),
    "reverse_kl": ("reverse KL, nats per token", 1.0, 4),
    "kl_from_sft": ("KL from SFT, nats per token", 1.0, 4),
}


def change(
    figures: Figures, metric: str, late: str, early: str, *, of: str = "", early_of: str = ""
) -> Interval:
    """Return the mean of late - early, paired by seed.

    Args:
        figures: What was measured.
        metric: The metric.
        late: An arm.
        early: The arm that it is compared with.
        of: If given, the difference (of - early_of) is taken away from it, in each seed.
        early_of: See of.

    Raises:
        MissingFigures: Fewer than two seeds have all of the arms.
    """
    columns = [figures.values(late, metric), figures.values(early, metric)]
    if of:
        columns += [figures.values(of, metric), figures.values(early_of, metric)]
    seeds = set.intersection(*(set(column) for column in columns))
    signs = (1, -1, -1, 1)
    return interval_of(
        [
            sum(sign * column[seed] for sign, column in zip(signs, columns, strict=False))
            for seed in sorted(seeds)
        ]
    )


def shown(interval: Interval, metric: str, *, sign: bool = False) -> str:
    """Return a mean and its interval in the unit of the metric's column."""
    _, factor, digits = COLUMNS[metric]
    plus = "+" if sign else ""
    mean, low, high = (
        f"{factor * value:{plus}.{digits}f}"
        for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"


def words(interval: Interval, metric: str) -> str:
    """Return a difference as the words of a sentence, with its unit and its interval."""
    unit = "points" if metric in ("greedy", "sampled") else "nats per token"
    return f"{shown(interval, metric, sign=True)} {unit}"


def sign_of(interval: Interval) -> int:
    """Return 1 or -1 where the interval lies on one side of 0, and 0 where it holds 0."""
    return (interval.low > 0) - (interval.high < 0)


def mean_of_steps(figures: Figures, arm: str, metric: str, part: slice) -> str:
    """Return the mean of a metric over some of the steps and all seeds, as the cell of a table."""
    try:
        found = [[value for _, value in of[part]] for of in figures.steps(arm, metric).values()]
    except MissingFigures:
        return "not measured"
    values = [value for one in found for value in one]
    return f"{sum(values) / len(values):.3g}" if values else "not measured"


def is_measured(figures: Figures, arm: str) -> bool:
    """Return whether an arm has an accuracy in at least two seeds."""
    try:
        return len(figures.values(arm, "greedy")) >= 2
    except MissingFigures:
        return False


@dataclass(frozen=True)
class Table:
    """A table of arms: a line an arm, with its difference from a common arm."""

    # What each arm is called, in the order of the lines.
    titles: Mapping[str, str]
    # The arm that the others are compared with, and what it is called in the head.
    base: str
    base_title: str
    metrics: Sequence[str] = ("greedy", "sampled", "reverse_kl", "kl_from_sft")
    compared: Sequence[str] = ("greedy", "sampled")

    def markdown(self, figures: Figures) -> str:
        """Return the table. An arm that was not measured is a line that says so."""
        heads = ["model", "seeds", *(COLUMNS[metric][0] for metric in self.metrics)]
        heads += [
            f"minus {self.base_title}: {COLUMNS[metric][0].split(',')[0]}"
            for metric in self.compared
        ]
        lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        for arm, title in self.titles.items():
            lines.append(self._line(figures, arm, title))
        return "\n".join(lines)

    def _line(self, figures: Figures, arm: str, title: str) -> str:
        num_cells = len(self.metrics) + len(self.compared)
        if not is_measured(figures, arm):
            return f"| {title} | 0 | not measured |{' |' * (num_cells - 1)}"
        cells = [title, str(len(figures.values(arm, "greedy")))]
        for metric in self.metrics:
            # The example of the small student has accuracies alone.
            try:
                cells.append(shown(figures.mean(arm, metric), metric))
            except MissingFigures:
                cells.append("not measured")
        for metric in self.compared:
            if arm == self.base or not is_measured(figures, self.base):
                cells.append("")
            else:
                cells.append(shown(figures.difference(arm, self.base, metric), metric, sign=True))
        return f"| {' | '.join(cells)} |"
