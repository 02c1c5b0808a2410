"""The panels of a report as PNG, for places that show no HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_bytes
from lopd.report.html.chart_picture import (
    COLOURS,
    DASHES,
    draw_chart,
    label_axes,
    last_step,
    new_figure,
    style_axes,
)
from lopd.report.html.learning_curve import PICTURE as LEARNING_CURVE
from lopd.report.html.learning_curve import learning_charts, render_learning_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "stage": ("#d5d9e0", ""),
    "server start": ("#f3ae7c", "////"),
    "step": ("#0065a3", ""),
    "sync": ("#00795a", "||||"),
    "refresh": ("#a8477f", "----"),
    "between steps": ("#ffffff", ""),
}
_COLUMNS = 3


def write_pictures(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write learning_curve.png, curves.png, timeline.png and tokens.png.

    What there is nothing to draw for is left out.

    Args:
        data: What lopd.report.html.page.gather returns.
        folder: Is made if it is missing.

    Returns:
        The pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    parts: tuple[tuple[str, Callable[[Mapping[str, Any]], bytes | None]], ...] = (
        (LEARNING_CURVE, _learning),
        ("curves.png", lambda data: _png(_curves(data))),
        ("timeline.png", lambda data: _png(_timelines(data))),
        ("tokens.png", lambda data: _png(_tokens(data))),
    )
    for name, draw in parts:
        picture = draw(data)
        if picture is not None:
            publish_bytes(folder / name, picture)
            written.append(folder / name)
    return written


def _learning(data: Mapping[str, Any]) -> bytes | None:
    """Return the learning curve of the run. Several runs have their curves in one picture."""
    charts = learning_charts(data["charts"])
    if len(data["runs"]) > 1 or not any(chart["series"] for chart in charts):
        return None
    return render_learning_curve(charts, title=data["runs"][0]["learning_title"])


def _png(figure: Figure | None) -> bytes | None:
    if figure is None:
        return None
    # In memory, because publish_bytes() needs the whole file.
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _curves(data: Mapping[str, Any]) -> Figure | None:
    charts = [chart for chart in data["charts"] if chart["group"] == "main"]
    if not charts:
        return None
    names = [run["name"] for run in data["runs"]]
    rows = math.ceil(len(charts) / _COLUMNS)
    figure = new_figure(4.9 * _COLUMNS, 3.3 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, chart in zip(grid, charts, strict=False):
        draw_chart(axes, chart, names, last=last_step(charts) if len(names) == 1 else None)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    if len(names) > 1:
        grid[0].legend(fontsize=8)
    return figure


def _timelines(data: Mapping[str, Any]) -> Figure | None:
    runs = [run for run in data["runs"] if run["timeline"]]
    if not runs:
        return None
    figure = new_figure(12.0, 2.8 * len(runs))
    for axes, run in zip(figure.subplots(len(runs), 1, squeeze=False).flatten(), runs, strict=True):
        _timeline(axes, run)
    return figure


def _timeline(axes: Axes, run: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    spans = sorted(run["timeline"], key=lambda span: span["kind"] != "stage")
    begun = min(span["start"] for span in spans)
    lanes = list(dict.fromkeys(span["lane"] for span in run["timeline"]))
    for span in spans:
        colour, hatch = _KINDS[span["kind"]]
        minutes = [(span[end] - begun) / 60 for end in ("start", "end")]
        # A step of a second would not be seen in a run of hours without an edge.
        axes.barh(
            lanes.index(span["lane"]),
            minutes[1] - minutes[0],
            left=minutes[0],
            height=0.7 if span["kind"] == "stage" else 0.5,
            color=colour,
            hatch=hatch,
            edgecolor="#5a6270",
            linewidth=0.3,
        )
    used = {span["kind"] for span in spans}
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#5a6270", label=kind)
        for kind, (colour, hatch) in _KINDS.items()
        if kind in used
    ]
    axes.legend(handles=patches, fontsize=8, ncols=len(patches), loc="upper right")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    style_axes(axes, f"{run['name']}: what ran when")
    label_axes(axes, "minutes", "stage")


def _tokens(data: Mapping[str, Any]) -> Figure | None:
    panels = [
        (run["name"], panel)
        for run in data["runs"]
        for panel in run["tokens"]
        # The teacher's deviation from itself is rounding.
        if panel["model"] != "teacher"
    ]
    if not panels:
        return None
    sets: Sequence[str] = list(dict.fromkeys(panel["set_title"] for _, panel in panels))
    figure = new_figure(5.0 * len(sets), 3.6)
    for axes, title in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        of_set = [(name, panel) for name, panel in panels if panel["set_title"] == title]
        for index, (name, panel) in enumerate(of_set):
            sizes = [size for _, size in panel["positions"]]
            label = f"{name}: {panel['title']}" if len(data["runs"]) > 1 else panel["title"]
            place = index % len(COLOURS)
            style: dict[str, Any] = {"color": COLOURS[place], "linestyle": DASHES[place]}
            axes.plot(
                range(1, len(sizes) + 1), sizes, marker="o", markersize=3, label=label, **style
            )
        axes.legend(fontsize=8)
        style_axes(axes, f"{title}: mean size of log pi_teacher - log pi_student")
        label_axes(axes, "tenth of the response", "nats")
    return figure
