"""The curves of a run: the figures of metrics.jsonl, and of the models evaluated at the end.

The page, its pictures and the learning curve of a run are all drawn from these charts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lopd.report.console import MODEL_TITLES
from lopd.report.html.outdated import earlier_models
from lopd.report.html.source import Source
from lopd.report.metrics import read_metrics

# Of a normal distribution: 95% lie within so many standard deviations.
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart.

    Attributes:
        name: The figure in metrics.jsonl.
        title: What it is, and on what it was measured.
        unit: Its unit, which stands at the axis.
        kind: "train" for a figure of each step, "eval" for one of each sync, "final" for one of the
            models that were evaluated at the end.
        stage: The stage.
        group: "main" for the charts that are shown at once, "more" for the others.
        scale: The factor from the figure to the unit.
        log: Whether the axis is logarithmic.
        spread: The figure with its standard deviation over tokens; "" where there is none.
        levels: The figure of the evaluated models in summary.json; "" where there is none.
        zero: Whether a curve that is 0 at every step says something.
        parts: The figures of several lines with their names; () where the chart has one line.
    """

    name: str
    title: str
    unit: str
    kind: str = "train"
    stage: str = "distill"
    group: str = "main"
    scale: float = 1.0
    log: bool = False
    spread: str = ""
    levels: str = ""
    zero: bool = False
    parts: tuple[tuple[str, str], ...] = ()


_NATS = "nats per token"
HELD_OUT_REVERSE_KL = "held_out_reverse_kl"
PANELS = (
    Panel("loss", "Loss of distill", "nats", zero=True),
    Panel(
        "reverse_kl",
        "Reverse KL on the training rollouts (frozen responses, weighted by importance)",
        _NATS,
        log=True,
    ),
    Panel(
        HELD_OUT_REVERSE_KL,
        "Reverse KL on the held-out prompts (fresh responses of each model, at the end)",
        _NATS,
        "final",
        log=True,
        levels="reverse_kl",
    ),
    Panel(
        "accuracy",
        "Accuracy on held-out prompts at each weight sync",
        "%",
        "eval",
        scale=100,
        levels="accuracy",
        zero=True,
    ),
    Panel(
        "advantage",
        "Advantage: log pi_teacher - log pi_student, mean and spread (one standard deviation)",
        "nats",
        spread="advantage_std",
    ),
    Panel(
        "advantage_by_quantile",
        "Advantage by quantile: a share of the tokens of a step is below",
        "nats",
        parts=(
            ("advantage_p01", "1% of the tokens are below"),
            ("advantage_p05", "5% are below"),
            ("advantage_p50", "half are below"),
            ("advantage_p95", "95% are below"),
            ("advantage_p99", "99% are below"),
        ),
    ),
    Panel(
        "effective_sample_share", "Effective sample share: 1 is no drift from the rollouts", "share"
    ),
    Panel("grad_norm", "Gradient norm", "L2 norm"),
    Panel("clipped_share", "Share of tokens beyond the clip of the advantage", "%", scale=100),
    Panel("response_len", "Length of held-out responses at each weight sync", "tokens", "eval"),
    Panel("truncated_share", "Held-out responses cut off at each sync", "%", "eval", scale=100),
    Panel("student_entropy", "Entropy of the student on the training rollouts", _NATS),
    Panel(
        "training_reverse_kl",
        "Reverse KL on the training rollouts, mean of the steps between two syncs",
        _NATS,
        "eval",
        group="more",
        log=True,
    ),
    Panel("chi_square", "Chi-square of the drift from the rollouts", "ratio", group="more"),
    Panel("end_token_advantage", "Advantage of end tokens", "nats", group="more"),
    Panel("gradient_gap", "Gap between the offline and the online gradient", "nats", group="more"),
    Panel("expert_max_load", "Load of the busiest expert over the mean", "ratio", group="more"),
    Panel("expert_entropy_share", "Evenness of the experts' load", "1 is even", group="more"),
    Panel("expert_dropped_share", "Choices of experts dropped", "%", group="more", scale=100),
    Panel("lr", "Learning rate", "per update", group="more"),
    Panel("processed_tokens_per_s", "Speed of the trainer", "tokens per second", group="more"),
    Panel("seconds", "Duration of a step", "seconds", group="more"),
    Panel("peak_memory_gib", "Peak memory of a rank", "GiB", group="more"),
    Panel("loss", "Loss of sft", "nats", stage="sft", group="more"),
    Panel("grad_norm", "Gradient norm of sft", "L2 norm", stage="sft", group="more"),
    Panel("loss", "Loss of SFT of equal compute", "nats", stage="sft_longer", group="more"),
)


def charts_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return each chart for which a run has figures, as JSON.

    Returns:
        The fields of the panel, and ``series``: of each source with figures its ``source`` (index),
        ``x`` (steps), ``y``, where they are known ``low`` and ``high`` of a band with its name
        ``band``, and ``n``, the number of prompts behind each point. ``levels`` has the models that
        were evaluated at the end: ``source``, ``model``, ``title``, ``value``, ``low``, ``high``
        (95%) and ``n``.
    """
    charts = []
    # Read once: a long training has megabytes of metrics.
    lines = [read_metrics(source.folder) if source.kind == "run" else [] for source in sources]
    titles = [{**MODEL_TITLES, **earlier_models(source, "evaluate")} for source in sources]
    for panel in PANELS:
        series = []
        levels = []
        for index, (source, rows) in enumerate(zip(sources, lines, strict=True)):
            for name, label in panel.parts or ((panel.name, ""),):
                found = _series(panel, name, rows)
                if found:
                    series.append({"source": index, **({"label": label} if label else {}), **found})
            found_levels = _levels(panel, source.summary, titles[index])
            levels += [{"source": index, **level} for level in found_levels]
        # Most figures that are 0 at every step say nothing, such as an entropy that was not asked
        # for.
        if levels or any(panel.zero or any(one["y"]) for one in series):
            charts.append(
                {
                    "name": panel.name,
                    "stage": panel.stage,
                    "title": panel.title,
                    "unit": panel.unit,
                    "x_title": "optimizer step",
                    "group": panel.group,
                    "log": panel.log,
                    "series": series,
                    "levels": levels,
                }
            )
    return charts


def _series(panel: Panel, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [
        row
        for row in rows
        if row["kind"] == panel.kind and row["stage"] == panel.stage and row.get(name) is not None
    ]
    # A figure without any token behind it is 0 and not known.
    if name == "student_entropy":
        own = [row for row in own if row.get("num_entropy_tokens")]
    if not own:
        return {}
    found: dict[str, Any] = {
        "x": [row["step"] for row in own],
        "y": [round(row[name] * panel.scale, 6) for row in own],
    }
    if all(row.get("num_prompts") for row in own):
        found["n"] = [int(row["num_prompts"]) for row in own]
    return {**found, **_band(panel, own)}


def _band(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the band around a curve: a 95% interval, or one standard deviation over tokens."""
    intervals = [row.get(f"{panel.name}_interval") for row in rows]
    name = "95% interval"
    if not all(intervals) and panel.spread:
        name = "one standard deviation"
        spreads = [row.get(panel.spread) for row in rows]
        intervals = [
            None if size is None else (row[panel.name] - size, row[panel.name] + size)
            for row, size in zip(rows, spreads, strict=True)
        ]
    if not all(intervals):
        return {}
    return {
        "band": name,
        "low": [round(panel.scale * low, 6) for low, _ in filter(None, intervals)],
        "high": [round(panel.scale * high, 6) for _, high in filter(None, intervals)],
    }


def _levels(
    panel: Panel, summary: Mapping[str, Any], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the models that were evaluated at the end, with their titles."""
    values = summary.get(panel.levels, {}) if panel.levels else {}
    intervals = summary.get(f"{panel.levels}_interval", {})
    errors = summary.get(f"{panel.levels}_standard_error", {})
    rows = []
    for model, title in titles.items():
        value = values.get(model)
        # The teacher's divergence from itself is rounding. Another one that is estimated as 0 or
        # less is a result, and makes the axis linear.
        if value is None or (panel.log and model == "teacher"):
            continue
        error = errors.get(model)
        ends = intervals.get(model)
        if ends is None and error is not None:
            ends = (value - _Z * error, value + _Z * error)
        row = {"model": model, "title": title, "value": panel.scale * value}
        if ends is not None:
            low, high = ends
            # A normal interval may go below 0, and a divergence does not.
            low = min(max(low, 0.0), value)
            row |= {"low": panel.scale * low, "high": panel.scale * high}
        if values.get("num_prompts"):
            row["n"] = values["num_prompts"]
        rows.append(row)
    return rows
