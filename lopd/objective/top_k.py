"""KL between student and teacher over the teacher's K likeliest tokens.

At every state of the rollouts it is an exact sum over tokens instead of one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lopd.deferred import deferred
from lopd.objective.aggregation import Aggregation
from lopd.objective.interface import TokenBatch, without_gradient
from lopd.objective.metrics import distillation_sums
from lopd.records import TAIL_FLOOR

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class TopKKL:
    """The KL over the teacher's K likeliest tokens, in nats per token.

        reverse   KL(student || teacher) = sum_k q_k (log q_k - log p_k)
        forward   KL(teacher || student) = sum_k p_k (log p_k - log q_k)

    p and q are the teacher's and the student's probabilities of the teacher's K likeliest tokens,
    from teacher_top_logprobs and student_top_logprobs [T, K].

    The gradient is that of the divergence itself at each state, by autograd. The sampled token
    plays no part. So there is no sampling noise, no advantage to clip, and no importance weight to
    apply. The states are still those of the rollouts.

    The metrics are ``top_k_kl``, ``student_tail`` and ``teacher_tail`` (the mean probability
    outside of the K tokens), and those of distillation_sums.

    Attributes:
        direction: Which of the two divergences.
        support: What happens to the rest of the vocabulary. ``tail`` makes it one more outcome, of
            probability 1 - sum, at least TAIL_FLOOR. The result is a lower bound of the KL over the
            vocabulary, and exact for K = V. ``renormalised`` divides p and q by their sums. Then
            the loss does not see how much probability the student puts outside of the K tokens. So
            it alone cannot bring back what has leaked there.
        aggregation: How token losses become the loss of a batch; see token_weights.
    """

    direction: Literal["reverse", "forward"] = "reverse"
    support: Literal["tail", "renormalised"] = "tail"
    aggregation: Aggregation = "response_mean"

    @property
    def advantage_clip(self) -> float:
        """Return infinity: the gradient of a divergence needs no clip."""
        return math.inf

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the KL at every position [T]. It is 0 where there is no loss.

        Args:
            logprobs: The student's log-probabilities of the labels [T]. Only their shape and device
                are used.
            batch: The packed sequences, with teacher_top_logprobs and student_top_logprobs.
        """
        if batch.num_sequences == 0:
            # A microbatch of padding alone has no top-K columns. The rank must still run a backward
            # pass, because the others wait for it in the gradient's collectives. So the loss keeps
            # its connection to the model.
            return 0.0 * logprobs
        student, teacher = self._on_support(batch)  # [T, K] or [T, K + 1]
        # KL(first || second). The expectation is over the first, so the forward KL weights the
        # student's error at a token by the teacher's probability.
        first, second = (student, teacher) if self.direction == "reverse" else (teacher, student)
        return (first.exp() * (first - second)).sum(-1)

    @without_gradient
    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        """Return the metrics as sums; see the class."""
        kl = self.token_losses(logprobs, batch).double().sum()
        tails = dict.fromkeys(("student_tail", "teacher_tail"), torch.zeros_like(kl))
        # Padding alone has no top-K columns; its sums stay 0, under the same keys.
        if batch.num_sequences:
            student, teacher = self._chosen(batch)
            for name, values in (("student_tail", student), ("teacher_tail", teacher)):
                outside = 1.0 - values.double().exp().sum(-1)
                tails[name] = torch.where(batch.loss_mask, outside, 0.0).sum()
        sums = distillation_sums(logprobs, batch, advantage_clip=math.inf, ends=ends)
        return {**sums, "top_k_kl": kl, **tails}

    def _chosen(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return both log-probabilities [T, K], equal and without gradient where no loss is."""
        student = batch.student_top_logprobs
        teacher = batch.teacher_top_logprobs
        assert student is not None, "a top-K KL needs student_top_logprobs"
        assert teacher is not None, "a top-K KL needs teacher_top_logprobs"
        mask = batch.loss_mask[:, None]
        # A student with fewer rows than the teacher gives some of the K tokens no probability at
        # all. Such a token cannot be learnt, so it counts among the other tokens for both.
        teacher = torch.where(torch.isneginf(student), -math.inf, teacher)
        # Equal values make the KL 0 without loss. This value gives the K tokens a probability of
        # 1/2 together, so that the logarithm of the tail, the other half, is finite too.
        even = -math.log(2 * student.shape[1])
        return torch.where(mask, student, even), torch.where(mask, teacher.to(student.dtype), even)

    def _on_support(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's log-probabilities on the support."""
        student, teacher = self._chosen(batch)
        unknown = torch.isneginf(student)  # [T, K]
        if self.support == "renormalised":
            # Two equal numbers add nothing to the KL, where -inf - (-inf) would be nan.
            return (
                torch.log_softmax(student, -1).masked_fill(unknown, 0.0),
                torch.log_softmax(teacher, -1).masked_fill(unknown, 0.0),
            )
        unknown = torch.nn.functional.pad(unknown, (0, 1))  # [T, K + 1]: the tail is known.
        student = _with_tail(student).masked_fill(unknown, 0.0)
        return student, self._teacher_with_tail(teacher, batch).masked_fill(unknown, 0.0)

    def _teacher_with_tail(self, teacher: Tensor, batch: TokenBatch) -> Tensor:
        """Append the teacher's log-probability of all other tokens: [T, K] becomes [T, K + 1]."""
        tail = batch.teacher_tail_logprob
        if tail is None:
            return _with_tail(teacher)
        # The cache has the tail from a sum in float64, which keeps a small tail where 1 - sum in
        # float32 is rounding. Where there is no loss the tail is the other half, as in _chosen.
        known = torch.where(batch.loss_mask, tail.to(teacher.dtype), -math.log(2))[:, None]
        # Tokens that the student does not know are other tokens, so their probability is added.
        top = batch.teacher_top_logprobs
        assert top is not None, "a top-K KL needs teacher_top_logprobs"
        moved = torch.where(torch.isneginf(teacher), top.to(teacher.dtype), -math.inf)
        known = torch.logsumexp(torch.cat([known, moved], dim=-1), dim=-1, keepdim=True)
        return torch.cat([teacher, known], dim=-1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: [T, K] becomes [T, K + 1]."""
    covered = logprobs.exp().sum(-1, keepdim=True)  # [T, 1]
    # Rounding can bring the sum of K probabilities above 1, where the logarithm would be nan.
    return torch.cat([logprobs, (1.0 - covered).clamp(min=TAIL_FLOOR).log()], dim=-1)
