"""The figures of the study's models, and means over seeds with 95% intervals."""

from __future__ import annotations

from dataclasses import dataclass


class MissingFigures(Exception):
    """An arm has not been measured in at least two seeds."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval by Student's t."""

    mean: float
    low: float
    high: float
    num_seeds: int


class Figures:
    """What was measured, by arm and seed.

    Metrics of measure.py: greedy and sampled (shares of right answers, 0 to 1), reverse_kl (nats
    per token, of the model's own responses at T=1 to the held-out prompts, against the setting's
    teacher), kl_from_sft (the same against the SFT student that the arm began with), tokens (mean
    length of a sampled response). Costs since the base student: decoded and scored (response tokens
    of teachers), processor_seconds, wall_seconds, cache_bytes (of the arm's score stage).
    """

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Return a metric or cost of an arm by seed. Raises MissingFigures."""
        raise NotImplementedError

    def mean(self, arm: str, metric: str) -> Interval:
        """Return the mean of a metric over the seeds."""
        raise NotImplementedError

    def difference(self, arm: str, other: str, metric: str) -> Interval:
        """Return the mean of arm - other, paired by seed."""
        raise NotImplementedError

    def steps(self, arm: str, metric: str) -> dict[int, list[tuple[int, float]]]:
        """Return a metric of distill's metrics.jsonl, by seed, as (step, value)."""
        raise NotImplementedError
