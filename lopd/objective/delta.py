"""Direction instead of destination: the advantage is what the teacher's last training has changed.

On-Policy Delta Distillation (OPD2, arXiv 2607.15161) takes log pi_T - log pi_B as the signal, where
B is the model that the teacher was before it was trained to reason. What both models have in
common, style and general knowledge, cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.interface import TokenBatch, without_gradient

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class Delta:
    """The advantage (log pi_T - log pi_B) - (log pi_theta - log pi_ref).

    At the start pi_theta is pi_ref, the frozen student that sampled, and the advantage is the delta
    of the teacher and its base B. The second difference is the anchor, as in CompassOPD (arXiv
    2609.10154): it grows as the student moves, and ends the push where the student has changed as
    much as the teacher had. As a shift of the ordinary advantage log pi_T - log pi_theta it is
    log pi_ref - log pi_B.

    OPD2 subtracts the mean of the delta under the student's distribution and drops tokens where the
    delta and the ordinary advantage have different signs. The first needs distributions that a
    cache of one log-probability per token does not hold; neither is done here.

    The metric is ``delta``, the mean of log pi_T - log pi_B in nats.
    """

    @without_gradient
    def __call__(self, batch: TokenBatch) -> Tensor:
        assert batch.base_logprobs is not None, "the delta needs the base's log-probabilities"
        assert batch.sampling_logprobs is not None, "the delta is anchored at the sampling policy"
        # The student that sampled is pi_ref, and the cache has its log-probabilities of these very
        # tokens.
        return batch.sampling_logprobs - batch.base_logprobs

    def metric_sums(self, batch: TokenBatch) -> dict[str, Tensor]:
        assert batch.teacher_logprobs is not None
        assert batch.base_logprobs is not None
        # The delta alone and without the anchor: it belongs to the cache and does not change during
        # a training.
        delta = batch.teacher_logprobs.double() - batch.base_logprobs.double()
        return {"delta": torch.where(batch.loss_mask, delta, 0.0).sum()}
