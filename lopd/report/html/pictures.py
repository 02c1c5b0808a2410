"""The panels of a report as PNG, for places that show no HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that are told apart without colour vision, with dashes for those who see none.
_COLOURS = ("#0065a3", "#c25100", "#00795a", "#a8477f")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (1, 2)), (0, (8, 2, 2, 2)))
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
    """Write curves.png, timeline.png and tokens.png, as far as there is something to draw.

    Args:
        data: What lopd.report.html.page.gather returns.
        folder: Is made if it is missing.

    Returns:
        The pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    parts: tuple[tuple[str, Callable[[Mapping[str, Any]], Figure | None]], ...] = (
        ("curves.png", _curves),
        ("timeline.png", _timelines),
        ("tokens.png", _tokens),
    )
    for name, draw in parts:
        figure = draw(data)
        if figure is not None:
            # In memory, because publish_bytes() needs the whole file.
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            publish_bytes(folder / name, picture.getvalue())
            written.append(folder / name)
    return written


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which keeps every figure in a global list and looks for a display.
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _curves(data: Mapping[str, Any]) -> Figure | None:
    charts = [chart for chart in data["charts"] if chart["group"] == "main"]
    if not charts:
        return None
    rows = math.ceil(len(charts) / _COLUMNS)
    figure = _figure(4.6 * _COLUMNS, 3.1 * rows)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, chart in zip(grid, charts, strict=False):
        for line in chart["series"]:
            index = line["source"] % len(_COLOURS)
            style: dict[str, Any] = {"color": _COLOURS[index], "linestyle": _DASHES[index]}
            axes.plot(line["x"], line["y"], label=data["runs"][line["source"]]["name"], **style)
            if "low" in line:
                band = (line["x"], line["low"], line["high"])
                axes.fill_between(*band, color=_COLOURS[index], alpha=0.15, linewidth=0)
        positive = all(value > 0 for line in chart["series"] for value in line["y"])
        if chart["log"] and positive:
            axes.set_yscale("log")
        _title(axes, chart["title"], chart["unit"])
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    if len(data["runs"]) > 1:
        grid[0].legend(fontsize=8)
    return figure


def _title(axes: Axes, title: str, unit: str) -> None:
    import textwrap

    text = f"{title}, {unit}" if unit else title
    axes.set_title("\n".join(textwrap.wrap(text, 46)), loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _timelines(data: Mapping[str, Any]) -> Figure | None:
    runs = [run for run in data["runs"] if run["timeline"]]
    if not runs:
        return None
    figure = _figure(12.0, 2.8 * len(runs))
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
    axes.set_xlabel("minutes", fontsize=8)
    _title(axes, f"{run['name']}: what ran when", "")


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
    figure = _figure(5.0 * len(sets), 3.6)
    for axes, title in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        of_set = [(name, panel) for name, panel in panels if panel["set_title"] == title]
        for index, (name, panel) in enumerate(of_set):
            sizes = [size for _, size in panel["positions"]]
            label = f"{name}: {panel['title']}" if len(data["runs"]) > 1 else panel["title"]
            place = index % len(_COLOURS)
            style: dict[str, Any] = {"color": _COLOURS[place], "linestyle": _DASHES[place]}
            axes.plot(
                range(1, len(sizes) + 1), sizes, marker="o", markersize=3, label=label, **style
            )
        axes.legend(fontsize=8)
        axes.set_xlabel("tenth of the response", fontsize=8)
        _title(axes, f"{title}: mean size of log pi_teacher - log pi_student", "nats")
    return figure
