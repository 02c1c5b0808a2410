"""What the verdict of a verifier does to a response: leave it out, weight it, or move its target.

The verdicts come from ``lopd cache judge``: was the answer of this response right? A verdict is
about a whole response, so every token of it is treated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.aggregation import expand_to_tokens
from lopd.objective.interface import TokenBatch, without_gradient

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class DropWrong:
    """Responses with a wrong answer carry no loss."""

    def __call__(self, batch: TokenBatch) -> Tensor:
        return _right_tokens(batch)


@dataclass(frozen=True, slots=True)
class WrongWeight:
    """Responses with a wrong answer count more or less than the others.

    The metric is ``right_share``, the share of loss tokens in responses with a right answer.

    Attributes:
        weight: The factor of their losses. What the loss is divided by does not change.
    """

    weight: float

    @without_gradient
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        # Not normalised, so that a batch of wrong responses counts as little as the knob says.
        return torch.where(_right_tokens(batch), 1.0, self.weight).to(logprobs.dtype)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        return _right_share(batch)


@dataclass(frozen=True, slots=True)
class VerdictReward:
    """+coefficient is added to every advantage of a right response, -coefficient of a wrong one.

    The advantage becomes A + c r with r = 1 or -1: the teacher's opinion of the token, and the
    verifier's of the response. The loss is still a Huber loss. Its residual is
    (log pi_T + c r) - log pi_theta, so the rest lies c nats above or below the teacher.

    The metric is ``right_share``, the share of loss tokens in responses with a right answer.

    Attributes:
        coefficient: In nats.
    """

    coefficient: float

    @without_gradient
    def __call__(self, batch: TokenBatch) -> Tensor:
        return torch.where(_right_tokens(batch), self.coefficient, -self.coefficient)

    def metric_sums(self, batch: TokenBatch) -> dict[str, Tensor]:
        return _right_share(batch)


def _right_tokens(batch: TokenBatch) -> Tensor:
    """Return the tokens of responses with a right answer, bool [T]."""
    assert batch.right is not None, "it must be known which answers were right"
    return expand_to_tokens(batch.right, batch)


def _right_share(batch: TokenBatch) -> dict[str, Tensor]:
    # By tokens and not by responses, as the loss counts them.
    right = _right_tokens(batch) & batch.loss_mask
    return {"right_share": right.sum(dtype=torch.float64)}
