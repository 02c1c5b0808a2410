"""KL between student and teacher over the teacher's K likeliest tokens at every state of the
rollouts: an exact sum over tokens instead of one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lopd.objective.aggregation import Aggregation
from lopd.objective.interface import TokenBatch
from lopd.objective.metrics import distillation_sums
from lopd.records import TAIL_FLOOR


@dataclass(frozen=True, slots=True)
class TopKKL:
    """reverse: KL(student || teacher) = sum_k q_k (log q_k - log p_k); forward: KL(teacher ||
    student) = sum_k p_k (log p_k - log q_k); nats per token.

    p, q: the teacher's and the student's probabilities of the teacher's K likeliest tokens, from
    teacher_top_logprobs and student_top_logprobs [T, K]. What becomes of the rest of the vocabulary
    is the support: ``tail`` makes it one more outcome, of probability 1 - sum (at least
    TAIL_FLOOR); the result is a lower bound of the KL over the vocabulary, and exact for K = V.
    ``renormalised`` divides p and q by their sums; then the loss does not see how much probability
    the student puts outside of the K tokens, so it alone cannot bring back what has leaked there.

    The gradient is that of the divergence itself at each state, by autograd. The sampled token
    plays no part, so there is no sampling noise, no advantage to clip, and no importance weight to
    apply; the states are still those of the rollouts. Metrics: those of distillation_sums where the
    batch has teacher_logprobs, ``top_k_kl``, and ``student_tail`` and ``teacher_tail`` (mean
    probability outside of the K tokens).
    """

    direction: Literal["reverse", "forward"] = "reverse"
    support: Literal["tail", "renormalised"] = "tail"
    aggregation: Aggregation = "response_mean"

    @property
    def advantage_clip(self) -> float:
        """None: the gradient of a divergence is bounded by itself."""
        return math.inf

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """[T], 0 where there is no loss. logprobs plays no part."""
        if (
            batch.num_sequences == 0
        ):  # padding alone: a rank without data takes part, and has no top-K
            return 0.0 * logprobs
        student, teacher = self._on_support(batch)  # [T, K] or [T, K + 1]
        first, second = (student, teacher) if self.direction == "reverse" else (teacher, student)
        return (first.exp() * (first - second)).sum(-1)

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            own = {"top_k_kl": self.token_losses(logprobs, batch).double().sum()}
            tails = dict.fromkeys(
                ("student_tail", "teacher_tail"), torch.zeros_like(own["top_k_kl"])
            )
            if batch.num_sequences:
                student, teacher = self._chosen(batch)
                for name, values in (("student_tail", student), ("teacher_tail", teacher)):
                    tails[name] = torch.where(
                        batch.loss_mask, 1.0 - values.double().exp().sum(-1), 0.0
                    ).sum()
            return {
                **distillation_sums(logprobs, batch, advantage_clip=math.inf, ends=ends),
                **own,
                **tails,
            }

    def _chosen(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Both log-probabilities [T, K], equal and without gradient where there is no loss."""
        student, teacher = batch.student_top_logprobs, batch.teacher_top_logprobs
        assert student is not None, "a top-K KL needs student_top_logprobs"
        assert teacher is not None, "a top-K KL needs teacher_top_logprobs"
        mask, even = batch.loss_mask[:, None], -math.log(2 * student.shape[1])
        return torch.where(mask, student, even), torch.where(mask, teacher.to(student.dtype), even)

    def _on_support(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        student, teacher = self._chosen(batch)
        if self.support == "tail":
            even = -math.log(2)  # where there is no loss; so _chosen fills the K tokens
            tail = batch.teacher_tail_logprob
            known = (
                None
                if tail is None
                else torch.where(batch.loss_mask, tail.to(student.dtype), even)[:, None]
            )
            return _with_tail(student), _with_tail(teacher) if known is None else torch.cat(
                [teacher, known], dim=-1
            )
        return torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """[T, K + 1]: the log-probability of all other tokens comes last."""
    covered = logprobs.exp().sum(-1, keepdim=True)  # [T, 1]
    return torch.cat([logprobs, (1.0 - covered).clamp(min=TAIL_FLOOR).log()], dim=-1)
