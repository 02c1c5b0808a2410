"""The SFT loss against torch's cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch

from lopd.batching import build_microbatch
from lopd.objective import Aggregation, Supervised, TokenBatch, reduce_metrics
from tests.limits import close
from tests.objective.dense import TableModel, TokenLoss, dense_loss, random_samples

LENGTHS = (9, 2, 31, 17, 5)
NLL: TokenLoss = lambda student, teacher: -student  # noqa: E731


@pytest.mark.parametrize("aggregation", ["response_mean", "token_mean", "token_sum"])
def test_loss_and_gradient_equal_the_dense_reference(aggregation: Aggregation) -> None:
    model = TableModel()
    samples = random_samples(LENGTHS)
    microbatch = build_microbatch(samples, pad_multiple=8)
    log_softmax = model.log_softmax(
        torch.as_tensor(microbatch.token_ids), torch.as_tensor(microbatch.position_ids)
    )
    logprobs = log_softmax.gather(1, torch.as_tensor(microbatch.labels)[:, None])[:, 0]
    output = Supervised(aggregation)(logprobs, TokenBatch.from_microbatch(microbatch))
    loss = output.loss_sum / output.num_items
    references = {
        name: dense_loss(model, samples, NLL, name)
        for name in ("response_mean", "token_mean", "token_sum")
    }
    close(loss, references[aggregation], rel=1e-12)
    close(model.gradient(loss), model.gradient(references[aggregation]), rel=1e-10, abs=1e-14)
    for other, reference in references.items():
        assert other == aggregation or abs(loss.item() - reference.item()) > 1e-2, (
            "control: another aggregation gives another loss"
        )


def test_reports_the_cross_entropy_over_tokens_and_its_exponential() -> None:
    """For every aggregation: the metric is per token even where the loss is not."""
    torch.manual_seed(0)
    logits = torch.randn(24, 13)
    labels = torch.randint(13, (24,))
    mask = torch.rand(24) < 0.6
    batch = TokenBatch(
        loss_mask=mask, cu_seqlens=torch.tensor([0, 10, 24], dtype=torch.int32), num_sequences=2
    )
    logprobs = torch.log_softmax(logits, -1)[torch.arange(24), labels]
    expected = torch.nn.functional.cross_entropy(logits[mask], labels[mask]).item()
    output = Supervised("response_mean")(logprobs, batch)
    reported = reduce_metrics({name: value.item() for name, value in output.metric_sums.items()})
    close(reported["nll"], expected, rel=1e-6)
    close(reported["perplexity"], math.exp(expected), rel=1e-6)
    assert (output.loss_sum / output.num_items).item() != pytest.approx(expected, rel=1e-3)
