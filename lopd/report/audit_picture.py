"""The picture of an audit: where the drift of log p + entropy comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BLUE = "#2a78d6"
_INK = "#3a3a38"
# The band within which the means of a true teacher are about 95% of the time.
_BAND_ERRORS = 2


def draw_audit(result: Mapping[str, Any], path: Path) -> None:
    """Draw the mean drift by position, by entropy and by kind of the token before.

    A band of two standard errors shows where text of the teacher itself would be.

    Args:
        result: An audit as JSON.
        path: The picture. Its ending decides the format.
    """
    panels = [
        ("by position in the response, tokens, from", result["by_position"]),
        ("by the teacher's entropy, nats, from", result["by_entropy"]),
    ]
    # Without a tokenizer there are no kinds.
    if result["by_kind"]:
        panels.append(("by kind of the token before", result["by_kind"]))
    # As wide as it has panels. Without pyplot, which keeps every figure in a global list.
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for index, (title, points) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), index + 1), title, points)
    mean = f"mean {result['mean']:+.5f} ± {result['standard_error']:.5f} nats per token"
    heading = f"{result['verdict']}: z = {result['z']:+.2f}, {mean}, {result['tokens']:,} tokens"
    figure.suptitle(heading, fontsize=11, color=_INK, x=0.01, ha="left")
    # The picture may be asked for in a folder that does not exist yet.
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, title: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw one curve."""
    places = list(range(len(points)))
    means = [point["mean"] for point in points]
    band = [_BAND_ERRORS * point["standard_error"] for point in points]
    # A bar from -band to +band for each group. The errors of neighbours may differ much, so a
    # filled area between them would mislead.
    heights = [2 * value for value in band]
    lower = [-value for value in band]
    own_text = "the teacher's own text"
    axes.bar(places, heights, bottom=lower, width=0.8, color=_BLUE, alpha=0.15, label=own_text)
    dots: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none", "color": _BLUE}
    axes.plot(places, means, label="these responses", **dots)
    # Zero is where the mean of a true teacher is.
    axes.axhline(0, color=_INK, linewidth=0.8)
    names = [point["name"] for point in points]
    axes.set_xticks(places, names, fontsize=8, rotation=45 if len(points) > 8 else 0)
    # Errors of the groups differ by orders of magnitude. The scale is linear within the smallest
    # band and logarithmic outside of it.
    smallest = min((value for value in band if value > 0), default=1e-3)
    axes.set_yscale("symlog", linthresh=max(1e-5, smallest))
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_ylabel("mean of log p + entropy, nats", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
