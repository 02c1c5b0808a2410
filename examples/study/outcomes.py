"""The margin within which two accuracies are called equal, and what intervals say by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from examples.study.arms import Arm
from examples.study.figures import ACCURACIES, METRICS, Figures, Interval

# Two accuracies (shares of right answers) are called equal if the interval of their difference lies
# within this margin. It was named before any arm was made.
MARGIN = 0.02

# "equal": the interval lies within the margin. "higher", "lower": it lies beyond the margin.
# "open": it lies on both sides of a margin, so the figures do not decide.
Comparison = Literal["equal", "higher", "lower", "open"]


def compare(difference: Interval, margin: float) -> Comparison:
    """Return what the interval of a difference says of equality within a margin."""
    if difference.low >= -margin and difference.high <= margin:
        return "equal"
    if difference.low > margin:
        return "higher"
    if difference.high < -margin:
        return "lower"
    return "open"


def sign_of(interval: Interval) -> int:
    """Return 1 or -1 where the interval lies on one side of 0, and 0 where it holds 0."""
    return (interval.low > 0) - (interval.high < 0)


def is_within(difference: Interval) -> bool:
    """Return whether the interval lies within MARGIN on both sides, and does not touch it."""
    return difference.low > -MARGIN and difference.high < MARGIN


def measured(figures: Figures, arms: Iterable[Arm]) -> list[Arm]:
    """Return the arms whose accuracies and reverse KL are measured in at least two seeds."""
    return [arm for arm in arms if figures.has(arm.name, *METRICS)]


def matches(figures: Figures, arm: str, other: str) -> str:
    """Return how an arm stands to a method that it may turn out to match.

    Returns:
        "matches": both accuracies are shown to be less than MARGIN below the other's, or above it.
        "below": one of them is shown to be lower. "open": neither is shown.
    """
    accuracies = [figures.difference(arm, other, metric) for metric in ACCURACIES]
    if all(one.low > -MARGIN for one in accuracies):
        return "matches"
    return "below" if any(sign_of(one) < 0 for one in accuracies) else "open"


def changes(figures: Figures, arm: str, other: str) -> str:
    """Return what a change has done to a method.

    Returns:
        "harm", "gain" or "mixed": an accuracy or the reverse KL is shown to be worse, better, or
        one of them worse and another better. "equal": none is, and both accuracies are shown to be
        within MARGIN. "open": nothing is shown.
    """
    accuracies = [figures.difference(arm, other, metric) for metric in ACCURACIES]
    divergence = figures.difference(arm, other, "reverse_kl")
    is_worse = sign_of(divergence) > 0 or any(sign_of(one) < 0 for one in accuracies)
    is_better = sign_of(divergence) < 0 or any(sign_of(one) > 0 for one in accuracies)
    if is_worse or is_better:
        return "mixed" if is_worse and is_better else "harm" if is_worse else "gain"
    return "equal" if all(is_within(one) for one in accuracies) else "open"
