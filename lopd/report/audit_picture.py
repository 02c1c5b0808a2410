"""The picture of an audit: where the drift of log p + entropy comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_LINE, _BAND, _INK = "#2a78d6", "#2a78d6", "#3a3a38"


def draw_audit(result: Mapping[str, Any], path: Path) -> None:
    """Mean of log p + H by position, entropy and kind of the token before, with the band that text
    of the teacher itself stays in (2 standard errors).
    """
    panels = [
        ("by position in the response, tokens, from", result["by_position"]),
        ("by the teacher's entropy, nats, from", result["by_entropy"]),
    ]
    if result["by_kind"]:
        panels.append(("by kind of the token before", result["by_kind"]))
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for index, (title, points) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), index + 1), title, points)
    heading = f"{result['verdict']}: z = {result['z']:+.2f}, mean {result['mean']:+.5f} ± {result['standard_error']:.5f} nats per token, {result['tokens']:,} tokens"
    figure.suptitle(heading, fontsize=11, color=_INK, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, title: str, points: Sequence[Mapping[str, Any]]) -> None:
    places = list(range(len(points)))
    means, band = (
        [point["mean"] for point in points],
        [2 * point["standard_error"] for point in points],
    )
    axes.bar(
        places,
        [2 * value for value in band],
        bottom=[-value for value in band],
        width=0.8,
        color=_BAND,
        alpha=0.15,
        label="the teacher's own text",
    )
    axes.plot(
        places,
        means,
        marker="o",
        markersize=5,
        linestyle="none",
        color=_LINE,
        label="these responses",
    )
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xticks(
        places,
        [point["name"] for point in points],
        fontsize=8,
        rotation=45 if len(points) > 8 else 0,
    )
    axes.set_yscale(
        "symlog", linthresh=max(1e-5, min((value for value in band if value > 0), default=1e-3))
    )
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_ylabel("mean of log p + entropy, nats", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
