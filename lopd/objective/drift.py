"""When frozen responses have become too old.

They are too old after a number of steps, or when the student has drifted from the policy that
sampled them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from lopd.config import DistillSection
from lopd.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class RefreshRule:
    """Decides after every step whether the next step should learn from fresh responses.

    The two bounds are on w = pi_theta / pi_sampling of the tokens of a step, as distillation_sums
    reports it. For responses sampled at temperature 1 the mean of w^2 - 1 is an unbiased estimate
    of the chi-square divergence of the next token at the states of the rollouts. At another
    temperature both metrics still start at w = 1 and measure the drift since then.

    A token's chi-square is far below that of a whole response. The distance between the offline and
    the online gradient is bounded by the latter (arXiv 2604.13010; docs/objectives.md).

    Attributes:
        every: The number of steps that learn from the same responses. 0 sets no limit.
        min_effective_share: The lower bound of (sum w)^2 / (n sum w^2). None sets no bound.
        max_chi_square: The upper bound of the mean of w^2 - 1. None sets no bound.
    """

    every: int = 0
    min_effective_share: float | None = None
    max_chi_square: float | None = None

    @classmethod
    def from_config(cls, distill: DistillSection) -> Self:
        """Return the rule of [distill.refresh].

        Raises:
            ConfigError: A knob can change nothing.
        """
        section = distill.refresh
        rule = cls(section.every, section.min_effective_share, section.max_chi_square)
        if section.num_responses is not None and not section.is_on:
            raise ConfigError(
                "refresh.num_responses has no effect without a refresh",
                where="distill.refresh",
                remedy="set refresh.every, or set a bound of the drift, or remove "
                "refresh.num_responses",
            )
        # With a bound of the drift besides, a refresh can still come before the training ends.
        has_only_every = rule == cls(rule.every)
        if has_only_every and rule.every >= distill.num_steps:
            raise ConfigError(
                f"refresh.every = {rule.every}: the training ends before the first refresh",
                where="distill.refresh",
                limit=f"below distill.num_steps = {distill.num_steps}",
                remedy="lower refresh.every, or remove it to train with Lightning OPD",
            )
        return rule

    def __str__(self) -> str:
        rules: list[str] = []
        if self.every > 0:
            rules.append(f"every {self.every} steps")
        if self.min_effective_share is not None:
            rules.append(f"effective sample share below {self.min_effective_share}")
        if self.max_chi_square is not None:
            rules.append(f"chi-square above {self.max_chi_square}")
        return f"refresh: {' or '.join(rules) or 'never'}"

    def reason(self, num_steps: int, metrics: Mapping[str, float]) -> str | None:
        """Return why the responses should be refreshed, or None.

        Args:
            num_steps: The number of steps that have learned from the present responses, at least 1.
            metrics: The metrics of the last of these steps (lopd.objective.reduce_metrics).

        Raises:
            DataError: There is a bound, but the step has no figure for it, because its samples have
                no sampling_logprobs.
        """
        # Before the first step the responses are fresh, and there are no metrics of a step.
        assert num_steps >= 1, num_steps
        bounded = self.min_effective_share is not None or self.max_chi_square is not None
        # The metrics are missing where a cache was imported without sampling_logprobs. This comes
        # before the rules. Otherwise it would be noticed only at the first step that `every` does
        # not decide.
        if bounded and not {"effective_sample_share", "chi_square"} <= metrics.keys():
            raise DataError(
                "a bound of the drift is set, but the responses have no sampling log-probabilities",
                where="distill.refresh",
                remedy="set refresh.every instead of the bound",
            )
        if self.every and num_steps >= self.every:
            return f"{num_steps} step{'s' if num_steps > 1 else ''}"
        if self.min_effective_share is not None:
            share = metrics["effective_sample_share"]
            if share < self.min_effective_share:
                return f"effective sample share {share:.3f} < {self.min_effective_share:g}"
        if self.max_chi_square is not None:
            chi_square = metrics["chi_square"]
            if chi_square > self.max_chi_square:
                return f"chi-square {chi_square:.3f} > {self.max_chi_square:g}"
        return None
