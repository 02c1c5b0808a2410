"""A pull back to the policy that sampled the rollouts.

It keeps the student near its rollouts, where the teacher's scores mean something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lopd.deferred import deferred
from lopd.objective.estimators import token_importance
from lopd.objective.interface import TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class ReferenceKL:
    """coefficient * KL between the current student and the reference, the policy that sampled.

    It is estimated at the tokens of the rollouts, with w = pi_theta / pi_ref:

        forward   KL(pi_ref || pi_theta) = E_ref[w - 1 - log w]
                  gradient E_ref[(w - 1) grad log pi_theta]
        reverse   KL(pi_theta || pi_ref) = E_ref[w log w - w + 1]
                  gradient E_ref[w log w grad log pi_theta]

    For rollouts at temperature 1 both are exact in expectation at each state of the rollouts. No
    term is negative. The control variates are those of John Schulman's k3 ("Approximating KL
    Divergence", 2020), here for samples of the reference instead of the student.

    Forward holds the student to what it once sampled: a token that the student has given up pulls
    with strength 1. Reverse forgives giving up, because w log w goes to 0 with w. It resists new
    habits.

    The metric is ``reference_kl``, the mean per token without the coefficient.

    Attributes:
        coefficient: The factor of the KL.
        direction: Which of the two divergences.
        weight_cap: The bound of w in the gradient. The value is not capped.
    """

    coefficient: float
    direction: Literal["forward", "reverse"] = "forward"
    weight_cap: float = 10.0

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the token losses [T]. They are 0 where there is no loss."""
        value, slope = self._terms(logprobs.detach(), batch)
        # zero is 0 everywhere and has the gradient of log pi_theta. So the sum has the value of the
        # term, and the capped slope as its gradient. Autograd of the term would not cap w.
        zero = torch.where(batch.loss_mask, logprobs - logprobs.detach(), 0.0)
        return self.coefficient * (value + slope * zero)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the sum of the uncapped terms, float64 []."""
        return {"reference_kl": self._terms(logprobs.detach().double(), batch)[0].sum()}

    def _terms(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the terms and their derivatives by log pi_theta with w capped, [T] each."""
        assert batch.sampling_logprobs is not None, "the reference KL needs sampling_logprobs"
        # A log w of 0 at tokens without loss makes both results 0 there.
        log_weight = torch.where(
            batch.loss_mask, logprobs - batch.sampling_logprobs.to(logprobs.dtype), 0.0
        )
        # It also keeps the value finite: token_importance caps log w at 20 nats.
        weight = token_importance(log_weight, torch.zeros_like(log_weight))
        capped = weight.clamp(max=self.weight_cap)
        # The slopes follow from dw / d log pi_theta = w. Of w - 1 - log w it is w - 1.
        if self.direction == "forward":
            return weight - 1.0 - log_weight, capped - 1.0
        # Of w log w - w + 1 it is (w log w + w) - w = w log w. Both factors are capped, so that the
        # slope stops at the value that it has at the cap.
        capped_log = log_weight.clamp(max=math.log(self.weight_cap))
        return weight * log_weight - weight + 1.0, capped * capped_log
