"""Lightning OPD (arXiv 2604.13010).

The loss pulls the student's log-probability of every token of the rollouts to the teacher's cached
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.interface import LossOutput, TokenBatch
from lopd.objective.metrics import distillation_sums
from lopd.objective.selection import end_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class Lightning:
    """The update of Lightning OPD, written as a loss.

    The paper (arXiv 2604.13010) defines the advantage of a response token a_t in state s_t as

        A_t = clip(log pi_T(a_t|s_t) - log pi_theta(a_t|s_t), -delta, delta)     no gradient

    where pi_T is the teacher, pi_theta the current student, and delta the clip. Responses come from
    the reference policy pi_ref, once. The update is

        theta += lr * E_ref[ sum_t A_t * grad log pi_theta(a_t|s_t) ]

    This class uses an identity. Let r = log pi_T - log pi_theta. The Huber loss of r with bound
    delta is

        H(r) = r^2 / 2                       where |r| <= delta
        H(r) = delta * (|r| - delta / 2)     beyond

    Its derivative by r is clip(r, -delta, delta) = A, and dr = -d log pi_theta. So the negative
    gradient of H is exactly A * grad log pi_theta. One forward and one backward pass suffice. The
    loss value has a meaning: it is 0 where student and teacher agree on every token of the
    rollouts. With fresh rollouts at every step, the same loss is standard OPD.

    The metrics are those of distillation_sums.

    Attributes:
        advantage_clip: delta, in nats.
        aggregation: How token losses become the loss of a batch; see token_weights.
    """

    advantage_clip: float = 10.0
    aggregation: Aggregation = "response_mean"

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """Return the sums of a microbatch.

        Args:
            logprobs: log pi_theta of the labels [T] at temperature 1, with gradient.
            batch: The packed sequences. They must have teacher_logprobs.
        """
        losses = self.token_losses(logprobs, batch)
        weights, num_items = token_weights(batch, self.aggregation, losses.dtype)
        metrics = self.metric_sums(logprobs, batch, end_tokens(batch))
        # A sum, which the trainer divides by the items of all microbatches and ranks. A mean here
        # would make a token count more in a microbatch that holds fewer of them.
        return LossOutput((weights * losses).sum(), num_items, metrics)

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the Huber loss H(r) of every token [T]. It is 0 where there is no loss."""
        assert batch.teacher_logprobs is not None, "Lightning OPD needs teacher_logprobs"
        # This is r. The mask acts here, before the loss: whatever stands at positions without loss,
        # their gradient is exactly 0. A product with the mask would turn an infinity into nan.
        residual = torch.where(batch.loss_mask, batch.teacher_logprobs - logprobs, 0.0)  # [T]
        # This is A. It is detached: the paper takes no gradient through the advantage.
        advantage = residual.detach().clamp(-self.advantage_clip, self.advantage_clip)  # [T]
        # H(r) without a branch. Within the clip A = r, so A * (r - A/2) = r^2 / 2. Beyond it
        # A = +-delta, so the value is delta * (|r| - delta/2). Since A is constant for autograd,
        # the derivative by r is A in both cases.
        return advantage * (residual - 0.5 * advantage)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        """Return the metrics of every distillation as sums; see distillation_sums."""
        return distillation_sums(logprobs, batch, advantage_clip=self.advantage_clip, ends=ends)
