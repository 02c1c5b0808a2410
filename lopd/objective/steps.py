"""How much each step of an agent's response counts: SOD, and where the steps of a response are.

A step is what the student writes between two turns of a tool or a user. In a batch it is a run of
tokens that carry loss, because the tokens of a tool carry none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.aggregation import expand_to_tokens, running_sums, sequence_sums
from lopd.objective.interface import TokenBatch, without_gradient

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

# Keeps a quotient finite where student and teacher agree on every token of a step, in nats.
EPSILON = 1e-6
# Fixed-point steps per nat, and the most nats of one token. An int64 then holds the sum over two
# million such tokens.
_FIXED_POINT = 2.0**32
_MAX_NATS = 1000.0


@dataclass(frozen=True, slots=True)
class StepDivergence:
    """SOD: step k of a response is weighted by min((d_1 + eps) / (d_k + eps), cap).

    d_k is the mean of |log pi_theta - log pi_T| over the tokens of step k. So a step counts less
    where student and teacher have drifted further apart than in the first step: an error of a tool
    call leads to states in which the teacher's opinion says little. A step counts more, up to the
    cap, where they have come together again.

    The source is "SOD: Step-wise On-policy Distillation for Small Language Model Agents" (arXiv
    2605.07725). It writes the weight as a product over neighbouring steps,

        w_k = min(prod_{u=1}^{k-1} (d_u + eps) / (d_{u+1} + eps), 1 + delta),    w_1 = 1.

    All factors but the first numerator and the last denominator cancel. It uses delta = 0.2, so
    cap = 1.2, and eps = 1e-6.

    A response of one step has the weight 1 everywhere. The metric is ``step_weight``, the mean
    weight of the tokens with loss.

    Attributes:
        cap: The largest weight, at least 1.
    """

    cap: float = 1.2

    @without_gradient
    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        return self._weights(logprobs, batch).to(logprobs.dtype)

    @without_gradient
    def metric_sums(self, logprobs: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        weights = self._weights(logprobs, batch)
        return {"step_weight": torch.where(batch.loss_mask, weights, 0.0).sum()}

    def _weights(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the weight of each token, float64 [T]. It is 1 where there is no loss."""
        assert batch.teacher_logprobs is not None, "weights of steps need teacher_logprobs"
        first, last = step_bounds(batch)
        distance = (batch.teacher_logprobs - logprobs).abs().clamp(max=_MAX_NATS)
        # where and not a product: at a token of a tool anything may stand, also nan.
        sizes = torch.where(batch.loss_mask, distance.double(), 0.0)  # [T]
        # Whole numbers, as in EarlyTokenGain: a running sum of floats would depend on what else is
        # packed into the microbatch.
        before = torch.nn.functional.pad((sizes * _FIXED_POINT).round().long().cumsum(0), (1, 0))
        totals = before[last + 1] - before[first]  # [T]
        # In nats per token. A token without loss is in no step and has any value.
        divergence = totals.double() / _FIXED_POINT / (last - first + 1)
        weights = (divergence[_first_step(batch)] + EPSILON) / (divergence + EPSILON)
        return torch.where(batch.loss_mask, weights.clamp(max=self.cap), 1.0)


def step_bounds(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return the first and the last position of the step of each token, int64 [T] each.

    A token without loss is in no step. Its values are positions within bounds, and mean nothing.
    """
    mask = batch.loss_mask
    positions = torch.arange(len(mask), device=mask.device)
    begins = _begins(batch)
    # A step ends before the position at which another one begins, or at which there is no loss.
    ends = mask & torch.nn.functional.pad(~mask[1:] | begins[1:], (0, 1), value=True)
    first = torch.where(begins, positions, 0).cummax(0).values
    # The next end is found from behind.
    last = torch.where(ends, positions, len(mask) - 1).flip(0).cummin(0).values.flip(0)
    return first, torch.maximum(first, last)


def _begins(batch: TokenBatch) -> Tensor:
    """Return the tokens at which a step begins, bool [T]."""
    mask = batch.loss_mask
    begins = mask & torch.nn.functional.pad(~mask[:-1], (1, 0), value=True)
    # The first loss token of a sequence begins a step, whatever stands before it in the pack.
    return begins | (mask & (running_sums(mask.long(), batch) == 1))


def _first_step(batch: TokenBatch) -> Tensor:
    """Return for each token the position at which the first step of its sequence begins, [T]."""
    mask = batch.loss_mask
    positions = torch.arange(len(mask), device=mask.device)
    is_first = mask & (running_sums(mask.long(), batch) == 1)
    # One summand per sequence, or none where it has no loss token.
    return expand_to_tokens(sequence_sums(torch.where(is_first, positions, 0), batch), batch)
