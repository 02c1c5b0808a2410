"""The picture of docs/small_student.md: the shares of right answers of every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from table import OURS, rows_of

_INK = "#3a3a38"
_COLOURS = {"greedy": "#8c8c88", "sampled": "#2a78d6"}
_TITLES = {"greedy": "greedy decoding", "sampled": "sampled at T=1"}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw a line a model, with its mean over the seeds and three standard errors on each side.

    Args:
        figures: What figures_of() of table.py has returned.
        path: The picture, an SVG file.
    """
    rows = rows_of(figures)
    figure = Figure(figsize=(8.4, 1.1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = [*range(len(rows), 0, -1)]
    for mode, colour in _COLOURS.items():
        axes.errorbar(
            [row.mean[mode] for row in rows],
            places,
            xerr=[3 * row.error[mode] for row in rows],
            fmt="o",
            markersize=6,
            linewidth=1.4,
            color=colour,
            label=_TITLES[mode],
        )
    ours = next((row for row in rows if row.name == OURS), None)
    if ours is not None:
        for mode, colour in _COLOURS.items():
            axes.axvline(ours.mean[mode], color=colour, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [row.title for row in rows], fontsize=9, color=_INK)
    axes.set_xlabel("right answers, % of 500 held-out prompts", fontsize=9, color=_INK)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file: no date, and names of parts that do not depend on chance.
    with matplotlib.rc_context({"svg.hashsalt": "lopd"}):
        # White, so that the ink can also be read on the dark pages of the site.
        figure.savefig(path, facecolor="white", metadata={"Date": None})
