"""One chart of lopd.report.html.curves as a picture, by matplotlib.

The learning curve of a run and all curves of a report are drawn here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that are told apart without colour vision, with dashes for those who see none.
COLOURS = ("#0065a3", "#c25100", "#00795a", "#a8477f", "#6b5b00")
DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (1, 2)), (0, (8, 2, 2, 2)), (0, (12, 2)))
INK = "#1f2430"
_MUTED = "#5a6270"
_GRID = "#e5e7eb"
# The colour of each model that was evaluated at the end.
_MODELS = {
    "distilled": "#0065a3",
    "teacher": "#7a3e9d",
    "sft": "#b34700",
    "sft_longer": "#7d5a00",
    "base": "#5a6270",
}
# At the right edge, where there is little space.
_SHORT = {
    "distilled": "distilled",
    "teacher": "teacher",
    "sft": "SFT",
    "sft_longer": "SFT longer",
    "base": "base",
}
# The height of a name at the right edge, as a share of the height of the axes.
_NAME_HEIGHT = 0.062
# Markers show single steps. On a long run they would only make the line thick.
_FEW_POINTS = 60
# Characters of a title in a line.
_TITLE_WIDTH = 46


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.
        dpi: Pixels per inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which keeps every figure in a global list and looks for a display.
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")
    # Agg draws pixels in memory. It needs no window system.
    FigureCanvasAgg(figure)
    return figure


def last_step(charts: Sequence[Mapping[str, Any]]) -> int:
    """Return the last step of all curves of distill."""
    steps: list[int] = [
        step
        for chart in charts
        if chart["stage"] == "distill"
        for line in chart["series"]
        for step in line["x"]
    ]
    # An axis from 0 to 0 has no length.
    return max([1, *steps])


def draw_chart(
    axes: Axes, chart: Mapping[str, Any], names: Sequence[str], *, last: int | None = None
) -> None:
    """Draw one chart.

    Args:
        axes: Where it is drawn.
        chart: A chart of charts_of().
        names: Those of the runs.
        last: The last step, if all panels have the same axis, so that they can be read across.
    """
    _scale(axes, chart)
    # Quantiles need colours of their own.
    by_place = len(names) == 1
    for place, line in enumerate(chart["series"]):
        index = (place if by_place else line["source"]) % len(COLOURS)
        label = " ".join(
            filter(None, ("" if by_place else names[line["source"]], line.get("label")))
        )
        style: dict[str, Any] = {"color": COLOURS[index], "linestyle": DASHES[index]}
        marker = "o" if len(line["x"]) <= _FEW_POINTS else ""
        axes.plot(
            line["x"], line["y"], label=label, marker=marker, markersize=3.5, linewidth=1.6, **style
        )
        if "low" in line:
            band = (line["x"], line["low"], line["high"])
            axes.fill_between(*band, color=COLOURS[index], alpha=0.15, linewidth=0)
    if any("label" in line for line in chart["series"]):
        axes.legend(fontsize=7)
    if chart["levels"] and by_place:
        end = last if last is not None else last_step([chart])
        _draw_levels(axes, chart["levels"], chart["unit"], end)
    elif chart["levels"] and not chart["series"]:
        _draw_models(axes, chart["levels"], names)
    if last is not None and chart["stage"] == "distill":
        # A little space at both ends, so that the first and the last marker are whole.
        axes.set_xlim(-0.02 * last, 1.02 * last)
    _note(axes, chart)
    style_axes(axes, chart["title"])
    label_axes(axes, chart["x_title"], chart["unit"])


def _scale(axes: Axes, chart: Mapping[str, Any]) -> None:
    """Choose the axes of values: logarithmic where the chart wants it and has no 0."""
    values = [value for line in chart["series"] for value in line["y"]]
    values += [level["value"] for level in chart["levels"]]
    if chart["log"] and all(value > 0 for value in values):
        axes.set_yscale("log")
        # 0.01 is easier to read than 10 to the power of -2.
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.set_ylim(min(values) / 2, max(values) * 2)
    elif chart["unit"] == "%":
        # The space below is for the note. 103, so that a line at 100% can be seen.
        axes.set_ylim(max(0.0, min(values) - 14), min(103.0, max(values) + 8))
    elif chart["name"] == "loss":
        # The optimum of the distillation is a loss of 0, so the axis begins there.
        axes.set_ylim(min(0.0, *values), max(1.05 * max(values), 1e-9))


def _draw_levels(axes: Axes, levels: Sequence[Mapping[str, Any]], unit: str, last: int) -> None:
    """Draw the models that were evaluated at the end, with their names at the right edge."""
    for level in levels:
        colour = _MODELS[level["model"]]
        # The distilled model is the end of the curve. The others are no part of it.
        if level["model"] == "distilled":
            diamond: dict[str, Any] = {"marker": "D", "markersize": 6, "zorder": 5}
            axes.plot([last], [level["value"]], color=colour, clip_on=False, **diamond)
        else:
            axes.axhline(level["value"], color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
    # From below: a name that would overlap the one before it is moved up.
    lowest = float("-inf")
    form = "{:.1f}" if unit == "%" else "{:.2g}"
    for level in sorted(levels, key=lambda one: float(one["value"])):
        # As a share of the height of the axes, because the scale may be logarithmic.
        place = axes.transScale.transform((0, level["value"]))
        height = max(float(axes.transLimits.transform(place)[1]), lowest)
        lowest = height + _NAME_HEIGHT
        text = f"{short_name(level)} {form.format(level['value'])}"
        style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": _MODELS[level["model"]]}
        axes.text(1.015, height, text, transform=axes.transAxes, **style)


def short_name(level: Mapping[str, Any]) -> str:
    """Return the name of a model at the edge of a chart, with a mark if it is an earlier one."""
    mark = "earlier: " if "earlier" in level["title"] else ""
    return mark + _SHORT[level["model"]]


def _draw_models(axes: Axes, levels: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw the models of several runs side by side."""
    models = list(dict.fromkeys(level["title"] for level in levels))
    for index, name in enumerate(names):
        own = [level for level in levels if level["source"] == index]
        places = [models.index(level["title"]) for level in own]
        values = [level["value"] for level in own]
        axes.plot(places, values, "o", color=COLOURS[index % len(COLOURS)], label=name)
    axes.set_xticks(range(len(models)), models, rotation=20, ha="right")


def _note(axes: Axes, chart: Mapping[str, Any]) -> None:
    """Say in the picture on how many prompts a point stands, and what the band is."""
    sizes = {size for line in chart["series"] for size in line.get("n", ())}
    bands = {line["band"] for line in chart["series"] if "band" in line}
    told = [f"at each sync: {sizes.pop()} prompts"] if len(sizes) == 1 else []
    told += [f"band: {name}" for name in sorted(bands)]
    if told:
        text = ", ".join(told)
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize=7.5, color=_MUTED)


def label_axes(axes: Axes, x_title: str, unit: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x_title, fontsize=8.5, color=_MUTED)
    axes.set_ylabel(unit, fontsize=8.5, color=_MUTED)


def style_axes(axes: Axes, title: str) -> None:
    """Set what all panels have in common."""
    axes.set_title(
        "\n".join(textwrap.wrap(title, _TITLE_WIDTH)), loc="left", fontsize=9.5, color=INK
    )
    axes.tick_params(which="both", labelsize=8, colors=_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # The names of the models stand at the right edge.
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
