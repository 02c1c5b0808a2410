"""Curves of fresh responses: those of the rollouts at the start, and those of each refresh.

The teacher has scored them as the student of that step wrote them. The mean of
log pi_student - log pi_teacher over them is the reverse KL on fresh responses, without weights, if
they were sampled at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopd.artifacts import read_manifest
from lopd.report.html.responses import answers_of
from lopd.report.html.source import Source, read_json
from lopd.report.html.transcripts import Scanned

# The quantiles that are drawn over the steps.
_SHARES = (0.01, 0.05, 0.5, 0.95, 0.99)


def fresh_charts(scans: Sequence[Sequence[Scanned]]) -> list[dict[str, Any]]:
    """Return the charts of the runs that have refreshed their rollouts, as lopd.report.html.curves.

    Args:
        scans: All responses of each source.
    """
    of_runs = [(index, _by_step(found)) for index, found in enumerate(scans)]
    of_runs = [(index, steps) for index, steps in of_runs if len(steps) > 1]
    if not of_runs:
        return []
    divergence = [
        {
            "source": index,
            "x": [step for step, _ in steps],
            "y": [round(-found.deviations.mean, 6) for _, found in steps],
        }
        for index, steps in of_runs
        if all(_is_policy(found) for _, found in steps)
    ]
    quantiles = [
        {
            "source": index,
            "label": f"{share:.0%} of the tokens are below",
            "x": [step for step, _ in steps],
            "y": [round(found.deviations.quantile(share), 4) for _, found in steps],
        }
        for index, steps in of_runs
        for share in _SHARES
    ]
    title = "{} on fresh responses to training prompts (the rollouts and each refresh)"
    advantage = _chart("fresh_advantage", title.format("Advantage by quantile"), "nats", quantiles)
    if not divergence:
        return [advantage]
    title = title.format("Reverse KL")
    return [_chart("fresh_reverse_kl", title, "nats per token", divergence), advantage]


def refreshes_of(source: Source) -> list[dict[str, Any]]:
    """Return of each refresh of a run, as JSON, what the page says of it.

    Returns:
        step (the refresh was made after so many), responses, tokens (those that the teacher has
        scored), and seconds (those of the teacher; None where they were not recorded).
    """
    rows = []
    for answers in answers_of(source):
        if answers.is_refresh:
            manifest = read_manifest(answers.folder)
            seconds = read_json(answers.folder.parent / "seconds.json").get("teacher_seconds")
            rows.append(
                {
                    "step": answers.step,
                    "responses": manifest.rows,
                    "tokens": sum(shard.tokens for shard in manifest.shards),
                    "seconds": seconds,
                }
            )
    return rows


def _by_step(scans: Sequence[Scanned]) -> list[tuple[int, Scanned]]:
    """Return the scored responses to training prompts by the step of the weights."""
    found = [
        (one.answers.step, one)
        for one in scans
        if one.answers.step is not None and one.deviations.num_tokens
    ]
    return sorted(found, key=lambda pair: pair[0])


def _is_policy(found: Scanned) -> bool:
    """Return whether responses were sampled from the student as it was."""
    # Samples of another temperature are of another distribution, whose mean is no reverse KL.
    sampling = read_manifest(found.answers.folder).sampling
    plain = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
    return all(sampling.get(name, value) == value for name, value in plain.items())


def _chart(name: str, title: str, unit: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "stage": "distill",
        "title": title,
        "unit": unit,
        "x_title": "optimizer step",
        "group": "main",
        "log": False,
        "series": series,
        "levels": [],
    }
