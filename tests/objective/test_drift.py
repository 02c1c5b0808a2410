"""When fresh responses are due: by steps, by the effective sample share, by chi-square, whichever
comes first; on figures as a step reports them.
"""

from __future__ import annotations

import math

import pytest
import torch

from lopd.config import DistillSection, RefreshSection
from lopd.errors import ConfigError, DataError
from lopd.objective import Lightning, TokenBatch, reduce_metrics
from lopd.objective.drift import RefreshRule

FRESH = {"effective_sample_share": 1.0, "chi_square": 0.0}


def figures(log_weight_spread: float) -> dict[str, float]:
    """Of a step whose tokens' log weights are normal with this spread and mean weight 1, through
    the objective and the reduction of a real step.
    """
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    sampling = torch.full((count,), -3.0)
    logprobs = (
        sampling
        + torch.randn(count, generator=generator) * log_weight_spread
        - log_weight_spread**2 / 2
    )
    batch = TokenBatch(
        loss_mask=torch.ones(count, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        num_sequences=1,
        teacher_logprobs=sampling,
        sampling_logprobs=sampling,
    )
    return reduce_metrics(
        {name: value.item() for name, value in Lightning()(logprobs, batch).metric_sums.items()}
    )


def test_never_without_a_bound() -> None:
    assert all(
        RefreshRule().reason(steps, {"effective_sample_share": 0.0, "chi_square": math.inf}) is None
        for steps in (1, 10, 10_000)
    )


def test_every_so_many_steps_of_the_present_responses() -> None:
    rule = RefreshRule(every=3)
    assert [rule.reason(steps, FRESH) is not None for steps in (1, 2, 3, 4)] == [
        False,
        False,
        True,
        True,
    ]
    assert RefreshRule(every=1).reason(1, FRESH) == "1 step"


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_bounds_act_where_the_closed_form_says(spread: float) -> None:
    """Log-normal weights of mean 1: E[w^2] = exp(spread^2), so chi-square is exp(spread^2) - 1 and
    the effective share exp(-spread^2).
    """
    chi_square = math.expm1(spread**2)
    share = math.exp(-(spread**2))
    measured = figures(spread)
    for factor, due in ((0.9, True), (1.1, False)):
        assert (
            RefreshRule(max_chi_square=chi_square * factor).reason(5, measured) is not None
        ) is due
        assert (
            RefreshRule(min_effective_share=min(share / factor, 0.999)).reason(5, measured)
            is not None
        ) is due


def test_whichever_comes_first_and_it_says_which() -> None:
    rule = RefreshRule(every=10, min_effective_share=0.5, max_chi_square=2.0)
    assert rule.reason(9, FRESH) is None
    assert (
        rule.reason(9, {"effective_sample_share": 0.4, "chi_square": 1.0})
        == "effective sample share 0.400 < 0.5"
    )
    assert (
        rule.reason(9, {"effective_sample_share": 0.6, "chi_square": 2.5}) == "chi-square 2.500 > 2"
    )
    assert rule.reason(10, FRESH) == "10 steps"


def test_a_bound_without_figures_is_refused_and_steps_alone_need_none() -> None:
    with pytest.raises(DataError, match="no sampling log-probabilities"):
        RefreshRule(max_chi_square=1.0).reason(1, {"loss": 0.1})
    assert RefreshRule(every=2).reason(1, {"loss": 0.1}) is None


def test_the_rule_of_a_configuration_and_knobs_that_change_nothing() -> None:
    section = DistillSection(
        num_steps=20, refresh=RefreshSection(every=5, max_chi_square=0.5, num_responses=64)
    )
    assert RefreshRule.from_config(section) == RefreshRule(5, None, 0.5)
    assert str(RefreshRule.from_config(section)) == "refresh: every 5 steps or chi-square above 0.5"
    assert str(RefreshRule.from_config(DistillSection())) == "refresh: never"
    with pytest.raises(ConfigError, match="num_responses has no effect without a refresh"):
        RefreshRule.from_config(DistillSection(refresh=RefreshSection(num_responses=64)))
    with pytest.raises(ConfigError, match="ends before the first refresh"):
        RefreshRule.from_config(DistillSection(num_steps=20, refresh=RefreshSection(every=20)))
    assert (
        RefreshRule.from_config(
            DistillSection(num_steps=20, refresh=RefreshSection(every=20, max_chi_square=1.0))
        ).every
        == 20
    )
