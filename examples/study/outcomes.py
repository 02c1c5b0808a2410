"""Outcomes of comparisons, in words and tables, for the claims whose arms are held against others.

The margin is named here, before any figure: equal means within MARGIN of accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.study import arms as shared
from examples.study.arms import Arm
from examples.study.figures import Figures, Interval, MissingFigures

# Shares of right answers: 2 points.
MARGIN = 0.02
ACCURACIES = ("sampled", "greedy")
KL = "reverse_kl"
_HEAD = "| model | seeds | greedy, % | T=1, % | reverse KL, nats per token |"
_RULE = "|---|---:|---:|---:|---:|"
_AGAINST_HEAD = "| {} | greedy, points | T=1, points | reverse KL, nats per token | outcome |"
_AGAINST_RULE = "|---|---:|---:|---:|---|"


def measured(figures: Figures, arms: Iterable[Arm]) -> list[Arm]:
    """Return the arms that are measured in at least two seeds."""
    found = []
    for arm in arms:
        try:
            for metric in (*ACCURACIES, KL):
                figures.values(arm.name, metric)
        except MissingFigures:
            continue
        found.append(arm)
    return found


def matches(figures: Figures, arm: str, other: str) -> str:
    """Return how an arm stands to a method that it may turn out to match.

    Returns:
        "matches": both accuracies are shown to be less than MARGIN below the other's, or above it.
        "below": one of them is shown to be lower. "open": neither is shown.
    """
    accuracies = [figures.difference(arm, other, metric) for metric in ACCURACIES]
    if all(one.low > -MARGIN for one in accuracies):
        return "matches"
    return "below" if any(one.high < 0 for one in accuracies) else "open"


def changes(figures: Figures, arm: str, other: str) -> str:
    """Return what a change has done to a method.

    Returns:
        "harm", "gain" or "mixed": an accuracy or the reverse KL is shown to be worse, better, or
        one of them worse and another better. "equal": none is, and both accuracies are shown to be
        within MARGIN. "open": nothing is shown.
    """
    accuracies = [figures.difference(arm, other, metric) for metric in ACCURACIES]
    divergence = figures.difference(arm, other, KL)
    is_worse = divergence.low > 0 or any(one.high < 0 for one in accuracies)
    is_better = divergence.high < 0 or any(one.low > 0 for one in accuracies)
    if is_worse or is_better:
        return "mixed" if is_worse and is_better else "harm" if is_worse else "gain"
    within = all(one.low > -MARGIN and one.high < MARGIN for one in accuracies)
    return "equal" if within else "open"


def points(interval: Interval) -> str:
    """Return a difference of accuracies in points: "+1.2 [-0.3, +2.7]"."""
    return _text(interval, "+.1f", 100)


def percent(interval: Interval) -> str:
    """Return an accuracy in percent: "92.3 [91.0, 93.6]"."""
    return _text(interval, ".1f", 100)


def nats(interval: Interval, *, sign: bool = False) -> str:
    """Return a reverse KL or a difference of two, in nats per token."""
    return _text(interval, "+.4f" if sign else ".4f", 1)


def _text(interval: Interval, form: str, scale: float) -> str:
    mean, low, high = (scale * one for one in (interval.mean, interval.low, interval.high))
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def differences(figures: Figures, arm: str, other: str) -> str:
    """Return arm - other in words: "T=1 +1.2 [..], greedy -0.1 [..] points, reverse KL .. nats"."""
    sampled, greedy = (points(figures.difference(arm, other, one)) for one in ACCURACIES)
    divergence = nats(figures.difference(arm, other, KL), sign=True)
    return f"T=1 {sampled}, greedy {greedy} points, reverse KL {divergence} nats"


def table(figures: Figures, arms: Sequence[Arm]) -> str:
    """Return a table with a line for each arm: means over seeds with 95% intervals."""
    lines = [_HEAD, _RULE]
    for arm in arms:
        greedy, sampled = (figures.mean(arm.name, metric) for metric in ("greedy", "sampled"))
        cells = (percent(greedy), percent(sampled), nats(figures.mean(arm.name, KL)))
        lines.append(f"| {arm.title} | {sampled.num_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_against(
    figures: Figures, arms: Sequence[Arm], other: Arm, outcomes: dict[str, str]
) -> str:
    """Return a table of differences to another arm, paired by seed, with 95% intervals.

    Args:
        figures: What was measured.
        arms: The arms of the lines.
        other: The arm that is subtracted.
        outcomes: The last column, by the name of the arm.
    """
    lines = [_AGAINST_HEAD.format(f"minus {other.title}"), _AGAINST_RULE]
    for arm in arms:
        cells = [
            points(figures.difference(arm.name, other.name, "greedy")),
            points(figures.difference(arm.name, other.name, "sampled")),
            nats(figures.difference(arm.name, other.name, KL), sign=True),
        ]
        lines.append(f"| {arm.title} | {' | '.join(cells)} | {outcomes[arm.name]} |")
    return "\n".join(lines)


def recorded(arm: str, file: str) -> list[dict[str, Any]]:
    """Return what the runs of an arm have written into a JSON file, of each seed that has it."""
    paths = sorted(Path(shared.RUNS).glob(f"seed-*/{arm}/{file}"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def table_of_caches(arms: Sequence[Arm], file: str) -> str:
    """Return a table of what altered caches hold before any update, as means over seeds.

    Args:
        arms: Arms that learn from an altered cache. One without a cache has no line.
        file: The manifest of the cache, below the run of an arm.
    """
    lines = [
        "| model | tokens with loss, % | mean advantage, nats | beyond 10 nats, % | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in arms:
        found = [manifest["extra"]["altered"] for manifest in recorded(arm.name, file)]
        found = [one for one in found if "loss_tokens" in one]
        if not found:
            continue
        with_loss = fmean(100 * one["loss_tokens"] / one["tokens"] for one in found)
        mean = fmean(one["mean_advantage"] for one in found)
        beyond = fmean(100 * one["share_beyond_10"] for one in found)
        lines.append(
            f"| {arm.title} | {with_loss:.2f} | {mean:.2f} | {beyond:.2f} | {len(found)} |"
        )
    return "\n".join(lines)
