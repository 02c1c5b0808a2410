"""The delta of teacher and base as the advantage: against a plain loop, and where it rests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lopd.objective import Delta, Distillation, Lightning, TokenBatch, reduce_metrics
from lopd.records import Sample, float32
from tests.limits import apart, close, within
from tests.objective.dense import TableModel
from tests.objective.pieces import (
    CLIP,
    gradient_difference,
    packed_output,
    response_mean,
    rows,
    samples_with_everything,
)

OBJECTIVE = Distillation(Lightning(CLIP), shifts=(Delta(),))


def with_base(seed: int = 5) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        replace(sample, base_logprobs=float32(rng.uniform(-6, -0.1, len(sample))))
        for sample in samples_with_everything()
    ]


def test_the_advantage_is_the_difference_anchored_at_the_sampling_policy() -> None:
    model = TableModel()
    samples = with_base()
    losses = []
    for sample, row in zip(samples, rows(model, samples), strict=True):
        assert sample.base_logprobs is not None
        base = torch.as_tensor(sample.base_logprobs[1:].astype(np.float64))
        base = base[torch.as_tensor(sample.loss_mask[1:])]
        # The update as the score function has it: the advantage is detached and clipped.
        student = row.student.detach()
        advantage = ((row.teacher - base) - (student - row.sampling)).clamp(-CLIP, CLIP)
        losses.append(-advantage * row.student)
    output = packed_output(model, samples, OBJECTIVE)
    within(gradient_difference(model, output, response_mean(losses)), 1e-6)
    # The control: the plain advantage is another one.
    plain = packed_output(model, samples, Distillation(Lightning(CLIP)))
    apart(gradient_difference(model, plain, response_mean(losses)), 1e-2)
    sums = {name: value.item() for name, value in output.metric_sums.items()}
    assert {"delta", "shifted_advantage"} <= reduce_metrics(sums).keys()


def test_at_the_start_it_is_the_delta_and_it_ends_where_the_student_has_moved_as_far() -> None:
    sampling, teacher, base = torch.tensor([[-2.0, -1.0], [-0.5, -3.0], [-1.5, -2.5]])

    def gradient(student: torch.Tensor) -> torch.Tensor:
        student = student.clone().requires_grad_()
        batch = TokenBatch(
            torch.ones(2, dtype=torch.bool),
            torch.tensor([0, 2], dtype=torch.int32),
            1,
            teacher_logprobs=teacher,
            sampling_logprobs=sampling,
            base_logprobs=base,
        )
        OBJECTIVE(student, batch).loss_sum.backward()
        assert student.grad is not None
        return -2 * student.grad

    close(gradient(sampling)[0], teacher[0] - base[0], rel=1e-6)
    within(gradient(sampling + teacher - base).abs().max(), 1e-6)
    assert torch.all(gradient(teacher).abs() > 0.1), "the teacher itself is no resting point"
