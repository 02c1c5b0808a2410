"""Responses with everything an objective can look at, and each piece of an objective written down a
second time: one response after the other, plain loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lopd.batching import build_microbatch
from lopd.objective import LossOutput, Objective, TokenBatch
from lopd.records import Sample
from tests.objective.dense import TableModel, random_samples

CLIP = 1.5
LENGTHS = (9, 2, 31, 1, 17, 5, 12, 24)  # of 1 token: a sample without any loss token
TRUNCATED = (2, 4)


@dataclass(frozen=True)
class Row:
    """The loss tokens of one response: log-probabilities [N] each, the student's with gradient."""

    student: Tensor
    teacher: Tensor
    sampling: Tensor
    truncated: bool

    def __getitem__(self, keep: slice | list[int]) -> Row:
        return Row(self.student[keep], self.teacher[keep], self.sampling[keep], self.truncated)

    @property
    def advantage(self) -> Tensor:
        """Clipped, without gradient."""
        return (self.teacher - self.student).detach().clamp(-CLIP, CLIP)


def samples_with_everything(seed: int = 0) -> list[Sample]:
    return [
        replace(sample, truncated=index in TRUNCATED)
        for index, sample in enumerate(random_samples(LENGTHS, seed=seed))
    ]


def packed_logprobs(model: TableModel, samples: Sequence[Sample]) -> tuple[Tensor, TokenBatch]:
    """The student's log-probabilities [T] and the batch, as a trainer has them."""
    microbatch = build_microbatch(samples, pad_multiple=8)
    log_softmax = model.log_softmax(
        torch.as_tensor(microbatch.token_ids), torch.as_tensor(microbatch.position_ids)
    )
    return log_softmax.gather(1, torch.as_tensor(microbatch.labels)[:, None])[
        :, 0
    ], TokenBatch.from_microbatch(microbatch)


def packed_output(model: TableModel, samples: Sequence[Sample], objective: Objective) -> LossOutput:
    return objective(*packed_logprobs(model, samples))


def rows(model: TableModel, samples: Sequence[Sample]) -> list[Row]:
    found = []
    for sample in samples:
        token_ids = torch.as_tensor(sample.token_ids, dtype=torch.long)
        log_softmax = model.log_softmax(token_ids[:-1], torch.arange(len(sample) - 1))
        student = log_softmax[torch.arange(len(sample) - 1), token_ids[1:]]
        assert sample.teacher_logprobs is not None
        assert sample.sampling_logprobs is not None
        teacher, sampling = (
            torch.as_tensor(column[1:], dtype=student.dtype)
            for column in (sample.teacher_logprobs, sample.sampling_logprobs)
        )
        keep = np.flatnonzero(sample.loss_mask[1:]).tolist()
        found.append(Row(student, teacher, sampling, sample.truncated)[keep])
    return found


def huber_losses(row: Row) -> Tensor:
    return torch.nn.functional.huber_loss(row.student, row.teacher, reduction="none", delta=CLIP)


def response_mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.mean() for each in losses if len(each)]).mean()


def dense(model: TableModel, samples: Sequence[Sample], losses: Callable[[Row], Tensor]) -> Tensor:
    """Mean over responses of the mean of what ``losses`` makes of each."""
    return response_mean([losses(row) for row in rows(model, samples)])


def relative_difference(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def gradient(model: TableModel, loss: Tensor) -> Tensor:
    """As model.gradient, but it may be asked again."""
    return torch.autograd.grad(loss, model.tables, retain_graph=True)[0]


def gradient_difference(model: TableModel, output: LossOutput, reference: Tensor) -> float:
    """Between the gradients of an objective's output and of a reference, relative to the latter's
    largest entry.
    """
    return relative_difference(
        gradient(model, output.loss_sum / output.num_items), gradient(model, reference)
    )
