"""When frozen responses have become too old: after so many steps, or when the student has drifted
from the policy that sampled them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from lopd.config import DistillSection
from lopd.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class RefreshRule:
    """Decides after every step whether the next one should learn from fresh responses; what is None
    or 0 decides nothing.

    every: steps that learn from the same responses. The bounds are on w = pi_theta / pi_sampling of
    the step's tokens, as distillation_sums reports it: min_effective_share on (sum w)^2 / (n sum
    w^2), max_chi_square on the mean of w^2 - 1. For responses sampled at temperature 1 the latter
    is an unbiased estimate of the chi-square divergence of the next token at their states; at
    another temperature both still start at w = 1 and measure the drift since. A token's chi-square
    is far below a whole response's, which the distance of the offline from the online gradient is
    bounded by (docs/objectives.md).
    """

    every: int = 0
    min_effective_share: float | None = None
    max_chi_square: float | None = None

    @classmethod
    def from_config(cls, distill: DistillSection) -> Self:
        """The rule of [distill.refresh]. ConfigError: a knob that can change nothing."""
        section = distill.refresh
        rule = cls(section.every, section.min_effective_share, section.max_chi_square)
        if section.num_responses is not None and not section.is_on:
            remedy = "set refresh.every, or a bound of the drift, or leave num_responses out"
            raise ConfigError(
                "refresh.num_responses without a refresh", where="distill.refresh", remedy=remedy
            )
        if rule.every >= distill.num_steps and rule == cls(rule.every):
            what, limit = (
                f"refresh.every = {rule.every}: the training ends before the first refresh",
                f"below distill.num_steps = {distill.num_steps}",
            )
            raise ConfigError(
                what,
                where="distill.refresh",
                limit=limit,
                remedy="lower it, or leave it out for Lightning OPD",
            )
        return rule

    def __str__(self) -> str:
        found = (
            (self.every > 0, f"every {self.every} steps"),
            (
                self.min_effective_share is not None,
                f"effective sample share below {self.min_effective_share}",
            ),
            (self.max_chi_square is not None, f"chi-square above {self.max_chi_square}"),
        )
        return f"refresh: {' or '.join(text for is_set, text in found if is_set) or 'never'}"

    def reason(self, num_steps: int, metrics: Mapping[str, float]) -> str | None:
        """Why to refresh, or None. num_steps: learnt from the present responses, >= 1. metrics: of
        the last of them (lopd.objective.reduce_metrics).

        DataError: there is a bound, and the step has no figure for it because its samples have no
        sampling_logprobs.
        """
        assert num_steps >= 1, num_steps
        bounded = self.min_effective_share is not None or self.max_chi_square is not None
        if bounded and not {"effective_sample_share", "chi_square"} <= metrics.keys():
            raise DataError(
                "a bound of the drift, but the responses have no sampling log-probabilities",
                where="distill.refresh",
                remedy="set refresh.every",
            )
        if self.every and num_steps >= self.every:
            return f"{num_steps} step{'s' if num_steps > 1 else ''}"
        if (
            self.min_effective_share is not None
            and metrics["effective_sample_share"] < self.min_effective_share
        ):
            return f"effective sample share {metrics['effective_sample_share']:.3f} < {self.min_effective_share:g}"
        if self.max_chi_square is not None and metrics["chi_square"] > self.max_chi_square:
            return f"chi-square {metrics['chi_square']:.3f} > {self.max_chi_square:g}"
        return None
