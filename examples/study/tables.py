"""Tables of arms in Markdown: a line for each arm, and each figure with its interval."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.study.arms import Arm
from examples.study.figures import ACCURACIES, METRICS, Figures, MissingFigures
from examples.study.wording import STYLES, shown

_NOT_MEASURED = "not measured"
_COSTS = {
    "decoded": ("teacher tokens decoded", 1.0),
    "scored": ("teacher tokens scored", 1.0),
    "cache_bytes": ("cache, kB", 1e-3),
    "processor_seconds": ("processor, s", 1.0),
    "wall_seconds": ("wall time, s", 1.0),
}


def titles_of(arms: Iterable[Arm]) -> dict[str, str]:
    """Return what tables call arms, by their names."""
    return {arm.name: arm.title for arm in arms}


def markdown_table(
    heads: Sequence[str], lines: Iterable[Sequence[str]], words: Collection[int] = (0,)
) -> str:
    """Return a table in Markdown.

    Args:
        heads: The heads of the columns.
        lines: The cells of each line. Where there are fewer than heads, the last ones stay empty.
        words: The indices of the columns that hold words. Figures are aligned to the right.
    """
    rules = "|".join("---" if index in words else "---:" for index in range(len(heads)))
    rows = [f"| {' | '.join(heads)} |", f"|{rules}|"]
    for cells in lines:
        rows.append(f"| {' | '.join(cells)} |{' |' * (len(heads) - len(cells))}")
    return "\n".join(rows)


def _means(figures: Figures, arm: str) -> list[str]:
    return [shown(figures.mean(arm, metric), metric) for metric in METRICS]


def _differences(figures: Figures, arm: str, other: str) -> list[str]:
    return [shown(figures.difference(arm, other, one), one, sign=True) for one in METRICS]


@dataclass(frozen=True)
class Table:
    """A table of arms, of which some may not be measured.

    Attributes:
        titles: What each arm is called, in the order of the lines.
        base: The arm that the others are compared with.
        base_title: What it is called in the head.
        metrics: The metrics whose means are shown.
        compared: Those whose differences from the common arm are shown.
    """

    titles: Mapping[str, str]
    base: str
    base_title: str
    metrics: Sequence[str] = (*METRICS, "kl_from_sft")
    compared: Sequence[str] = ACCURACIES

    def markdown(self, figures: Figures) -> str:
        """Return the table. An arm that was not measured is a line that says so."""
        heads = ["model", "seeds", *(STYLES[metric].head for metric in self.metrics)]
        heads += [f"minus {self.base_title}: {STYLES[metric].name}" for metric in self.compared]
        return markdown_table(heads, [self._line(figures, *one) for one in self.titles.items()])

    def _line(self, figures: Figures, arm: str, title: str) -> list[str]:
        if not figures.has(arm, "greedy"):
            return [title, "0", _NOT_MEASURED]
        cells = [title, str(len(figures.values(arm, "greedy")))]
        for metric in self.metrics:
            # The example of the small student has accuracies alone.
            is_known = figures.has(arm, metric)
            cells.append(shown(figures.mean(arm, metric), metric) if is_known else _NOT_MEASURED)
        for metric in self.compared:
            if arm == self.base or not figures.has(self.base, "greedy"):
                cells.append("")
            else:
                cells.append(shown(figures.difference(arm, self.base, metric), metric, sign=True))
        return cells


def results_table(figures: Figures, titles: Mapping[str, str], reference: str = "") -> str:
    """Return a table of means, and of their differences from those of one arm if it is named.

    Args:
        figures: What was measured.
        titles: What each arm is called, in the order of the lines.
        reference: The arm that is subtracted from the others.

    Raises:
        MissingFigures: One of the arms was not measured.
    """
    heads = ["model", "seeds", *(STYLES[metric].head for metric in METRICS)]
    if reference:
        first, *others = (STYLES[metric].name for metric in METRICS)
        heads += [f"{first} minus that of “{titles.get(reference, reference)}”", *others]
    lines = []
    for arm, title in titles.items():
        cells = [title, str(figures.mean(arm, "sampled").num_seeds), *_means(figures, arm)]
        if arm == reference:
            cells += [""] * len(METRICS)
        elif reference:
            cells += _differences(figures, arm, reference)
        lines.append(cells)
    return markdown_table(heads, lines)


def table_of_pairs(figures: Figures, pairs: Iterable[tuple[Arm, Arm | None]], head: str) -> str:
    """Return a table of means, in which an arm may have another one that it is compared with.

    Args:
        figures: What was measured.
        pairs: The arm of each line, and the one that is subtracted from it at T=1.
        head: What the difference is called.

    Raises:
        MissingFigures: One of the arms was not measured.
    """
    lines = []
    for arm, other in pairs:
        minus = ""
        if other is not None:
            difference = figures.difference(arm.name, other.name, "sampled")
            minus = shown(difference, "sampled", sign=True)
        lines.append([arm.title, *_means(figures, arm.name), minus])
    heads = [STYLES[metric].head for metric in METRICS]
    return markdown_table(
        ["model", *heads, f"{head}, {STYLES['sampled'].head_of_differences}"], lines
    )


def table_against(
    figures: Figures, arms: Iterable[Arm], other: Arm, outcomes: Mapping[str, str]
) -> str:
    """Return a table of differences from one arm, paired by seed.

    Args:
        figures: What was measured.
        arms: The arms of the lines.
        other: The arm that is subtracted.
        outcomes: The last column, by the name of the arm.

    Raises:
        MissingFigures: One of the arms was not measured.
    """
    heads = [STYLES[metric].head_of_differences for metric in METRICS]
    lines = [
        [arm.title, *_differences(figures, arm.name, other.name), outcomes[arm.name]]
        for arm in arms
    ]
    return markdown_table(
        [f"minus {other.title}", *heads, "outcome"], lines, words=(0, len(heads) + 1)
    )


def costs_table(figures: Figures, titles: Mapping[str, str]) -> str:
    """Return a table of what models have cost since the base student. Unknown costs stay empty.

    Args:
        figures: What was measured.
        titles: What each arm is called, in the order of the lines.
    """
    lines = [
        [title, *(_cost(figures, arm, metric, scale) for metric, (_, scale) in _COSTS.items())]
        for arm, title in titles.items()
    ]
    return markdown_table(["model", *(head for head, _ in _COSTS.values())], lines)


def _cost(figures: Figures, arm: str, metric: str, scale: float) -> str:
    try:
        cost = figures.mean(arm, metric)
    except MissingFigures:
        return ""
    # Of a command that was killed and went on, the seconds are not known.
    is_part = cost.num_seeds < len(figures.values(arm, "sampled"))
    return cost.text(",.0f", scale) + (f" ({cost.num_seeds} seeds)" if is_part else "")


def mean_of_steps(figures: Figures, arm: str, metric: str, part: slice) -> str:
    """Return the mean of a metric over some of the steps and all seeds, as the cell of a table."""
    try:
        found = [[value for _, value in of[part]] for of in figures.steps(arm, metric).values()]
    except MissingFigures:
        return _NOT_MEASURED
    values = [value for one in found for value in one]
    return f"{sum(values) / len(values):.3g}" if values else _NOT_MEASURED
