"""Verdicts in the loss: dropped, weighted, or added to the advantage, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lopd.batching import build_microbatch
from lopd.errors import ConfigError, DataError
from lopd.objective import (
    Distillation,
    DropWrong,
    Lightning,
    LossOutput,
    TopKKL,
    VerdictReward,
    WrongWeight,
    reduce_metrics,
)
from lopd.records import Sample
from tests.limits import apart, close, within
from tests.objective.dense import TableModel
from tests.objective.pieces import (
    CLIP,
    Row,
    gradient_difference,
    huber_losses,
    packed_output,
    response_mean,
    rows,
    samples_with_everything,
)

RIGHT = (True, False, True, True, False, True, False, True)


def judged() -> list[Sample]:
    return [
        replace(sample, right=right)
        for sample, right in zip(samples_with_everything(), RIGHT, strict=True)
    ]


def shifted_huber(row: Row, shift: float) -> Tensor:
    """torch's own Huber loss towards a target that lies ``shift`` nats beside the teacher."""
    return torch.nn.functional.huber_loss(
        row.student, row.teacher + shift, reduction="none", delta=CLIP
    )


def test_each_use_of_a_verdict_is_that_of_a_plain_loop() -> None:
    model = TableModel()
    samples = judged()
    pairs = [*zip(rows(model, samples), RIGHT, strict=True)]
    plain = [huber_losses(row) for row, _ in pairs]
    dropped = [losses for losses, right in zip(plain, RIGHT, strict=True) if right]
    weighted = [(1.0 if right else 0.25) * huber_losses(row) for row, right in pairs]
    rewarded = [shifted_huber(row, 0.7 if right else -0.7) for row, right in pairs]
    loss = Lightning(CLIP)
    expected = {
        Distillation(loss): response_mean(plain),
        Distillation(loss, (DropWrong(),)): response_mean(dropped),
        Distillation(loss, weightings=(WrongWeight(0.25),)): response_mean(weighted),
        Distillation(loss, shifts=(VerdictReward(0.7),)): response_mean(rewarded),
    }
    for objective, reference in expected.items():
        output: LossOutput = packed_output(model, samples, objective)
        close(output.loss_sum / output.num_items, reference, rel=1e-6)
        within(gradient_difference(model, output, reference), 1e-6)
        # The control: no use is that of another one.
        for other, value in expected.items():
            if other != objective:
                apart(gradient_difference(model, output, value), 1e-2)


def test_the_figures_are_those_of_the_teacher_but_for_what_is_clipped() -> None:
    model = TableModel()
    plain, moved = (
        reduce_metrics(
            {
                name: value.item()
                for name, value in packed_output(model, judged(), objective).metric_sums.items()
            }
        )
        for objective in (
            Distillation(Lightning(CLIP)),
            Distillation(Lightning(CLIP), shifts=(VerdictReward(0.7),)),
        )
    )
    counts = [(len(row.student), right) for row, right in zip(rows(model, judged()), RIGHT)]  # noqa: B905
    share = sum(count for count, right in counts if right) / sum(count for count, _ in counts)
    close(moved["right_share"], share, rel=1e-12)
    assert moved["advantage"] == plain["advantage"]
    assert moved["reverse_kl"] == plain["reverse_kl"]
    close(moved["shifted_advantage"] - plain["advantage"], 0.7 * (2 * share - 1), rel=1e-6)
    assert moved["clipped_share"] != plain["clipped_share"]


def test_a_top_k_loss_takes_the_weight_of_a_response_but_no_shift() -> None:
    Distillation(TopKKL(), (DropWrong(),), (WrongWeight(0.5),))
    with pytest.raises(ConfigError, match="VerdictReward cannot be used with a top-K KL"):
        Distillation(TopKKL(), shifts=(VerdictReward(0.5),))


def test_a_microbatch_carries_the_verdicts_and_padding_has_none() -> None:
    samples = judged()
    batch = build_microbatch(samples, pad_multiple=64)
    assert batch.right is not None
    assert batch.right.tolist() == [*RIGHT, False]
    assert build_microbatch(samples_with_everything()).right is None
    with pytest.raises(DataError, match="only 7 of 8 samples of a microbatch have right"):
        build_microbatch([*samples[:-1], replace(samples[-1], right=None)])
