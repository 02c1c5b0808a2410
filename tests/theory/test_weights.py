"""The mean of w = pi_theta / pi_ref over the tokens of rollouts: what it is for rollouts at
temperature 1, and what it is not for others.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.limits import apart, close
from tests.theory.tabular import (
    expected_update,
    log_policy,
    on_tokens,
    per_response,
    random_logits,
    response_probabilities,
    visits,
)


def mean_weight(sampler: Tensor, student: Tensor, recorded: Tensor) -> float:
    """Mean over the tokens of rollouts by ``sampler`` of pi_theta / pi_recorded; log pi [states, V]
    each.
    """
    probabilities = response_probabilities(sampler)
    # Tokens that are never sampled have no weight.
    weights = torch.where(on_tokens(sampler) > -1e6, on_tokens(student - recorded).exp(), 0.0)
    return (
        probabilities
        @ per_response(weights)
        / (probabilities @ per_response(torch.ones_like(weights)))
    ).item()


def trained(reference: Tensor, teacher: Tensor, temperature: float, num_steps: int = 40) -> Tensor:
    """log pi of a student after offline updates on rollouts of softmax(reference / temperature)."""
    logits = reference.clone()
    rollouts = response_probabilities(log_policy(reference / temperature))
    for _ in range(num_steps):
        logits += expected_update(rollouts, logits, teacher, log_policy(reference)).view_as(logits)
    return log_policy(logits)


@pytest.mark.parametrize("seed", range(5))
class TestTemperatureOne:
    def test_mean_is_one_for_any_student(self, seed: int) -> None:
        reference = log_policy(random_logits(seed))
        close(
            mean_weight(reference, log_policy(random_logits(50 + seed, scale=2.0)), reference),
            1.0,
            abs=1e-13,
        )

    def test_of_whole_responses_too(self, seed: int) -> None:
        reference = log_policy(random_logits(seed))
        student = log_policy(random_logits(50 + seed, scale=2.0))
        probabilities = response_probabilities(reference)
        close(
            (probabilities @ (response_probabilities(student) / probabilities)).item(),
            1.0,
            abs=1e-13,
        )


class TestTempered:
    """Rollouts at another temperature, with their log-probabilities recorded at temperature 1, as
    lopd does.
    """

    @pytest.mark.parametrize("temperature", [0.6, 0.8, 1.25])
    def test_mean_is_one_at_the_start_and_one_plus_a_covariance_later(
        self, temperature: float
    ) -> None:
        """Per state: sum_a pi_tau pi_theta / pi_ref = 1 + Cov_ref[pi_tau / pi_ref, pi_theta /
        pi_ref]; over states by how often the sampler visits them.
        """
        logits = random_logits(3)
        reference = log_policy(logits)
        sampler = log_policy(logits / temperature)
        student = log_policy(logits + random_logits(4))
        close(mean_weight(sampler, reference, reference), 1.0, abs=1e-13)
        tilt = (sampler - reference).exp()
        weight = (student - reference).exp()
        covariance = (reference.exp() * (tilt - 1) * (weight - 1)).sum(-1)
        visited = visits(sampler)
        expected = 1 + (visited @ covariance / visited.sum()).item()
        close(mean_weight(sampler, student, reference), expected, abs=1e-12)
        apart(abs(expected - 1), 1e-3, "it is not 1")

    @pytest.mark.parametrize(
        ("temperature", "sharpness", "below"),
        [(0.8, 0.7, True), (0.8, 1.3, False), (1.25, 0.7, False), (1.25, 1.3, True)],
    )
    def test_side_of_one_is_certain_where_the_student_is_a_flatter_or_sharper_reference(
        self, temperature: float, sharpness: float, below: bool
    ) -> None:
        """Chebyshev's association inequality: with one of pi_tau / pi_ref and w rising in pi_ref
        and the other falling, the covariance is negative.
        """
        for seed in range(10):
            logits = random_logits(seed)
            mean = mean_weight(
                log_policy(logits / temperature), log_policy(logits * sharpness), log_policy(logits)
            )
            assert mean < 1 - 1e-4 if below else mean > 1 + 1e-4

    def test_side_of_one_is_open_for_a_student_that_learns(self) -> None:
        """After 40 offline updates towards random teachers on rollouts at 0.8: below 1 for 5 of 8,
        above for 3. At temperature 1 all are 1.
        """
        means = {temperature: [] for temperature in (0.8, 1.0)}  # type: dict[float, list[float]]
        for seed in range(8):
            reference = random_logits(seed)
            teacher = log_policy(reference + random_logits(100 + seed))
            for temperature, found in means.items():
                found.append(
                    mean_weight(
                        log_policy(reference / temperature),
                        trained(reference, teacher, temperature),
                        log_policy(reference),
                    )
                )
        assert sum(mean < 0.999 for mean in means[0.8]) == 5
        assert sum(mean > 1.001 for mean in means[0.8]) == 3
        close(means[1.0], [1.0] * 8, abs=1e-12)

    def test_mean_is_one_against_the_samplers_own_probabilities(self) -> None:
        logits = random_logits(3)
        sampler = log_policy(logits / 0.8)
        student = log_policy(logits + random_logits(4))
        close(mean_weight(sampler, student, sampler), 1.0, abs=1e-13)

    def test_mean_is_the_students_mass_on_the_support_where_sampling_cut_tokens_off(self) -> None:
        """With top-k of 2, against the sampler's probabilities: never above 1, for any student."""
        logits = random_logits(3)
        kept = logits >= logits.topk(2, -1).values[:, 1:]
        sampler = log_policy(logits.masked_fill(~kept, -1e9))
        student = log_policy(logits + random_logits(4))
        visited = visits(sampler)
        mass = torch.where(kept, student.exp(), 0.0).sum(-1)
        expected = (visited @ mass / visited.sum()).item()
        close(mean_weight(sampler, student, sampler), expected, abs=1e-12)
        assert expected < 0.95
