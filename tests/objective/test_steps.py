"""StepDivergence against the product of the paper, written down with plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lopd.batching import build_microbatch
from lopd.objective import Distillation, Lightning, StepDivergence, TokenBatch, reduce_metrics
from lopd.objective.steps import EPSILON, step_bounds
from lopd.records import Sample
from tests.limits import apart, close, within
from tests.objective.dense import VOCAB_SIZE, TableModel
from tests.objective.pieces import (
    CLIP,
    gradient,
    gradient_difference,
    packed_logprobs,
    packed_output,
)

EXACT = 1e-9
DIFFERENT = 1e-2
CAP = 1.2


def agents(seed: int = 0, *, tool: float = 0.0) -> list[Sample]:
    """Responses of one to four turns with a tool between them, also one that begins with a tool.

    The teacher is further away in some turns than in others.

    Args:
        seed: The seed.
        tool: What stands in the log-probabilities of the tool's tokens.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for turns in ([5], [4, 3, 6], [1, 1], [7, 2, 3, 5], [3, 4]):
        mask: list[bool] = [False] * 4
        for number, length in enumerate(turns):
            mask += [False] * int(number > 0) * 3 + [True] * length
        mask += [False] * int(rng.integers(0, 3))
        length = len(mask)
        sizes = rng.choice([0.2, 1.0, 4.0], length)
        scores = -np.abs(rng.normal(0, 1, (2, length)) * sizes) - 0.05
        scores = np.where(mask, scores, tool).astype(np.float32)
        samples.append(
            Sample(
                rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
                np.array(mask),
                sampling_logprobs=scores[0],
                teacher_logprobs=scores[1],
            )
        )
    return samples


def steps_of(sample: Sample) -> list[list[int]]:
    """The places of the tokens of each step."""
    steps: list[list[int]] = []
    for place in range(1, len(sample)):
        if sample.loss_mask[place]:
            if not sample.loss_mask[place - 1] or not steps:
                steps.append([])
            steps[-1].append(place)
    return steps


def student_of(model: TableModel, sample: Sample) -> Tensor:
    """The log-probability of each token but the first, at the place of the token, [L]."""
    ids = torch.as_tensor(sample.token_ids, dtype=torch.long)
    rows = model.log_softmax(ids[:-1], torch.arange(len(sample) - 1))
    return torch.cat([torch.zeros(1), rows[torch.arange(len(sample) - 1), ids[1:]]])


def weights_of(model: TableModel, sample: Sample, cap: float) -> list[float]:
    """Equation 7: the product over neighbouring steps, capped; the first step has the weight 1."""
    student = student_of(model, sample).detach()
    assert sample.teacher_logprobs is not None
    teacher = torch.as_tensor(sample.teacher_logprobs).double()
    distances = [float((student - teacher)[step].abs().mean()) for step in steps_of(sample)]
    weights = [1.0]
    for k in range(1, len(distances)):
        product = 1.0
        for u in range(k):
            product *= (distances[u] + EPSILON) / (distances[u + 1] + EPSILON)
        weights.append(min(product, cap))
    return weights


def dense(model: TableModel, samples: Sequence[Sample], cap: float | None) -> Tensor:
    """The mean over responses of the mean over tokens; cap None: all weights are 1."""
    responses = []
    for sample in samples:
        student = student_of(model, sample)
        teacher = torch.as_tensor(sample.teacher_logprobs).double()
        steps = steps_of(sample)
        weights = [1.0] * len(steps) if cap is None else weights_of(model, sample, cap)
        losses = [
            weight
            * torch.nn.functional.huber_loss(
                student[step], teacher[step], reduction="none", delta=CLIP
            )
            for step, weight in zip(steps, weights, strict=True)
        ]
        responses.append(torch.cat(losses).mean())
    return torch.stack(responses).mean()


@pytest.fixture
def model() -> TableModel:
    return TableModel()


def objective(cap: float = CAP) -> Distillation:
    return Distillation(Lightning(CLIP), weightings=(StepDivergence(cap),))


def test_loss_and_gradient_are_those_of_the_papers_product(model: TableModel) -> None:
    samples = agents()
    output = packed_output(model, samples, objective())
    reference = dense(model, samples, CAP)
    close(float((output.loss_sum / output.num_items).detach()), float(reference.detach()), rel=1e-6)
    within(gradient_difference(model, output, reference), EXACT)
    apart(gradient_difference(model, output, dense(model, samples, None)), DIFFERENT, "no weights")
    # 1.7e-2 on the processors that were tried, far above EXACT.
    apart(gradient_difference(model, output, dense(model, samples, 1e9)), 5e-3, "no cap")


def test_the_weight_has_no_gradient(model: TableModel) -> None:
    """The control lets it have one: the student could lower the loss by drifting away."""
    samples = agents()
    logprobs, batch = packed_logprobs(model, samples)
    assert not StepDivergence(CAP)(logprobs, batch).requires_grad
    first, last = step_bounds(batch)
    assert batch.teacher_logprobs is not None
    distance = torch.where(batch.loss_mask, (batch.teacher_logprobs - logprobs).abs(), 0.0)
    before = torch.nn.functional.pad(distance.cumsum(0), (1, 0))
    divergence = (before[last + 1] - before[first]) / (last - first + 1)
    with_gradient = 1.0 / (divergence + 1.0)
    losses = Lightning(CLIP).token_losses(logprobs, batch)
    held = gradient(model, (losses * with_gradient.detach()).sum())
    free = gradient(model, (losses * with_gradient).sum())
    apart(float((held - free).abs().max()), DIFFERENT, "with a gradient")


def test_what_a_tool_wrote_has_no_say(model: TableModel) -> None:
    """Also where 0 or nan stands in place of its log-probabilities."""
    zeros = packed_output(model, agents(tool=0.0), objective())
    junk = packed_output(model, agents(tool=-9.0), objective())
    assert torch.equal(zeros.loss_sum, junk.loss_sum)
    assert zeros.metric_sums["step_weight"] == junk.metric_sums["step_weight"]
    logprobs, batch = packed_logprobs(model, agents(tool=float("nan")))
    weights = StepDivergence(CAP)(logprobs, batch)
    assert bool(weights.isfinite().all())
    # The control: with loss on the tool's tokens the steps are one, and every weight is 1.
    whole = [
        Sample(one.token_ids, np.arange(len(one)) >= 4, one.sampling_logprobs, one.teacher_logprobs)
        for one in agents()
    ]
    assert torch.equal(
        StepDivergence(CAP)(*packed_logprobs(model, whole)), torch.ones_like(weights)
    )


def test_a_weight_does_not_depend_on_what_is_packed_beside_it(model: TableModel) -> None:
    samples = agents()
    alone = []
    for sample in samples:
        logprobs, batch = packed_logprobs(model, [sample])
        alone.append(StepDivergence(CAP)(logprobs, batch)[batch.loss_mask])
    logprobs, batch = packed_logprobs(model, samples)
    together = StepDivergence(CAP)(logprobs, batch)[batch.loss_mask]
    assert torch.equal(torch.cat(alone), together)
    expected = [
        weight
        for sample in samples
        for step, weight in zip(steps_of(sample), weights_of(model, sample, CAP), strict=True)
        for _ in step
    ]
    np.testing.assert_allclose(together.numpy(), expected, rtol=1e-6)
    assert max(expected) == CAP, "the cap acts somewhere"
    assert min(expected) < 0.8


def test_a_step_weighs_less_the_further_the_student_is_from_the_teacher() -> None:
    """Two steps of two tokens; the second is d nats away from the teacher, the first 1 nat."""

    def second_weight(distance: float) -> float:
        mask = np.array([False, True, True, False, True, True])
        teacher = np.array([0, -1, -1, 0, -distance, -distance], np.float32)
        sample = Sample(np.arange(6, dtype=np.int32), mask, teacher, teacher)
        batch = TokenBatch.from_microbatch(build_microbatch([sample]))
        weights = StepDivergence(CAP)(torch.zeros(6, dtype=torch.float64), batch)
        return float(weights[batch.loss_mask][-1])

    for distance, expected in ((0.0, CAP), (0.5, CAP), (1.0, 1.0), (2.0, 0.5), (8.0, 0.125)):
        close(second_weight(distance), expected, rel=1e-5)


def test_one_step_is_the_plain_loss(model: TableModel) -> None:
    samples = [agents()[0]]
    plain = packed_output(model, samples, Lightning(CLIP))
    weighted = packed_output(model, samples, objective())
    assert torch.equal(plain.loss_sum, weighted.loss_sum)
    sums = {name: float(value) for name, value in weighted.metric_sums.items()}
    assert reduce_metrics(sums)["step_weight"] == 1.0
