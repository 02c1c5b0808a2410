"""Reverse KL from frozen samples by exact enumeration, the other figures by their definitions, and
the reduction of sums.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lopd.errors import DataError
from lopd.objective import Lightning, TokenBatch, reduce_metrics, reverse_kl_terms
from lopd.objective.quantiles import SHARES, advantage_counts, advantage_quantiles
from tests.limits import close

NUM_STATES = 5
VOCAB_SIZE = 11


def random_policies(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log pi of sampler, student and teacher in each of a few states, float64 [states, V]; the
    student has moved about half a nat from the sampler.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, NUM_STATES, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    sampling = torch.log_softmax(logits[0], -1)
    student = torch.log_softmax(logits[0] + 0.7 * logits[1], -1)
    teacher = torch.log_softmax(logits[0] + logits[2], -1)
    return sampling, student, teacher


def exact_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)  # [states]


class TestReverseKl:
    def test_estimator_is_unbiased(self) -> None:
        """Its expectation over every token that the sampler can choose is the KL of each state, to
        1e-12.
        """
        sampling, student, teacher = random_policies()
        expectation = (sampling.exp() * reverse_kl_terms(student, teacher, sampling)).sum(-1)
        close(expectation, exact_reverse_kl(student, teacher), rel=1e-12, abs=1e-12)

    def test_without_the_weight_it_is_biased(self) -> None:
        """Control: pretending that the current student did the sampling is off by 2% to 16%, and
        exact only where it did.
        """
        sampling, student, teacher = random_policies()
        unweighted = reverse_kl_terms(student, teacher, student)
        truth = exact_reverse_kl(student, teacher)
        assert torch.all(((sampling.exp() * unweighted).sum(-1) / truth - 1).abs() > 0.015)
        close((student.exp() * unweighted).sum(-1), truth, rel=1e-12, abs=1e-12)

    def test_reported_figure_is_the_mean_over_the_rollouts_tokens(self) -> None:
        """A rollout that holds each token as often as the sampler would choose it in 1000 draws
        reports the exact KL of that empirical sampler.
        """
        counts = torch.tensor([500, 300, 150, 50])
        sampling = (counts.double() / 1000).log()
        student = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64).log()
        teacher = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
        drawn = torch.repeat_interleave(torch.arange(4), counts)
        reported = metrics(student[drawn], teacher[drawn], sampling[drawn])
        close(reported["reverse_kl"], exact_reverse_kl(student, teacher).item(), rel=1e-12)
        close(reported["weight"], 1.0, rel=1e-12)
        chi2 = float((student.exp() ** 2 / sampling.exp()).sum()) - 1
        close(reported["weight_squared"], 1 + chi2, rel=1e-12)
        close(reported["effective_sample_share"], 1 / (1 + chi2), rel=1e-12)

    @given(st.lists(st.tuples(*[st.floats(-1e4, 0.0)] * 3), min_size=1, max_size=20))
    def test_terms_are_finite_and_never_negative(
        self, rows: list[tuple[float, float, float]]
    ) -> None:
        student, teacher, sampling = torch.tensor(rows, dtype=torch.float64).T
        terms = reverse_kl_terms(student, teacher, sampling)
        assert torch.all(torch.isfinite(terms))
        assert torch.all(terms >= 0)

    def test_caps_only_act_on_absurd_ratios(self) -> None:
        """Below e^20 the term is the formula as written; beyond it is smaller than the formula, not
        larger.
        """
        sampling = torch.tensor([-1.0, -19.0, -30.0], dtype=torch.float64)
        student = torch.tensor([-18.0, -1.0, -1.0], dtype=torch.float64)
        teacher = torch.tensor([-0.5, -3.0, -4.0], dtype=torch.float64)
        advantage = teacher - student
        weight = (student - sampling).exp()
        plain = weight * (advantage.exp() - 1 - advantage)
        terms = reverse_kl_terms(student, teacher, sampling)
        close(terms[:2], plain[:2], rel=1e-9)
        assert 0 < terms[2] < plain[2] / 100


def metrics(
    student: Tensor, teacher: Tensor, sampling: Tensor | None, clip: float = 10.0
) -> dict[str, float]:
    """Reported metrics of one sequence of loss tokens."""
    batch = TokenBatch(
        loss_mask=torch.ones(len(student), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(student)], dtype=torch.int32),
        num_sequences=1,
        teacher_logprobs=teacher,
        sampling_logprobs=sampling,
    )
    output = Lightning(clip)(student, batch)
    assert not any(value.requires_grad for value in output.metric_sums.values())
    assert all(value.dtype is torch.float64 for value in output.metric_sums.values())
    return reduce_metrics({name: value.item() for name, value in output.metric_sums.items()})


def test_advantage_figures_are_those_of_the_unclipped_advantage() -> None:
    rng = np.random.default_rng(5)
    student, teacher = rng.uniform(-5, -0.1, (2, 400))
    reported = metrics(torch.tensor(student), torch.tensor(teacher), None, clip=2.0)
    advantage = teacher - student
    close(reported["advantage"], advantage.mean(), rel=1e-12)
    close(reported["advantage_std"], advantage.std(), rel=1e-9)
    close(reported["clipped_share"], (np.abs(advantage) > 2.0).mean(), rel=1e-12)
    assert reported["advantage"] != pytest.approx(np.clip(advantage, -2, 2).mean(), rel=1e-3)


def test_the_quantiles_of_the_advantage_are_those_of_all_microbatches() -> None:
    rng = np.random.default_rng(8)
    student = torch.tensor(rng.uniform(-3, -0.1, 4000))
    teacher = student + torch.tensor(rng.standard_t(3, 4000) * 0.5)
    mask = torch.tensor(rng.random(4000) < 0.7)
    advantage = (teacher - student)[mask].numpy()
    # In two parts, as two microbatches or two ranks have them.
    parts = [
        advantage_counts((teacher - student)[part], mask[part])
        for part in (slice(0, 1500), slice(1500, None))
    ]
    summed = {name: float(parts[0][name] + parts[1][name]) for name in parts[0]}
    quantiles = advantage_quantiles({**summed, "num_tokens": float(mask.sum())})
    assert [*quantiles] == [*SHARES]
    for name, value in quantiles.items():
        exact = float(np.quantile(advantage, SHARES[name]))
        # Between two thresholds, of which one is 1.78 times the other.
        assert abs(value - exact) <= 0.8 * abs(exact) + 0.002, name
    assert advantage_quantiles({"num_tokens": 4.0}) == {}


def test_a_masked_token_moves_no_quantile() -> None:
    advantage = torch.tensor([-0.5, -0.5, -0.5, 20.0])
    for mask, below in (([1, 1, 1, 0], True), ([1, 1, 1, 1], False)):
        counts = advantage_counts(advantage, torch.tensor(mask, dtype=torch.bool))
        summed = {name: float(value) for name, value in counts.items()}
        quantiles = advantage_quantiles({**summed, "num_tokens": float(sum(mask))})
        # The control is the token that counts.
        assert (quantiles["advantage_p95"] < 0) == below


def test_a_quantile_beyond_all_thresholds_is_the_last_one() -> None:
    for sign in (-1, 1):
        counts = advantage_counts(sign * torch.full((4,), 1e6), ONES)
        summed = {name: float(value) for name, value in counts.items()}
        for value in advantage_quantiles({**summed, "num_tokens": 4.0}).values():
            assert value == pytest.approx(sign * 10 ** (22 / 4 - 4))


ONES = torch.ones(4, dtype=torch.bool)


def test_the_gap_of_the_gradient_and_its_bound() -> None:
    rng = np.random.default_rng(6)
    student, teacher, sampling = rng.uniform(-3, -0.1, (3, 400))
    reported = metrics(*(torch.tensor(values) for values in (student, teacher, sampling)))
    weight = np.exp(student - sampling)
    advantage = teacher - student
    close(reported["gradient_gap"], np.abs((weight - 1) * advantage).mean(), rel=1e-9)
    close(
        reported["gradient_gap_bound"],
        np.sqrt((advantage**2).mean() * ((weight - 1) ** 2).mean()),
        rel=1e-9,
    )
    assert reported["gradient_gap"] < reported["gradient_gap_bound"]
    assert reported["gradient_gap_bound"] != pytest.approx(
        reported["advantage_std"] * np.sqrt(reported["chi_square"]), rel=1e-3
    ), "control: spread, E[w] = 1"
    same = torch.tensor(sampling)
    at_the_start = metrics(same, torch.tensor(teacher), same)
    assert at_the_start["gradient_gap"] == at_the_start["gradient_gap_bound"] == 0.0


def test_figures_that_need_sampling_logprobs_are_left_out_without_them() -> None:
    values = torch.full((3,), -1.0)
    assert (
        not {"reverse_kl", "gradient_gap", "gradient_gap_bound"}
        & metrics(values, values, None).keys()
    )
    assert metrics(values, values, values)["reverse_kl"] == 0.0


def test_a_step_without_loss_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no token of this step carries loss"):
        reduce_metrics({"num_tokens": 0.0, "num_responses": 0.0, "nll": 0.0})


def test_weights_of_whole_responses_and_of_tokens() -> None:
    """Two responses whose tokens became e^0.1 and e^-0.3 times as likely."""
    sampling = torch.full((5,), -1.0, dtype=torch.float64)
    student = sampling + torch.tensor([0.1, 0.1, -0.3, -0.3, -0.3], dtype=torch.float64)
    batch = TokenBatch(
        torch.ones(5, dtype=torch.bool),
        torch.tensor([0, 2, 5]),
        2,
        teacher_logprobs=sampling,
        sampling_logprobs=sampling,
    )
    reported = reduce_metrics(
        {name: value.item() for name, value in Lightning()(student, batch).metric_sums.items()}
    )
    close(reported["sequence_log_weight"], (0.2 - 0.9) / 2, rel=1e-9)
    close(reported["sequence_log_weight_std"], (0.2 + 0.9) / 2, rel=1e-9)
    close(reported["chi_square"], np.mean(np.exp(2 * (student - sampling).numpy())) - 1, rel=1e-9)


def test_student_entropy_is_reported_where_the_trainer_gives_it() -> None:
    values = torch.full((3,), -1.0)
    batch = TokenBatch(
        torch.tensor([True, True, False]), torch.tensor([0, 3]), 1, teacher_logprobs=values
    )
    assert "student_entropy" not in reduce_metrics(
        {name: value.item() for name, value in Lightning()(values, batch).metric_sums.items()}
    )
    given = replace(batch, student_entropy=torch.tensor([1.0, 2.0, torch.nan]))
    assert (
        reduce_metrics(
            {name: value.item() for name, value in Lightning()(values, given).metric_sums.items()}
        )["student_entropy"]
        == 1.5
    )


def test_parts_are_reduced_among_their_like() -> None:
    sums = {
        "num_tokens": 4.0,
        "advantage": 4.0,
        "advantage_squared": 4.0,
        "num_tokens/x": 1.0,
        "advantage/x": 3.0,
        "advantage_squared/x": 9.0,
    }
    assert reduce_metrics(sums) == {
        "num_tokens": 4.0,
        "advantage": 1.0,
        "advantage_std": 0.0,
        "num_tokens/x": 1.0,
        "advantage/x": 3.0,
        "advantage_std/x": 0.0,
    }
    empty = reduce_metrics({**sums, "num_tokens/x": 0.0})
    assert "advantage/x" not in empty
