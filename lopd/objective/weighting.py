"""How much each token's loss counts: factors without gradient, multiplied. They change the loss,
not what it is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lopd.objective.aggregation import on_tokens, running_sums, sequence_sums
from lopd.objective.estimators import token_importance
from lopd.objective.interface import TokenBatch

_FIXED_POINT = 2.0**32  # steps per nat


class Weighting(Protocol):
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Factors [T] without gradient, finite; what stands at tokens without loss does not matter."""
        ...

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """What it adds to the metrics, float64 [] each."""
        ...


@dataclass(frozen=True, slots=True)
class TruncatedImportance:
    """min(pi_theta / pi_S, cap) of each token: moves the update from the policy that sampled to the
    current student, one token at a time.

    At a state, E_S[w * A * grad log pi_theta] = E_theta[A * grad log pi_theta] while the cap does
    not act: what standard OPD has there. The choice of states stays the sampler's. The cap bounds
    the variance and makes the weighted update smaller than it should be, never larger (truncated
    importance sampling: Ionides, 2008). sampling_logprobs decide what is undone. As lopd caches
    them they are at temperature 1: the weight undoes the student's drift since the rollouts, and
    leaves the tilt of a temperature other than 1 or of a top-p as it was. Given the
    log-probabilities of the tempered distribution itself, it undoes that too. Metric:
    ``importance_capped_share``.
    """

    cap: float = 2.0

    @torch.no_grad()
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.sampling_logprobs is not None, "importance weights need sampling_logprobs"
        return torch.where(
            batch.loss_mask,
            token_importance(logprobs, batch.sampling_logprobs).clamp(max=self.cap),
            0.0,
        )

    @torch.no_grad()
    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        assert batch.sampling_logprobs is not None
        capped = (token_importance(logprobs, batch.sampling_logprobs) > self.cap) & batch.loss_mask
        return {"importance_capped_share": capped.sum(dtype=torch.float64)}


@dataclass(frozen=True, slots=True)
class EarlyTokenGain:
    """IW-OPD: 1 + gain * (1 - (|A_1| + .. + |A_t|) / (|A_1| + .. + |A_R|)) of token t, from nearly
    1 + gain at the start down to 1 at the last token.

    A token weighs the less, the more of its response's disagreement lies behind it: the teacher
    then scores a state that it would hardly have reached ("On the Position Bias of On-Policy
    Distillation", arXiv 2606.22600; in the form of a linear g). A = clip(log pi_T - log pi_theta),
    over the response's loss tokens. Where all A are 0 the factor is 1 + gain and the loss 0.
    """

    gain: float = 1.0
    advantage_clip: float = 10.0

    @torch.no_grad()
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.teacher_logprobs is not None, (
            "token weights by advantage need teacher_logprobs"
        )
        size = torch.where(
            batch.loss_mask,
            (batch.teacher_logprobs - logprobs).abs().clamp(max=self.advantage_clip),
            0.0,
        )  # [T]
        # Whole numbers: running sums of floats depend on what else is packed into the microbatch,
        # and on a GPU on chance.
        steps = (size.double() * _FIXED_POINT).round().long()  # [T]
        passed = running_sums(steps, batch).double()
        total = on_tokens(sequence_sums(steps, batch), batch).clamp(min=1).double()
        return (1.0 + self.gain * (1.0 - passed / total)).to(logprobs.dtype)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return {}
