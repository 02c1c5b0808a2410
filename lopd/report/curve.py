"""The learning curve as a picture: loss, reverse KL, and accuracy at each weight sync, beside the
models that were evaluated at the end.
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
_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = {
    "distilled": "#0b6e4f",
    "teacher": "#7a3e9d",
    "sft": "#c2571a",
    "sft_longer": "#b3831f",
    "base": "#8a8f98",
}
_SHORT = {
    **{name: title.replace(" student", "") for name, title in MODEL_TITLES.items()},
    "sft_longer": "SFT longer",
}


def draw_learning_curve(
    run_dir: Path, *, stage: str = "distill", title: str = "Lightning OPD"
) -> Path:
    """Draws run_dir/learning_curve.png from metrics.jsonl and, where it is there, summary.json;
    returns its path. DataError: the stage has no metrics.
    """
    train, evals = (
        read_metrics(run_dir, kind="train", stage=stage),
        read_metrics(run_dir, kind="eval", stage=stage),
    )
    if not train:
        raise DataError(
            f"no training metrics of stage {stage}",
            where=str(run_dir / METRICS),
            remedy=f"run the stage {stage} first",
        )
    summary_file = run_dir / "summary.json"
    summary: dict[str, Any] = (
        json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    )
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
    """The picture as PNG. train, evals: lines of metrics.jsonl; summary: as in summary.json, may be
    empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(13.5, 4.3), dpi=130, layout="constrained", facecolor="white"
    )  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    loss, divergence, accuracy = figure.subplots(1, 3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    last_step = max(row["step"] for row in train)
    _draw_loss(loss, train)
    _draw_divergence(divergence, train, evals, summary.get("reverse_kl", {}), last_step)
    _draw_accuracy(accuracy, evals, summary.get("accuracy", {}), last_step)
    for axes in (loss, divergence, accuracy):
        _dress(axes, last_step)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    steps, values = _series(train, "loss")
    axes.plot(
        steps,
        values,
        color=_COLOURS["distilled"],
        marker=_marker(steps),
        markersize=3,
        linewidth=1.6,
    )
    axes.set_title("loss", loc="left", fontsize=10, color=_INK)
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
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    steps, values = _series(
        [row for row in train if (row.get("reverse_kl") or 0) > 0], "reverse_kl"
    )  # a log scale has no place for 0
    if values:
        label = "in training, from the frozen rollouts"
        axes.plot(
            steps,
            values,
            color=_COLOURS["distilled"],
            marker=_marker(steps),
            markersize=3,
            linewidth=1.6,
            label=label,
        )
    at_sync, synced = _series(
        [row for row in evals if (row.get("reverse_kl") or 0) > 0], "reverse_kl"
    )
    if synced:
        axes.plot(
            at_sync,
            synced,
            color=_INK,
            marker="o",
            markersize=5,
            linestyle="none",
            label="at a sync, from fresh responses",
        )
    levels = {
        name: value for name, value in _models(models).items() if name != "teacher" and value > 0
    }
    everything = [*values, *synced, *levels.values()]
    if everything:
        axes.set_ylim(min(everything) / 3, max(everything) * 2)  # the legend stands below the curve
    _levels(axes, levels, last_step, "{:.2g}")
    if values or synced:
        axes.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=_INK)


def _draw_accuracy(
    axes: Axes, evals: Sequence[Mapping[str, Any]], models: Mapping[str, Any], last_step: int
) -> None:
    axes.set_title("accuracy on held-out prompts, %", loc="left", fontsize=10, color=_INK)
    steps, values = _series(evals, "accuracy")
    if values:
        axes.plot(
            steps,
            [100 * value for value in values],
            color=_COLOURS["distilled"],
            marker="o",
            markersize=5,
            linewidth=1.6,
        )
    sizes = {row["num_prompts"] for row in evals if row.get("num_prompts")}
    if values and len(sizes) == 1:
        size = sizes.pop()
        band = [100 * ((value * (1 - value)) / size) ** 0.5 for value in values]
        low, high = (
            [100 * value + sign * half for value, half in zip(values, band, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(steps, low, high, color=_COLOURS["distilled"], alpha=0.15, linewidth=0)
        axes.text(
            0.02,
            0.02,
            f"at each sync: {size} prompts, band ± one standard error",
            transform=axes.transAxes,
            fontsize=7.5,
            color=_MUTED,
        )
    levels = {name: 100 * value for name, value in _models(models).items()}
    everything = [100 * value for value in values] + list(levels.values())
    if everything:
        axes.set_ylim(max(0.0, min(everything) - 14), min(103.0, max(everything) + 8))
    _levels(axes, levels, last_step, "{:.1f}")


def _models(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(figures[name]) for name in MODEL_TITLES if figures.get(name) is not None}


def _levels(axes: Axes, levels: Mapping[str, float], last_step: int, form: str) -> None:
    """Dashed lines for the models evaluated at the end, named at the right edge; names are moved
    apart where they would overlap.
    """
    for name, value in levels.items():
        if name == "distilled":
            axes.plot(
                [last_step],
                [value],
                marker="D",
                markersize=6,
                color=_COLOURS[name],
                clip_on=False,
                zorder=5,
            )
        else:
            axes.axhline(
                value, color=_COLOURS[name], linewidth=1.2, linestyle=(0, (5, 3)), zorder=1
            )
    low = float("-inf")
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        place = float(
            axes.transLimits.transform(axes.transScale.transform((0, value)))[1]
        )  # share of the axes' height
        place = low = max(place, low + 0.062)
        axes.text(
            1.015,
            place,
            f"{_SHORT[name]} {form.format(value)}",
            transform=axes.transAxes,
            va="center",
            fontsize=8,
            color=_COLOURS[name],
        )


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in known], [float(row[name]) for row in known]


def _marker(steps: Sequence[int]) -> str:
    return "o" if len(steps) <= 60 else ""


def _dress(axes: Axes, last_step: int) -> None:
    axes.set_xlabel("optimizer step", color=_MUTED, fontsize=9)
    axes.set_xlim(-0.02 * last_step, last_step * 1.02)
    axes.tick_params(which="both", colors=_MUTED, labelsize=8.5)
    if not axes.has_data():
        axes.set_yticks([], minor=False)
        axes.set_yticks([], minor=True)
        axes.text(
            0.5,
            0.5,
            "not measured",
            transform=axes.transAxes,
            ha="center",
            fontsize=10,
            color=_MUTED,
        )
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
