"""The Lightning OPD update against a dense autograd reference, with controls that must differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lopd.batching import build_microbatch
from lopd.objective import Aggregation, Lightning, LossOutput, TokenBatch, reduce_metrics
from lopd.records import Sample
from tests.limits import apart, close, within
from tests.objective.dense import TableModel, dense_loss, huber, random_samples, score_function

CLIP = 1.5
AGGREGATIONS: tuple[Aggregation, ...] = ("response_mean", "token_mean", "token_sum")
# Relative to the largest entry of the gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
LENGTHS = (9, 2, 31, 1, 17, 5, 12)  # of 1 token: a sample without any loss token


def packed_output(model: TableModel, samples: list[Sample], objective: Lightning) -> LossOutput:
    """What a trainer does with one microbatch, padded to a multiple of 8."""
    microbatch = build_microbatch(samples, pad_multiple=8)
    log_softmax = model.log_softmax(
        torch.as_tensor(microbatch.token_ids), torch.as_tensor(microbatch.position_ids)
    )
    logprobs = log_softmax.gather(1, torch.as_tensor(microbatch.labels)[:, None])[:, 0]
    return objective(logprobs, TokenBatch.from_microbatch(microbatch))


def relative_difference(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request: pytest.FixtureRequest) -> TableModel:
    return TableModel(request.param)


@pytest.fixture
def samples() -> list[Sample]:
    return random_samples(LENGTHS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
class TestUpdate:
    def test_is_the_negative_gradient_of_the_dense_huber_loss(
        self, model: TableModel, samples: list[Sample], aggregation: Aggregation
    ) -> None:
        output = packed_output(model, samples, Lightning(CLIP, aggregation))
        loss = output.loss_sum / output.num_items
        reference = dense_loss(model, samples, huber(CLIP), aggregation)
        tolerance = TOLERANCE[loss.dtype]
        within(relative_difference(loss, reference), tolerance)
        within(relative_difference(model.gradient(loss), model.gradient(reference)), tolerance)

    def test_is_the_score_function_form(
        self, model: TableModel, samples: list[Sample], aggregation: Aggregation
    ) -> None:
        output = packed_output(model, samples, Lightning(CLIP, aggregation))
        gradient = model.gradient(output.loss_sum / output.num_items)
        reference = model.gradient(dense_loss(model, samples, score_function(CLIP), aggregation))
        within(relative_difference(gradient, reference), TOLERANCE[gradient.dtype])

    def test_clip_acts_on_some_tokens_and_not_on_others(
        self, model: TableModel, samples: list[Sample], aggregation: Aggregation
    ) -> None:
        output = packed_output(model, samples, Lightning(CLIP, aggregation))
        clipped_share = reduce_metrics(
            {name: value.item() for name, value in output.metric_sums.items()}
        )["clipped_share"]
        assert 0.2 < clipped_share < 0.8

    def test_differs_from_wrong_references(
        self, model: TableModel, samples: list[Sample], aggregation: Aggregation
    ) -> None:
        """Control: no clip, another aggregation, or teacher values off by one token are all far
        outside of the tolerance.
        """
        output = packed_output(model, samples, Lightning(CLIP, aggregation))
        gradient = model.gradient(output.loss_sum / output.num_items)
        wrong = {
            "unclipped": dense_loss(model, samples, huber(1e9), aggregation),
            "shift by one": dense_loss(model, samples, huber(CLIP), aggregation, teacher_offset=1),
            **{
                other: dense_loss(model, samples, huber(CLIP), other)
                for other in AGGREGATIONS
                if other != aggregation
            },
        }
        for name, loss in wrong.items():
            apart(relative_difference(gradient, model.gradient(loss)), 1e-2, name)


def test_loss_and_gradient_vanish_where_student_equals_teacher(samples: list[Sample]) -> None:
    """The optimum of the method; one nat away the loss is 1/2."""
    microbatch = build_microbatch(samples)
    batch = TokenBatch.from_microbatch(microbatch)
    assert batch.teacher_logprobs is not None
    for distance, loss in ((0.0, 0.0), (1.0, 0.5)):
        logprobs = (batch.teacher_logprobs - distance).requires_grad_()
        output = Lightning(CLIP)(logprobs, batch)
        close((output.loss_sum / output.num_items).item(), loss, abs=1e-6)
        (gradient,) = torch.autograd.grad(output.loss_sum, logprobs)
        assert bool((gradient != 0).any()) is (distance > 0)


def test_positions_without_loss_get_no_gradient_whatever_stands_there(
    samples: list[Sample],
) -> None:
    microbatch = build_microbatch(samples, pad_multiple=8)
    batch = TokenBatch.from_microbatch(microbatch)
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(len(microbatch.labels), generator=generator)
    poisoned = torch.where(batch.loss_mask, logprobs, torch.nan)
    outputs = []
    for values in (logprobs.requires_grad_(), poisoned.requires_grad_()):
        output = Lightning(CLIP)(values, batch)
        (gradient,) = torch.autograd.grad(output.loss_sum, values)
        assert torch.all(gradient[~batch.loss_mask] == 0)
        assert torch.all(gradient[batch.loss_mask] != 0)
        outputs.append(output)
    assert outputs[0].loss_sum == outputs[1].loss_sum
    assert outputs[0].metric_sums == outputs[1].metric_sums


def test_only_padding_gives_zero_items_and_the_same_metric_names(samples: list[Sample]) -> None:
    """A rank without samples takes part: finite zeros that can be stacked with the sums of the
    others.
    """
    model = TableModel()
    objective = Lightning(CLIP)
    empty = packed_output(model, [], objective)
    full = packed_output(model, samples, objective)
    assert empty.num_items.item() == 0
    assert empty.loss_sum.item() == 0.0
    assert torch.all(model.gradient(empty.loss_sum) == 0)
    assert list(empty.metric_sums) == list(full.metric_sums)
    assert all(value.item() == 0.0 for value in empty.metric_sums.values())


def test_num_items_counts_what_the_aggregation_divides_by(samples: list[Sample]) -> None:
    loss_tokens = [int(sample.loss_mask[1:].sum()) for sample in samples]
    assert 0 in loss_tokens, "the case of a response without loss must be in the data"
    num_responses = sum(count > 0 for count in loss_tokens)
    expected = {
        "response_mean": num_responses,
        "token_sum": num_responses,
        "token_mean": sum(loss_tokens),
    }
    for aggregation in AGGREGATIONS:
        output = packed_output(TableModel(), samples, Lightning(CLIP, aggregation))
        assert output.num_items.dtype is torch.int32
        assert output.num_items.item() == expected[aggregation]
