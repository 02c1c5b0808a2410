"""The learning curve of a run as a picture.

It has a panel for each figure that the run has: the loss, the reverse KL on the training rollouts,
the reverse KL on the held-out prompts, and the accuracy at each weight sync. The last two show the
models that were evaluated at the end. A task without a verifier has lengths in place of accuracy.
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
# The panels and their titles.
PANELS = {
    "loss": "loss",
    "training_reverse_kl": (
        "reverse KL on the training rollouts, nats per token\n"
        "(frozen responses, weighted by importance)"
    ),
    "held_out_reverse_kl": (
        "reverse KL on the held-out prompts, nats per token\n"
        "(fresh responses of each model, at the end)"
    ),
    "accuracy": "accuracy on held-out prompts, %",
    "response_len": "tokens of a response to the held-out prompts",
}
# The names of the models at the right edge, where there is little space.
_SHORT = {
    **{name: title.replace(" student", "") for name, title in MODEL_TITLES.items()},
    "sft_longer": "SFT longer",
}


def draw_learning_curve(run_dir: Path, *, title: str, stage: str = "distill") -> Path:
    """Draw learning_curve.png into the run directory, and return its path.

    The picture is made from metrics.jsonl, and from summary.json if it is there.

    Args:
        run_dir: The run directory.
        title: The title of the picture: which loss the student has learned by.
        stage: The stage whose steps are drawn.

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

    panels = panels_of(evals, summary)
    # Without pyplot, which keeps every figure in a global list and looks for a display.
    size = (4.6 * len(panels), 4.3)
    figure = Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")
    # Agg draws pixels in memory. It needs no window system.
    FigureCanvasAgg(figure)
    axes_of = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    # All panels have the same axis, so that they can be read across.
    last_step = max(row["step"] for row in train)
    for panel, axes in axes_of.items():
        # Each says what its figure was measured on: prompts, and whose responses.
        axes.set_title(PANELS[panel], loc="left", fontsize=10, color=_INK)
        if panel == "loss":
            _draw_loss(axes, train)
        elif panel == "training_reverse_kl":
            _draw_training_divergence(axes, train)
        elif panel == "held_out_reverse_kl":
            _draw_held_out_divergence(axes, summary["reverse_kl"], last_step)
        elif panel == "accuracy":
            _draw_accuracy(axes, evals, summary.get("accuracy", {}), last_step)
        else:
            _draw_lengths(axes, evals)
        _style(axes, last_step)
    # In memory, because publish_bytes() needs the whole file.
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def panels_of(evals: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the panels that a run has something for, from left to right."""
    panels = ["loss", "training_reverse_kl"]
    # Two metrics: one is of old responses to training prompts, the other of fresh responses to
    # other prompts. They may differ many times over, so one axis would set them against each other.
    if _models(summary.get("reverse_kl", {})):
        panels.append("held_out_reverse_kl")
    if summary.get("accuracy") or _series(evals, "accuracy")[0]:
        panels.append("accuracy")
    elif _series(evals, "response_len")[0]:
        panels.append("response_len")
    return panels


def _draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    steps, values = _series(train, "loss")
    _plot_steps(axes, steps, values)
    # The optimum of the distillation is a loss of 0, so the axis begins there.
    if values:
        axes.set_ylim(bottom=min(0.0, min(values)))


def _draw_training_divergence(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    _logarithmic(axes)
    steps, values = _series([row for row in train if _is_positive(row)], "reverse_kl")
    if values:
        _plot_steps(axes, steps, values)
        axes.set_ylim(min(values) / 2, max(values) * 2)


def _draw_held_out_divergence(axes: Axes, models: Mapping[str, Any], last_step: int) -> None:
    # The divergence falls by orders of magnitude. On a linear axis its end would be a flat line.
    _logarithmic(axes)
    # The teacher's divergence from itself is rounding.
    final = _models(models).items()
    levels = {name: value for name, value in final if name != "teacher" and value > 0}
    if levels:
        axes.set_ylim(min(levels.values()) / 2, max(levels.values()) * 2)
    _draw_levels(axes, levels, last_step, "{:.2g}")


def _draw_lengths(axes: Axes, evals: Sequence[Mapping[str, Any]]) -> None:
    steps, values = _series(evals, "response_len")
    axes.plot(steps, values, color=_COLOURS["distilled"], marker="o", markersize=5, linewidth=1.6)
    axes.set_ylim(bottom=0.0)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    # 0.01 is easier to read than 10 to the power of -2.
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")


def _draw_accuracy(
    axes: Axes, evals: Sequence[Mapping[str, Any]], models: Mapping[str, Any], last_step: int
) -> None:
    steps, values = _series(evals, "accuracy")
    percents = [100 * value for value in values]
    if percents:
        colour = _COLOURS["distilled"]
        axes.plot(steps, percents, color=colour, marker="o", markersize=5, linewidth=1.6)
    _draw_accuracy_band(axes, evals)
    # The teacher is shown here: its accuracy is what the student can reach.
    levels = {name: 100 * value for name, value in _models(models).items()}
    everything = [*percents, *levels.values()]
    # The space below is for the note on the band. 103, so that a line at 100% can be seen.
    if everything:
        axes.set_ylim(max(0.0, min(everything) - 14), min(103.0, max(everything) + 8))
    _draw_levels(axes, levels, last_step, "{:.1f}")


def _draw_accuracy_band(axes: Axes, evals: Sequence[Mapping[str, Any]]) -> None:
    """Draw the 95% intervals of the shares of right answers, which the syncs have written."""
    rows = [row for row in evals if row.get("accuracy_interval") is not None]
    sizes = {row["num_prompts"] for row in rows}
    # The note needs one number of prompts for all points.
    if len(sizes) != 1:
        return
    steps = [row["step"] for row in rows]
    low = [100 * row["accuracy_interval"][0] for row in rows]
    high = [100 * row["accuracy_interval"][1] for row in rows]
    axes.fill_between(steps, low, high, color=_COLOURS["distilled"], alpha=0.15, linewidth=0)
    note = f"at each sync: {sizes.pop()} prompts, band: 95% interval"
    axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=7.5, color=_MUTED)


def _models(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the models that have one."""
    return {name: float(figures[name]) for name in MODEL_TITLES if figures.get(name) is not None}


def _draw_levels(axes: Axes, levels: Mapping[str, float], last_step: int, form: str) -> None:
    """Draw the models that were evaluated at the end, with their names at the right edge.

    Args:
        form: The format of the metrics.
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
    """Set what the panels have in common."""
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
