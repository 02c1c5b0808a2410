"""The learning curve of a run as a picture.

It has the loss, the reverse KL and the accuracy at each weight sync, beside the models that were
evaluated at the end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import publish_bytes
from lopd.errors import DataError
from lopd.report.console import MODEL_TITLES
from lopd.report.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "learning_curve.png"
# The height of a name at the right edge, as a share of the height of the axes.
_NAME_HEIGHT = 0.062
_INK = "#1f2430"
_MUTED = "#6b7280"
_GRID = "#e5e7eb"
# The colour of each model.
_COLOURS = {
    "distilled": "#0b6e4f",
    "teacher": "#7a3e9d",
    "sft": "#c2571a",
    "sft_longer": "#b3831f",
    "base": "#8a8f98",
}
# The names of the models at the right edge, where there is little space.
_SHORT = {
    **{name: title.replace(" student", "") for name, title in MODEL_TITLES.items()},
    "sft_longer": "SFT longer",
}


def draw_learning_curve(
    run_dir: Path, *, stage: str = "distill", title: str = "Lightning OPD"
) -> Path:
    """Draw learning_curve.png into the run directory, and return its path.

    The picture is made from metrics.jsonl, and from summary.json if it is there.

    Raises:
        DataError: The stage has no metrics.
    """
    train = read_metrics(run_dir, kind="train", stage=stage)
    evals = read_metrics(run_dir, kind="eval", stage=stage)
    # A curve without a single step would be an empty picture.
    if not train:
        raise DataError(
            f"there are no training metrics of the stage {stage}",
            where=str(run_dir / METRICS),
            remedy=f"run the stage {stage} first",
        )
    # While a run trains it has no summary yet, and the picture has no final models.
    summary: dict[str, Any] = {}
    summary_file = run_dir / "summary.json"
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    path = run_dir / PICTURE
    publish_bytes(path, render_learning_curve(train, evals, summary, title=title))
    return path


def render_learning_curve(
    train: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    title: str,
) -> bytes:
    """Return the picture as PNG.

    Args:
        train: Lines of metrics.jsonl.
        evals: Lines of metrics.jsonl.
        summary: The content of summary.json. It may be empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which keeps every figure in a global list and looks for a display.
    figure = Figure(figsize=(13.5, 4.3), dpi=130, layout="constrained", facecolor="white")
    # Agg draws pixels in memory. It needs no window system.
    FigureCanvasAgg(figure)
    loss, divergence, accuracy = figure.subplots(1, 3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    # All three panels have the same axis, so that they can be read across.
    last_step = max(row["step"] for row in train)
    _draw_loss(loss, train)
    _draw_divergence(divergence, train, evals, summary.get("reverse_kl", {}), last_step)
    _draw_accuracy(accuracy, evals, summary.get("accuracy", {}), last_step)
    for axes in (loss, divergence, accuracy):
        _style(axes, last_step)
    # In memory, because publish_bytes() needs the whole file.
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    steps, values = _series(train, "loss")
    _plot_steps(axes, steps, values)
    axes.set_title("loss", loc="left", fontsize=10, color=_INK)
    # The optimum of the distillation is a loss of 0, so the axis begins there.
    if values:
        axes.set_ylim(bottom=min(0.0, min(values)))


def _draw_divergence(
    axes: Axes,
    train: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    last_step: int,
) -> None:
    axes.set_title("reverse KL to the teacher, nats per token", loc="left", fontsize=10, color=_INK)
    axes.set_yscale("log")
    # 0.01 is easier to read than 10 to the power of -2.
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    steps, values = _series([row for row in train if _is_positive(row)], "reverse_kl")
    if values:
        _plot_steps(axes, steps, values, label="in training, from the frozen rollouts")
    # The two series are not the same figure: the first weights old responses by importance, the
    # second has responses of the student as it is. So they look different.
    at_sync, synced = _series([row for row in evals if _is_positive(row)], "reverse_kl")
    if synced:
        dots: dict[str, Any] = {"color": _INK, "marker": "o", "markersize": 5, "linestyle": "none"}
        axes.plot(at_sync, synced, label="at a sync, from fresh responses", **dots)
    # The teacher's divergence from itself is rounding.
    final = _models(models).items()
    levels = {name: value for name, value in final if name != "teacher" and value > 0}
    everything = [*values, *synced, *levels.values()]
    # The space below is for the legend.
    if everything:
        axes.set_ylim(min(everything) / 3, max(everything) * 2)
    _draw_levels(axes, levels, last_step, "{:.2g}")
    if values or synced:
        axes.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=_INK)


def _draw_accuracy(
    axes: Axes, evals: Sequence[Mapping[str, Any]], models: Mapping[str, Any], last_step: int
) -> None:
    axes.set_title("accuracy on held-out prompts, %", loc="left", fontsize=10, color=_INK)
    steps, values = _series(evals, "accuracy")
    percents = [100 * value for value in values]
    if percents:
        colour = _COLOURS["distilled"]
        axes.plot(steps, percents, color=colour, marker="o", markersize=5, linewidth=1.6)
    # The band needs one number of prompts for all points.
    sizes = {row["num_prompts"] for row in evals if row.get("num_prompts")}
    if percents and len(sizes) == 1:
        _draw_accuracy_band(axes, steps, values, sizes.pop())
    # The teacher is shown here: its accuracy is what the student can reach.
    levels = {name: 100 * value for name, value in _models(models).items()}
    everything = [*percents, *levels.values()]
    # The space below is for the note on the band. 103, so that a line at 100% can be seen.
    if everything:
        axes.set_ylim(max(0.0, min(everything) - 14), min(103.0, max(everything) + 8))
    _draw_levels(axes, levels, last_step, "{:.1f}")


def _draw_accuracy_band(
    axes: Axes, steps: Sequence[int], shares: Sequence[float], num_prompts: int
) -> None:
    """Draw a band of one standard error around shares of right answers."""
    # Of a binomial share: one answer per prompt, and prompts that are independent.
    errors = [(share * (1 - share) / num_prompts) ** 0.5 for share in shares]
    pairs = list(zip(shares, errors, strict=True))
    low = [100 * (share - error) for share, error in pairs]
    high = [100 * (share + error) for share, error in pairs]
    axes.fill_between(steps, low, high, color=_COLOURS["distilled"], alpha=0.15, linewidth=0)
    note = f"at each sync: {num_prompts} prompts, band ± one standard error"
    axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=7.5, color=_MUTED)


def _models(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the models that have one."""
    return {name: float(figures[name]) for name in MODEL_TITLES if figures.get(name) is not None}


def _draw_levels(axes: Axes, levels: Mapping[str, float], last_step: int, form: str) -> None:
    """Draw the models that were evaluated at the end, with their names at the right edge.

    Args:
        form: The format of the figures.
    """
    for name, value in levels.items():
        colour = _COLOURS[name]
        # The distilled model is the end of the curve. The others are no part of it.
        if name == "distilled":
            diamond: dict[str, Any] = {
                "marker": "D",
                "markersize": 6,
                "clip_on": False,
                "zorder": 5,
            }
            axes.plot([last_step], [value], color=colour, **diamond)
        else:
            axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    # From below: a name that would overlap the one before it is moved up.
    lowest = float("-inf")
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        # As a share of the height of the axes, because the scale may be logarithmic.
        height = float(axes.transLimits.transform(axes.transScale.transform((0, value)))[1])
        height = max(height, lowest)
        lowest = height + _NAME_HEIGHT
        text = f"{_SHORT[name]} {form.format(value)}"
        style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": _COLOURS[name]}
        axes.text(1.015, height, text, transform=axes.transAxes, **style)


def _plot_steps(
    axes: Axes, steps: Sequence[int], values: Sequence[float], label: str | None = None
) -> None:
    """Draw a figure of the training over its steps."""
    # Markers show single steps. On a long run they would only make the line thick.
    marker = "o" if len(steps) <= 60 else ""
    style: dict[str, Any] = {
        "color": _COLOURS["distilled"],
        "marker": marker,
        "markersize": 3,
        "linewidth": 1.6,
    }
    axes.plot(steps, values, label=label, **style)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one figure, without the lines that do not have it."""
    known = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in known], [float(row[name]) for row in known]


def _is_positive(row: Mapping[str, Any]) -> bool:
    # A logarithmic scale has no place for 0.
    return (row.get("reverse_kl") or 0) > 0


def _style(axes: Axes, last_step: int) -> None:
    """Set what the three panels have in common."""
    axes.set_xlabel("optimizer step", color=_MUTED, fontsize=9)
    # A little space at both ends, so that the first and the last marker are whole.
    axes.set_xlim(-0.02 * last_step, last_step * 1.02)
    axes.tick_params(which="both", colors=_MUTED, labelsize=8.5)
    if not axes.has_data():
        # Numbers on an axis without data would look like a measurement.
        axes.set_yticks([], minor=False)
        axes.set_yticks([], minor=True)
        style: dict[str, Any] = {"ha": "center", "fontsize": 10, "color": _MUTED}
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, **style)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # The names of the models stand at the right edge.
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
