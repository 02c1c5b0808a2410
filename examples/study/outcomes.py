"""Outcomes of comparisons, in words and tables, for the claims whose arms are held against others.

Equal means within MARGIN of accuracy, which was named before the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from examples.study.arms import Arm
from examples.study.figures import Figures, MissingFigures
from examples.study.tables import MARGIN_POINTS, nats, points

# As a share of right answers.
MARGIN = MARGIN_POINTS / 100
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


def differences(figures: Figures, arm: str, other: str) -> str:
    """Return arm - other in words: "T=1 +1.2 [..], greedy -0.1 [..] points, reverse KL .. nats"."""
    sampled, greedy = (points(figures.difference(arm, other, one)) for one in ACCURACIES)
    return f"T=1 {sampled}, greedy {greedy}, reverse KL {nats(figures.difference(arm, other, KL))}"


def table(figures: Figures, arms: Sequence[Arm]) -> str:
    """Return a table with a line for each arm: means over seeds with 95% intervals."""
    lines = [_HEAD, _RULE]
    for arm in arms:
        greedy, sampled = (figures.mean(arm.name, metric) for metric in ("greedy", "sampled"))
        divergence = figures.mean(arm.name, KL).text(".4f")
        cells = (greedy.text(".1f", 100), sampled.text(".1f", 100), divergence)
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
            figures.difference(arm.name, other.name, "greedy").text("+.1f", 100),
            figures.difference(arm.name, other.name, "sampled").text("+.1f", 100),
            figures.difference(arm.name, other.name, KL).text("+.4f"),
        ]
        lines.append(f"| {arm.title} | {' | '.join(cells)} | {outcomes[arm.name]} |")
    return "\n".join(lines)


def recorded(figures: Figures, arm: Arm, file: str) -> list[dict[str, Any]]:
    """Return what the runs of an arm have written into a JSON file, of each seed that has it."""
    try:
        return [*figures.recorded(arm.name, file).values()]
    except MissingFigures:
        return []


def table_of_caches(figures: Figures, arms: Sequence[Arm], file: str) -> str:
    """Return a table of what altered caches hold before any update, as means over seeds.

    Args:
        figures: What was measured.
        arms: Arms that learn from an altered cache. One without a cache has no line.
        file: What altered_caches.py has written beside the cache.
    """
    lines = [
        "| model | tokens with loss, % | mean advantage, nats | beyond 10 nats, % | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in arms:
        found = [one for one in recorded(figures, arm, file) if "loss_tokens" in one]
        if not found:
            continue
        with_loss = fmean(100 * one["loss_tokens"] / one["tokens"] for one in found)
        beyond = fmean(100 * one["share_beyond_10"] for one in found)
        # A teacher that is always beyond the clip has no advantage of its own.
        mean = (
            f"{fmean(one['mean_advantage'] for one in found):.2f}" if beyond < 100 else "the clip"
        )
        lines.append(f"| {arm.title} | {with_loss:.2f} | {mean} | {beyond:.2f} | {len(found)} |")
    return "\n".join(lines)
