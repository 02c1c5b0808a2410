"""The figures of the study's models: means, sums and differences over seeds with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# The 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom: NIST/SEMATECH e-Handbook of
# Statistical Methods, section 1.3.6.7.2. More seeds take the last one, which is too wide for them.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
# Digits of a figure that is kept: far below its noise, and the file stays small.
_DIGITS = 6
# The metrics that most comparisons read.
ACCURACIES = ("greedy", "sampled")
METRICS = (*ACCURACIES, "reverse_kl")

Points = list[tuple[int, float]]
# A metric of the steps of an arm: (arm, metric) -> by seed.
StepReader = Callable[[str, str], dict[int, Points]]
# A JSON file in the folder of an arm's run: (arm, file) -> by seed.
FileReader = Callable[[str, str], dict[int, Any]]


class MissingFigures(Exception):
    """An arm has not been measured in at least two seeds."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval by Student's t."""

    mean: float
    low: float
    high: float
    num_seeds: int

    def text(self, form: str = "+.1f", scale: float = 1.0) -> str:
        """Return it as "+1.2 [-0.3, +2.7]".

        Args:
            form: The format of each number.
            scale: What each number is multiplied by: 100 for points of accuracy.
        """
        mean, low, high = (f"{scale * value:{form}}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def interval_of(values: list[float]) -> Interval:
    """Return the mean of one value a seed with its interval. There must be at least two values."""
    if len(values) < 2:
        raise MissingFigures("an interval needs at least two seeds")
    mean = fmean(values)
    quantile = _T[min(len(values) - 1, len(_T)) - 1]
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


class Figures:
    """What was measured, by arm and seed.

    Metrics of measure.py: greedy and sampled (shares of right answers, 0 to 1), reverse_kl (nats
    per token, of the model's own responses at T=1 to the held-out prompts, against the setting's
    teacher), kl_from_sft (the same against the SFT student that the arm began with), tokens (mean
    length of a sampled response). Costs since the base student: decoded and scored (response tokens
    of teachers), processor_seconds, wall_seconds, cache_bytes (of the cache that the arm learnt
    from, and of its refreshes), cache_processor_seconds and cache_wall_seconds (the part of the
    seconds that its rollouts and its scores took).

    Args:
        values: arm -> metric -> seed -> value.
        steps: arm -> metric of distill's steps -> seed -> (step, value).
        read_steps: Reads a metric of the steps that is not in ``steps``, from the runs.
        files: arm -> name of a JSON file in the folder of its run -> seed -> content.
        read_file: Reads such a file that is not in ``files``.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Mapping[int, float]]],
        steps: Mapping[str, Mapping[str, Mapping[int, Points]]] | None = None,
        read_steps: StepReader | None = None,
        files: Mapping[str, Mapping[str, Mapping[int, Any]]] | None = None,
        read_file: FileReader | None = None,
    ) -> None:
        self._values = values
        self._steps = {
            arm: {metric: dict(of) for metric, of in metrics.items()}
            for arm, metrics in (steps or {}).items()
        }
        self._read_steps = read_steps
        self._files = {
            arm: {name: dict(of) for name, of in names.items()}
            for arm, names in (files or {}).items()
        }
        self._read_file = read_file

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Return a metric or cost of an arm by seed. Raises MissingFigures."""
        found = dict(self._values.get(arm, {}).get(metric, {}))
        if len(found) < 2:
            raise MissingFigures(f"{metric} of {arm} is known of {len(found)} seeds")
        return found

    def has(self, arm: str, *metrics: str) -> bool:
        """Return whether metrics of an arm are known of at least two seeds."""
        try:
            for metric in metrics:
                self.values(arm, metric)
        except MissingFigures:
            return False
        return True

    def mean(self, arm: str, metric: str) -> Interval:
        """Return the mean of a metric over the seeds."""
        return interval_of([*self.values(arm, metric).values()])

    def difference(self, arm: str, other: str, metric: str) -> Interval:
        """Return the mean of arm - other, paired by seed."""
        return self.weighted_sum(metric, (1.0, arm), (-1.0, other))

    def weighted_sum(self, metric: str, *terms: tuple[float, str]) -> Interval:
        """Return the mean over seeds of a weighted sum of arms, paired by seed.

        Args:
            metric: The metric.
            terms: The weight and the name of each arm.

        Raises:
            MissingFigures: Fewer than two seeds have all of the arms.
        """
        columns = [(weight, self.values(arm, metric)) for weight, arm in terms]
        seeds = set.intersection(*(set(column) for _, column in columns))
        if len(seeds) < 2:
            names = " and ".join(arm for _, arm in terms)
            raise MissingFigures(f"{names} have {len(seeds)} seeds in common")
        return interval_of(
            [sum(weight * column[seed] for weight, column in columns) for seed in sorted(seeds)]
        )

    def steps(self, arm: str, metric: str) -> dict[int, Points]:
        """Return a metric of distill's metrics.jsonl, by seed, as (step, value)."""
        of_arm = self._steps.setdefault(arm, {})
        if metric not in of_arm and self._read_steps is not None:
            # Kept, so that as_json() has what was used and nothing else.
            of_arm[metric] = self._read_steps(arm, metric)
        if not of_arm.get(metric):
            raise MissingFigures(f"the steps of {arm} have no {metric}")
        return of_arm[metric]

    def recorded(self, arm: str, file: str) -> dict[int, Any]:
        """Return the content of a JSON file that an arm's own commands have written, by seed.

        Args:
            arm: The arm.
            file: The file, relative to the folder of its run. It should be small, because the
                figures of the page keep it.

        Raises:
            MissingFigures: No seed has it.
        """
        of_arm = self._files.setdefault(arm, {})
        if file not in of_arm and self._read_file is not None:
            of_arm[file] = self._read_file(arm, file)
        if not of_arm.get(file):
            raise MissingFigures(f"{arm} has no {file}")
        return of_arm[file]

    def as_json(self) -> dict[str, Any]:
        """Return all values, and the metrics of steps and the files that were asked for."""
        values = {
            arm: {metric: _rounded(of) for metric, of in metrics.items() if of}
            for arm, metrics in self._values.items()
        }
        steps = {
            arm: {
                metric: {
                    str(seed): [[step, _round(value)] for step, value in points]
                    for seed, points in of.items()
                }
                for metric, of in metrics.items()
                if of
            }
            for arm, metrics in self._steps.items()
        }
        files = {
            arm: {
                name: {str(seed): content for seed, content in of.items()}
                for name, of in names.items()
                if of
            }
            for arm, names in self._files.items()
        }
        return {
            "values": {arm: of for arm, of in values.items() if of},
            "steps": {arm: of for arm, of in steps.items() if of},
            "files": {arm: of for arm, of in files.items() if of},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Figures:
        """Return what as_json() has given."""
        values = {
            arm: {
                metric: {int(seed): value for seed, value in of.items()}
                for metric, of in metrics.items()
            }
            for arm, metrics in stored["values"].items()
        }
        steps = {
            arm: {
                metric: {
                    int(seed): [(step, value) for step, value in points]
                    for seed, points in of.items()
                }
                for metric, of in metrics.items()
            }
            for arm, metrics in stored["steps"].items()
        }
        files = {
            arm: {
                name: {int(seed): content for seed, content in of.items()}
                for name, of in names.items()
            }
            for arm, names in stored["files"].items()
        }
        return cls(values, steps, files=files)


def change(
    figures: Figures, metric: str, late: str, early: str, *, of: str = "", early_of: str = ""
) -> Interval:
    """Return the mean of late - early, paired by seed.

    Args:
        figures: What was measured.
        metric: The metric.
        late: An arm.
        early: The arm that it is compared with.
        of: If given, the difference (of - early_of) is taken away from it, in each seed.
        early_of: See of.

    Raises:
        MissingFigures: Fewer than two seeds have all of the arms.
    """
    terms = [(1.0, late), (-1.0, early)]
    if of:
        terms += [(-1.0, of), (1.0, early_of)]
    return figures.weighted_sum(metric, *terms)


def _rounded(of: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): _round(value) for seed, value in of.items()}


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
