"""Pictures that several claims draw: means with their intervals, and metrics over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.study.figures import Interval, Points

_COLOURS = (
    "#2a78d6",
    "#d6602a",
    "#2f8f5b",
    "#8a4fc4",
    "#8c8c88",
    "#b8962e",
    "#c23b6e",
    "#3a3a38",
    "#1fa3a3",
    "#7a5230",
    "#9fb5d9",
    "#e0a9c0",
)
_INK = "#3a3a38"


@dataclass(frozen=True)
class Dot:
    """One model: a place with an interval on each axis."""

    title: str
    x: Interval
    y: Interval


def draw_dots(path: Path, dots: Sequence[Dot], x_label: str, y_label: str) -> None:
    """Draw one dot a model, with its 95% intervals.

    Args:
        path: The picture.
        dots: The models.
        x_label: What the horizontal axis shows, with its unit.
        y_label: The same of the vertical axis.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, dot in enumerate(dots):
        axes.errorbar(
            [dot.x.mean],
            [dot.y.mean],
            xerr=[[dot.x.mean - dot.x.low], [dot.x.high - dot.x.mean]],
            yerr=[[dot.y.mean - dot.y.low], [dot.y.high - dot.y.mean]],
            fmt="o",
            markersize=6,
            linewidth=1.2,
            color=_COLOURS[index % len(_COLOURS)],
            label=dot.title,
        )
    _finish(figure, axes, path, x_label, y_label)


def draw_rows(path: Path, rows: Sequence[tuple[str, Interval]], x_label: str) -> None:
    """Draw means with their 95% intervals, one below the other, and a line at 0.

    Args:
        path: The picture.
        rows: The name and the value of each row, the first one on top.
        x_label: What the values are, with their unit.
    """
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = [*range(len(rows), 0, -1)]
    means = [value.mean for _, value in rows]
    below = [value.mean - value.low for _, value in rows]
    above = [value.high - value.mean for _, value in rows]
    axes.errorbar(means, places, xerr=[below, above], fmt="o", color=_COLOURS[0], linewidth=1.2)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(places, [name for name, _ in rows], fontsize=9)
    _finish(figure, axes, path, x_label, "")


def draw_steps(
    path: Path,
    curves: Mapping[str, Mapping[int, Points]],
    y_label: str,
    *,
    logarithmic: bool = False,
) -> None:
    """Draw a metric over the steps of distill: the mean over the seeds, and each seed in light.

    Args:
        path: The picture.
        curves: Title -> seed -> (step, value), as Figures.steps() gives them.
        y_label: What the metric is, with its unit.
        logarithmic: Whether the vertical axis is logarithmic.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (title, of_seeds) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        by_step: dict[int, list[float]] = {}
        for points in of_seeds.values():
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, alpha=0.3)
            for step, value in points:
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        means = [fmean(by_step[step]) for step in steps]
        axes.plot(steps, means, color=colour, linewidth=1.8, label=title)
    if logarithmic:
        axes.set_yscale("log")
    _finish(figure, axes, path, "step", y_label)


def draw_points(
    path: Path,
    curves: Mapping[str, Mapping[int, Interval]],
    x_label: str,
    y_label: str,
) -> None:
    """Draw a metric at few steps: means with their 95% intervals, joined by lines, from 0 on.

    Args:
        path: The picture.
        curves: Title -> step -> value.
        x_label: What the horizontal axis shows.
        y_label: What the metric is, with its unit.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (title, of_steps) in enumerate(curves.items()):
        values = [*of_steps.values()]
        axes.errorbar(
            [*of_steps],
            [value.mean for value in values],
            yerr=[
                [value.mean - value.low for value in values],
                [value.high - value.mean for value in values],
            ],
            fmt="o-",
            markersize=5,
            linewidth=1.5,
            color=_COLOURS[index % len(_COLOURS)],
            label=title,
        )
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path, x_label, y_label)


def draw_scatter(
    path: Path,
    dots: Mapping[str, Sequence[tuple[float, float]]],
    crosses: Mapping[str, Sequence[tuple[float, float]]],
    *,
    limit: float,
    x_label: str,
    y_label: str,
) -> None:
    """Draw points with a logarithmic horizontal axis, a line at a limit of it and a line at 0.

    Args:
        path: The picture.
        dots: Title -> (x, y). Each x is above 0.
        crosses: The same, drawn as crosses.
        limit: Where the vertical line stands.
        x_label: What the horizontal axis shows, with its unit.
        y_label: The same of the vertical axis.
    """
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (title, points) in enumerate([*dots.items(), *crosses.items()]):
        marker = "o" if title in dots else "x"
        colour = _COLOURS[index % len(_COLOURS)]
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        axes.scatter(xs, ys, s=26, marker=marker, color=colour, linewidth=1.2, label=title)
    axes.set_xscale("log")
    axes.axvline(limit, color=_INK, linewidth=0.8, linestyle="--")
    axes.axhline(0, color=_INK, linewidth=0.8)
    _finish(figure, axes, path, x_label, y_label)


def _finish(figure: Figure, axes: Axes, path: Path, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file: no date, and names of parts that do not depend on chance.
    with matplotlib.rc_context({"svg.hashsalt": "lopd"}):
        # White, so that the ink can also be read on the dark pages of the site.
        figure.savefig(path, facecolor="white", metadata={"Date": None})
