"""How much the loss of each token counts: factors without gradient, which are multiplied.

They change the loss. They do not change what it is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lopd.deferred import deferred
from lopd.objective.aggregation import expand_to_tokens, running_sums, sequence_sums
from lopd.objective.estimators import token_importance
from lopd.objective.interface import TokenBatch, without_gradient

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

# Fixed-point steps per nat. An int64 holds sums up to 2^31 nats: 214 million tokens of 10 nats.
_FIXED_POINT = 2.0**32


class Weighting(Protocol):
    """A factor for the loss of each token."""

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return finite factors [T] without gradient. Tokens without loss may have any factor."""
        ...

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the metrics of this weighting as sums, float64 [] each."""
        ...


@dataclass(frozen=True, slots=True)
class TruncatedImportance:
    """min(pi_theta / pi_S, cap) of each token.

    The weight moves the update from the policy that sampled to the current student, one token at a
    time. At one state and while the cap does not act,
    E_S[w * A * grad log pi_theta] = E_theta[A * grad log pi_theta]: the update of standard OPD
    there. The states themselves remain those of the sampler.

    The weight undoes what sampling_logprobs describe. lopd caches them at temperature 1. So the
    weight undoes the student's drift since the rollouts. It does not undo the tilt of another
    temperature or of a top-p. With the log-probabilities of the tempered distribution it would.

    The metric is ``importance_capped_share``, the share of tokens at which the cap acts.

    Attributes:
        cap: The largest weight. It bounds the variance. It can make the weighted update smaller
            than the exact one, but never larger (truncated importance sampling, Ionides 2008).
    """

    cap: float = 2.0

    # Without gradient. With one, the student could lower its loss by making the tokens unlikely at
    # which the loss is high, instead of moving towards the teacher.
    @without_gradient
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.sampling_logprobs is not None, "importance weights need sampling_logprobs"
        weight = token_importance(logprobs, batch.sampling_logprobs).clamp(max=self.cap)
        # Exactly 0 without loss: sampling_logprobs of prompt tokens may be anything, and infinity
        # times 0 is nan.
        return torch.where(batch.loss_mask, weight, 0.0)

    @without_gradient
    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        assert batch.sampling_logprobs is not None
        capped = (token_importance(logprobs, batch.sampling_logprobs) > self.cap) & batch.loss_mask
        return {"importance_capped_share": capped.sum(dtype=torch.float64)}


@dataclass(frozen=True, slots=True)
class EarlyTokenGain:
    """IW-OPD: token t is weighted by 1 + gain * (1 - (|A_1| + .. + |A_t|) / (|A_1| + .. + |A_R|)).

    The factor falls from nearly 1 + gain at the first loss token to 1 at the last. A token counts
    less if more of its response's disagreement lies before it, because the teacher then scores a
    state that it would hardly have reached. This is the form with a linear g of "On the Position
    Bias of On-Policy Distillation" (arXiv 2606.22600).

    Where all A of a response are 0, the factor is 1 + gain and the loss is 0.

    Attributes:
        gain: How much more the first token counts.
        advantage_clip: The bound of A = log pi_T - log pi_theta, in nats.
    """

    gain: float = 1.0
    advantage_clip: float = 10.0

    @without_gradient
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        assert batch.teacher_logprobs is not None, (
            "token weights by advantage need teacher_logprobs"
        )
        # Clipped as in the loss, so that one token with a huge advantage does not use up the whole
        # sum.
        disagreement = (batch.teacher_logprobs - logprobs).abs().clamp(max=self.advantage_clip)
        size = torch.where(batch.loss_mask, disagreement, 0.0)  # [T]
        # The sums are over whole numbers. A running sum of floats depends on what else is packed
        # into the microbatch, and on a GPU on the order of the additions.
        steps = (size.double() * _FIXED_POINT).round().long()  # [T]
        # The token itself has passed, so the last loss token has the factor 1.
        passed = running_sums(steps, batch).double()
        # The clamp acts where all advantages of a response are 0: the share passed is then 0.
        total = expand_to_tokens(sequence_sums(steps, batch), batch).clamp(min=1).double()
        return (1.0 + self.gain * (1.0 - passed / total)).to(logprobs.dtype)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Return no metric: the factor follows from the advantages, which are reported."""
        return {}
