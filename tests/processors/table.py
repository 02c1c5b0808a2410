"""One table of all figures that tests.limits recorded: the worst over all processors and cases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARGIN = 3


@dataclass(frozen=True)
class Figure:
    """What one assertion of a test saw at its worst."""

    test: str  # file::function, without parameters
    name: str
    kind: str  # limit: the figure stays below it; control: it stays above
    limit: float
    worst: float
    where: str  # processor, and the parameters of the test

    @property
    def is_control(self) -> bool:
        return self.kind == "control"

    @property
    def ratio(self) -> float:
        """How many times the figure fits between itself and its limit; 0 where it is no number."""
        if math.isnan(self.worst):
            return 0.0
        if self.is_control:
            return self.worst / self.limit
        return self.limit / self.worst if self.worst else math.inf


def read(folder: Path) -> list[Figure]:
    """All figures of a folder, which has a file for each processor; the nearest to limits first."""
    figures: dict[tuple[str, str, str, float], Figure] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            test, _, parameters = row["test"].partition("[")
            where = f"{file.stem} {parameters.removesuffix(']')}".strip()
            limit = row["limit"]
            worst = row["difference"]
            figure = Figure(test, row["name"], row["kind"], limit, worst, where)
            key = (test, figure.name, figure.kind, figure.limit)
            before = figures.get(key)
            if before is None or figure.ratio < before.ratio:
                figures[key] = figure
    return sorted(figures.values(), key=lambda figure: figure.ratio)


def near(figures: Iterable[Figure]) -> list[Figure]:
    """Those that are nearer to their limit than by MARGIN; a control, whose bound is far above the
    limit of the figure that it is a control of, need only be above it."""
    return [figure for figure in figures if figure.ratio < (1 if figure.is_control else MARGIN)]


def show(figures: Iterable[Figure]) -> str:
    """A table as text, a line for each figure."""
    head = f"{'ratio':>8}  {'limit':>9}  {'worst':>9}  test, figure, where it was seen"
    lines = [head]
    figures = list(figures)
    marked = near(figures)
    for figure in figures:
        sign = ">=" if figure.is_control else "<="
        name = " ".join(filter(None, [figure.test, figure.name and f"({figure.name})"]))
        mark = "  NEAR" if figure in marked else ""
        ratio = "exact" if math.isinf(figure.ratio) else f"{figure.ratio:.3g}"
        limit = f"{sign}{figure.limit:.3g}"
        lines.append(f"{ratio:>8}  {limit:>9}  {figure.worst:9.2e}  {name}, {figure.where}{mark}")
    return "\n".join(lines)
