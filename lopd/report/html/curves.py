"""The curves of a run, by the figures of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lopd.report.html.source import Source
from lopd.report.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart.

    Attributes:
        name: The figure in metrics.jsonl.
        title: What it is, and on what it was measured.
        unit: Its unit; "" for a pure number.
        kind: "train" for a figure of each step, "eval" for one of each sync.
        stage: The stage.
        group: "main" for the charts that are shown at once, "more" for the others.
        scale: The factor from the figure to the unit.
        log: Whether the axis is logarithmic.
    """

    name: str
    title: str
    unit: str = ""
    kind: str = "train"
    stage: str = "distill"
    group: str = "main"
    scale: float = 1.0
    log: bool = False


PANELS = (
    Panel("loss", "Loss of distill"),
    Panel(
        "reverse_kl",
        "Reverse KL on the training rollouts (frozen responses, weighted by importance)",
        "nats per token",
        log=True,
    ),
    Panel("accuracy", "Accuracy on held-out prompts at each weight sync", "%", "eval", scale=100),
    Panel("advantage", "Mean advantage: log pi_teacher - log pi_student", "nats"),
    Panel("effective_sample_share", "Effective sample share: 1 is no drift from the rollouts"),
    Panel("grad_norm", "Gradient norm"),
    Panel("clipped_share", "Share of tokens beyond the clip of the advantage", "%", scale=100),
    Panel("response_len", "Tokens of a response to held-out prompts at each sync", "", "eval"),
    Panel("truncated_share", "Held-out responses cut off at each sync", "%", "eval", scale=100),
    Panel(
        "training_reverse_kl",
        "Reverse KL on the training rollouts, mean of the steps between two syncs",
        "nats per token",
        "eval",
        group="more",
        log=True,
    ),
    Panel("advantage_std", "Spread of the advantage of a step", "nats", group="more"),
    Panel("chi_square", "Chi-square of the drift from the rollouts", group="more"),
    Panel("end_token_advantage", "Advantage of end tokens", "nats", group="more"),
    Panel("student_entropy", "Entropy of the student", "nats per token", group="more"),
    Panel("gradient_gap", "Gap between the offline and the online gradient", group="more"),
    Panel("expert_max_load", "Load of the busiest expert over the mean", group="more"),
    Panel("expert_entropy_share", "Evenness of the experts' load: 1 is even", group="more"),
    Panel("expert_dropped_share", "Choices of experts dropped", "%", group="more", scale=100),
    Panel("lr", "Learning rate", group="more"),
    Panel("processed_tokens_per_s", "Tokens per second", group="more"),
    Panel("seconds", "Duration of a step", "s", group="more"),
    Panel("peak_memory_gib", "Peak memory of a rank", "GiB", group="more"),
    Panel("loss", "Loss of sft", stage="sft", group="more"),
    Panel("grad_norm", "Gradient norm of sft", stage="sft", group="more"),
    Panel("loss", "Loss of the SFT of equal compute", stage="sft_longer", group="more"),
)


def charts_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return each chart for which a run has figures, as JSON.

    Returns:
        The fields of the panel, and ``series``: of each source with figures its ``source`` (index),
        ``x`` (steps), ``y``, and for accuracies ``low`` and ``high`` of the 95% interval.
    """
    charts = []
    # Read once: a long training has megabytes of metrics.
    lines = [read_metrics(source.folder) if source.kind == "run" else [] for source in sources]
    for panel in PANELS:
        series = []
        for index, rows in enumerate(lines):
            found = _series(panel, rows)
            if found:
                series.append({"source": index, **found})
        # A figure that is 0 at every step says nothing, such as an entropy that was not asked for.
        if any(value for one in series for value in one["y"]):
            charts.append(
                {
                    "title": panel.title,
                    "unit": panel.unit,
                    "group": panel.group,
                    "log": panel.log,
                    "series": series,
                }
            )
    return charts


def _series(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [
        row
        for row in rows
        if row["kind"] == panel.kind
        and row["stage"] == panel.stage
        and row.get(panel.name) is not None
    ]
    if not own:
        return {}
    # A figure without any token behind it is 0 and not known.
    if panel.name == "student_entropy":
        own = [row for row in own if row.get("num_entropy_tokens")]
    found: dict[str, Any] = {
        "x": [row["step"] for row in own],
        "y": [round(row[panel.name] * panel.scale, 6) for row in own],
    }
    intervals = [row.get(f"{panel.name}_interval") for row in own]
    if intervals and all(intervals):
        found["low"] = [round(panel.scale * low, 6) for low, _ in filter(None, intervals)]
        found["high"] = [round(panel.scale * high, 6) for _, high in filter(None, intervals)]
    return found
