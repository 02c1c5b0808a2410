"""Lightning OPD (arXiv 2604.13010): pull the student's log-probability of every rolled-out token to
the teacher's cached one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.interface import LossOutput, TokenBatch
from lopd.objective.metrics import distillation_sums
from lopd.objective.selection import end_tokens


@dataclass(frozen=True, slots=True)
class Lightning:
    """The Lightning OPD update as a loss: the Huber loss of the residual log pi_T - log pi_theta,
    with delta = advantage_clip.

    The method's update of a token is theta += lr * A * grad log pi_theta, where A = clip(log pi_T -
    log pi_theta, -delta, delta) carries no gradient. With r = log pi_T - log pi_theta, the Huber
    loss is r^2 / 2 where |r| <= delta and delta * (|r| - delta / 2) beyond; its derivative by r is
    clip(r), and dr = -d log pi_theta, so its negative gradient is exactly A * grad log pi_theta.
    One forward and one backward pass suffice, and the value means something: it is 0 where student
    and teacher agree on every rolled-out token. On fresh rollouts at every step the same is
    standard OPD.

    advantage_clip: nats. aggregation: see token_weights. Metrics: see distillation_sums.
    """

    advantage_clip: float = 10.0
    aggregation: Aggregation = "response_mean"

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """logprobs [T] with gradient; the batch must have teacher_logprobs."""
        losses = self.token_losses(logprobs, batch)
        weights, num_items = token_weights(batch, self.aggregation, losses.dtype)
        return LossOutput(
            (weights * losses).sum(),
            num_items,
            self.metric_sums(logprobs, batch, end_tokens(batch)),
        )

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """The Huber loss of every token [T], 0 where there is no loss."""
        assert batch.teacher_logprobs is not None, "Lightning OPD needs teacher_logprobs"
        # Chosen before the subtraction's gradient flows: whatever stands at masked positions, their
        # gradient is exactly 0.
        residual = torch.where(batch.loss_mask, batch.teacher_logprobs - logprobs, 0.0)  # [T]
        advantage = residual.detach().clamp(-self.advantage_clip, self.advantage_clip)  # [T]
        return advantage * (
            residual - 0.5 * advantage
        )  # [T]; its gradient by the residual is the advantage

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        return distillation_sums(logprobs, batch, advantage_clip=self.advantage_clip, ends=ends)
