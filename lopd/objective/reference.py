"""A pull back to the policy that sampled: keeps the student near its rollouts, where the teacher's
scores mean something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lopd.objective.estimators import token_importance
from lopd.objective.interface import TokenBatch


@dataclass(frozen=True, slots=True)
class ReferenceKL:
    """coefficient * KL between the current student and the policy that sampled (the reference),
    estimated at the rollouts' tokens; w = pi_theta / pi_ref.

        forward   KL(pi_ref || pi_theta) = E_ref[w - 1 - log w]        gradient E_ref[(w - 1) grad log pi_theta]
        reverse   KL(pi_theta || pi_ref) = E_ref[w log w - w + 1]      gradient E_ref[w log w grad log pi_theta]

    Both are exact in expectation for rollouts at temperature 1, per state of the rollouts, and no
    term is negative (the control variates of John Schulman's k3, "Approximating KL Divergence",
    2020, for samples of the reference instead of the student). Forward holds the student to what it
    once sampled: a token that it has given up pulls with strength 1. Reverse forgives giving up (w
    log w goes to 0 with w) and resists new habits. In the gradient, not in the value, w is capped
    at weight_cap. Metric: ``reference_kl``, mean per token, without the coefficient.
    """

    coefficient: float
    direction: Literal["forward", "reverse"] = "forward"
    weight_cap: float = 10.0

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Token losses [T], 0 where there is no loss."""
        value, slope = self._terms(logprobs.detach(), batch)
        # Its value is the term's, its gradient the capped slope.
        return self.coefficient * (
            value + slope * torch.where(batch.loss_mask, logprobs - logprobs.detach(), 0.0)
        )

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return {"reference_kl": self._terms(logprobs.detach().double(), batch)[0].sum()}

    def _terms(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(term, its derivative by log pi_theta with w capped), [T] each."""
        assert batch.sampling_logprobs is not None, "the reference KL needs sampling_logprobs"
        log_weight = torch.where(
            batch.loss_mask, logprobs - batch.sampling_logprobs.to(logprobs.dtype), 0.0
        )
        weight = token_importance(log_weight, torch.zeros_like(log_weight))
        capped = weight.clamp(max=self.weight_cap)
        if self.direction == "forward":
            return weight - 1.0 - log_weight, capped - 1.0
        return weight * log_weight - weight + 1.0, capped * log_weight.clamp(
            max=math.log(self.weight_cap)
        )
