"""The method written down a second time: dense logits, one sequence after the other, plain loops.
Nothing of lopd.objective or lopd.batching is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lopd.records import Sample

VOCAB_SIZE = 13
MAX_LEN = 64
# Takes the student's and the teacher's log-probabilities of a response's tokens [N]. Returns the
# losses [N].
TokenLoss = Callable[[Tensor, Tensor], Tensor]


def random_samples(lengths: Sequence[int], *, seed: int = 0) -> list[Sample]:
    """Samples with a prompt of about a third, a few masked tokens inside the response, teacher and
    sampling log-probabilities in -6..-0.1.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        loss_mask = (np.arange(length) >= max(1, length // 3)) & (rng.random(length) < 0.9)
        scores = rng.uniform(-6.0, -0.1, (2, length)).astype(np.float32) * loss_mask
        samples.append(
            Sample(
                rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                loss_mask,
                sampling_logprobs=scores[0],
                teacher_logprobs=scores[1],
            )
        )
    return samples


class TableModel:
    """Logits of the next token = a row for the token + a row for the position: small, and sensitive
    to an error in either.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(
            2, max(VOCAB_SIZE, MAX_LEN), VOCAB_SIZE, generator=generator, dtype=torch.float64
        ).to(dtype)
        self.tables = tables.requires_grad_()

    def log_softmax(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[T, V] for token_ids and position_ids [T]."""
        return torch.log_softmax(self.tables[0][token_ids] + self.tables[1][position_ids], dim=-1)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.tables)[0]


def dense_loss(
    model: TableModel,
    samples: Sequence[Sample],
    token_loss: TokenLoss,
    aggregation: str,
    *,
    teacher_offset: int = 0,
) -> Tensor:
    """The loss of a batch, one response at a time. teacher_offset: take the teacher's value of
    another token of the response, as a wrong shift would.
    """
    responses = []
    for sample in samples:
        token_ids = torch.as_tensor(sample.token_ids, dtype=torch.long)
        log_softmax = model.log_softmax(token_ids[:-1], torch.arange(len(sample) - 1))
        student = log_softmax[torch.arange(len(sample) - 1), token_ids[1:]]
        assert sample.teacher_logprobs is not None
        teacher = torch.roll(
            torch.as_tensor(sample.teacher_logprobs, dtype=student.dtype)[1:], teacher_offset
        )
        carries_loss = torch.as_tensor(sample.loss_mask[1:])
        if carries_loss.any():
            responses.append(token_loss(student[carries_loss], teacher[carries_loss]))
    if aggregation == "token_mean":
        return torch.cat(responses).mean()
    each = [
        losses.mean() if aggregation == "response_mean" else losses.sum() for losses in responses
    ]
    return torch.stack(each).mean()


def huber(delta: float) -> TokenLoss:
    """torch's own Huber loss."""
    return lambda student, teacher: torch.nn.functional.huber_loss(
        student, teacher, reduction="none", delta=delta
    )


def score_function(clip: float) -> TokenLoss:
    """-A * log pi_theta with A clipped and without gradient: what the method's update climbs."""
    return lambda student, teacher: -(teacher - student).detach().clamp(-clip, clip) * student
