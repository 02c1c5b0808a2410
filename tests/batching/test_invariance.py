"""Neither packing nor the number of ranks changes what is learned: sums over microbatches and ranks
give one loss, one gradient, one set of metrics.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopd.batching import build_microbatch, plan_step
from lopd.objective import Aggregation, Lightning, LossOutput, TokenBatch, reduce_metrics
from lopd.records import Sample
from tests.limits import apart, close
from tests.objective.dense import TableModel, random_samples

AGGREGATIONS: tuple[Aggregation, ...] = ("response_mean", "token_mean", "token_sum")


def step_outputs(
    model: TableModel,
    samples: list[Sample],
    objective: Lightning,
    num_ranks: int,
    max_tokens: int,
    pad_multiple: int,
) -> list[LossOutput]:
    """The outputs of all microbatches of all ranks, in the order in which ranks would run them one
    after the other.
    """
    outputs = []
    for microbatches in plan_step(
        [len(sample) for sample in samples], num_ranks, max_tokens, pad_multiple
    ):
        for members in microbatches:
            microbatch = build_microbatch([samples[index] for index in members], pad_multiple)
            log_softmax = model.log_softmax(
                torch.as_tensor(microbatch.token_ids), torch.as_tensor(microbatch.position_ids)
            )
            logprobs = log_softmax.gather(1, torch.as_tensor(microbatch.labels)[:, None])[:, 0]
            outputs.append(objective(logprobs, TokenBatch.from_microbatch(microbatch)))
    return outputs


def step_loss(outputs: list[LossOutput]) -> Tensor:
    """As the trainer divides: once, by the global number of items."""
    return (
        torch.stack([output.loss_sum for output in outputs]).sum()
        / torch.stack([output.num_items for output in outputs]).sum()
    )


def step_metrics(outputs: list[LossOutput]) -> dict[str, float]:
    summed: Counter[str] = Counter()
    for output in outputs:
        summed.update({name: value.item() for name, value in output.metric_sums.items()})
    return reduce_metrics(summed)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=3, max_size=12),
    num_ranks=st.integers(1, 5),
    max_tokens=st.integers(32, 100),
    pad_multiple=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_loss_gradient_and_metrics_do_not_depend_on_the_layout(
    aggregation: Aggregation,
    lengths: list[int],
    num_ranks: int,
    max_tokens: int,
    pad_multiple: int,
    seed: int,
) -> None:
    model = TableModel()
    objective = Lightning(advantage_clip=1.5, aggregation=aggregation)
    samples = random_samples([*lengths, 24], seed=seed)  # one that surely carries loss
    whole = step_outputs(model, samples, objective, 1, 10_000, 1)
    assert len(whole) == 1
    cut = step_outputs(model, samples, objective, num_ranks, max_tokens, pad_multiple)
    close(step_loss(cut), step_loss(whole), rel=1e-12)
    close(model.gradient(step_loss(cut)), model.gradient(step_loss(whole)), rel=1e-10, abs=1e-13)
    close(step_metrics(cut), step_metrics(whole), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_averaging_the_means_of_microbatches_would_depend_on_it(aggregation: Aggregation) -> None:
    """Control: to divide in each microbatch and then average is the mistake that sums avoid."""
    model = TableModel()
    objective = Lightning(advantage_clip=1.5, aggregation=aggregation)
    samples = random_samples([30, 3, 4, 5, 28, 6, 3])
    whole = step_loss(step_outputs(model, samples, objective, 1, 10_000, 1))
    cut = step_outputs(model, samples, objective, 2, 40, 1)
    assert len(cut) > 1
    mean_of_means = torch.stack([output.loss_sum / output.num_items for output in cut]).mean()
    apart(abs(mean_of_means / whole - 1).item(), 1e-3)
