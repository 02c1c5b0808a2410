"""The learning curve of a run as a picture: the four charts of the report that say whether it went.

They are the loss, the reverse KL on the training rollouts, the reverse KL on the held-out prompts,
and the accuracy at each weight sync. The last two show the models that were evaluated at the end. A
task without a verifier has lengths in place of accuracy. ``lopd run`` and ``lopd report --png``
both draw it here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd.artifacts import publish_bytes
from lopd.config.distill import LOSS_TITLES
from lopd.errors import DataError
from lopd.report.html.chart_picture import INK, draw_chart, last_step, new_figure
from lopd.report.html.curves import HELD_OUT_REVERSE_KL, charts_of
from lopd.report.html.source import Source, read_json
from lopd.report.metrics import METRICS

PICTURE = "learning_curve.png"
_WIDTH = 4.6
_HEIGHT = 4.3
_DPI = 130
_KEY = "distill.objective.loss"


def draw_learning_curve(run_dir: Path, *, title: str) -> Path:
    """Draw learning_curve.png into the run directory, and return its path.

    Args:
        run_dir: The run directory.
        title: The title of the picture: which loss the student has learned by.

    Raises:
        DataError: distill has no metrics that could be drawn.
    """
    # While a run trains it has no summary yet, and the picture has no final models.
    source = Source(run_dir, run_dir.name, "run", {}, read_json(run_dir / "summary.json"), {})
    charts = learning_charts(charts_of([source]))
    # A curve without a single step would be an empty picture.
    if not any(chart["series"] for chart in charts):
        raise DataError(
            "there are no training metrics of the stage distill",
            where=str(run_dir / METRICS),
            remedy="run the stage distill first",
        )
    path = run_dir / PICTURE
    publish_bytes(path, render_learning_curve(charts, title=title))
    return path


def learning_charts(charts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the charts of the learning curve that a run has something for, from left to right."""
    of_distill = {chart["name"]: chart for chart in charts if chart["stage"] == "distill"}
    wanted = ["loss", "reverse_kl", HELD_OUT_REVERSE_KL]
    # A task without a verifier has no accuracy.
    wanted.append("accuracy" if "accuracy" in of_distill else "response_len")
    return [of_distill[name] for name in wanted if name in of_distill]


def learning_title(loss: str) -> str:
    """Return the title of the picture, by the name of the loss in the configuration."""
    return f"Distillation by {LOSS_TITLES.get(loss, loss)}" if loss else "Distillation"


def title_of(source: Source) -> str:
    """Return the title of a run's learning curve."""
    return learning_title(str(source.config.get(_KEY, "")))


def render_learning_curve(charts: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """Return the picture as PNG.

    Args:
        charts: Those of learning_charts(), of one run.
        title: The title of the picture.
    """
    figure = new_figure(_WIDTH * len(charts), _HEIGHT, _DPI)
    panels = figure.subplots(1, len(charts), squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    for axes, chart in zip(panels, charts, strict=True):
        draw_chart(axes, chart, [""], last=last_step(charts))
    # In memory, because publish_bytes() needs the whole file.
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "lopd report"})
    return picture.getvalue()
