"""Where the updates come to rest: iterated with exact expectations over every response of a tiny
language.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lopd.objective import TruncatedImportance
from lopd.objective.weighting import Weighting
from tests.limits import apart, within
from tests.theory.tabular import (
    STATES,
    expected_update,
    kl,
    log_policy,
    random_logits,
    response_probabilities,
)

Policy = Callable[[Tensor], Tensor]  # logits to log pi [states, V]


def one_row_for_all_states(logits: Tensor) -> Tensor:
    """A student that cannot tell states apart, [states, V] from [V]."""
    return torch.log_softmax(logits, -1).expand(len(STATES), -1)


def climbed(
    start: Tensor,
    teacher: Tensor,
    *,
    rollouts: Tensor | None = None,
    policy: Policy = log_policy,
    weightings: tuple[Weighting, ...] = (),
    num_steps: int = 150,
    rate: float | None = None,
) -> Tensor:
    """Logits after following the exact update. rollouts: log pi of the policy that sampled once
    (offline); None: the current student samples at every step.

    rate: of plain ascent; None: Rprop, which looks only at signs and comes to rest within few steps
    wherever it does.
    """
    logits = start.clone()
    optimizer = (
        torch.optim.Rprop([logits], lr=0.1) if rate is None else torch.optim.SGD([logits], lr=rate)
    )
    for _ in range(num_steps):
        sampler = policy(logits) if rollouts is None else rollouts
        logits.grad = -expected_update(
            response_probabilities(sampler), logits, teacher, sampler, weightings, policy
        ).view_as(logits)
        optimizer.step()
    return logits


class TestRepresentableTeacher:
    def test_is_a_fixed_point_of_both(self) -> None:
        logits = random_logits(1)
        teacher = log_policy(logits)
        reference = log_policy(random_logits(0))
        for sampler in (reference, teacher):
            assert (
                expected_update(response_probabilities(sampler), logits, teacher, sampler)
                .abs()
                .max()
                == 0.0
            )
        moved = logits + random_logits(2, 0.1)
        update = expected_update(response_probabilities(reference), moved, teacher, reference)
        apart(update.abs().max(), 1e-3)

    @pytest.mark.parametrize("offline", [True, False])
    def test_is_reached_by_both(self, offline: bool) -> None:
        start = random_logits(0)
        teacher = log_policy(start + random_logits(1))
        student = log_policy(
            climbed(start, teacher, rollouts=log_policy(start) if offline else None)
        )
        within(kl(student, teacher).max(), 1e-10)
        apart(kl(log_policy(start), teacher).max(), 0.1, "that is where they began")


def test_without_a_representable_teacher_they_part() -> None:
    """Control of the above: one row of logits cannot be right in every state, and offline and
    online settle for different compromises.
    """
    start = torch.zeros(3, dtype=torch.float64)
    teacher = log_policy(random_logits(1))
    rollouts = log_policy(random_logits(0))
    offline = climbed(start, teacher, rollouts=rollouts, policy=one_row_for_all_states)
    online = climbed(start, teacher, policy=one_row_for_all_states)

    def slope(at: Tensor, sampler: Tensor) -> float:
        return (
            expected_update(
                response_probabilities(sampler), at, teacher, sampler, policy=one_row_for_all_states
            )
            .norm()
            .item()
        )

    within(slope(offline, rollouts), 1e-5)
    within(slope(online, one_row_for_all_states(online)), 1e-5)
    apart(slope(online, rollouts), 0.05)
    apart(slope(offline, one_row_for_all_states(offline)), 0.05)
    apart((torch.softmax(offline, -1) - torch.softmax(online, -1)).abs().max(), 0.01)


class TestTemperatureMismatch:
    """The student's log-probabilities are divided by the rollout temperature before they are
    compared, the teacher's are not.
    """

    TEMPERATURE = 0.8

    def tempered(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits / self.TEMPERATURE, -1)

    def test_moves_the_fixed_point_to_the_teacher_raised_to_the_temperature(self) -> None:
        """log pi_theta = tau * log pi_T + const: flatter than the teacher for tau below 1."""
        start = random_logits(0)
        teacher = log_policy(start + random_logits(1))
        student = log_policy(climbed(start, teacher, policy=self.tempered))
        biased = torch.log_softmax(self.TEMPERATURE * teacher, -1)
        within(kl(student, biased).max(), 1e-10)
        apart(kl(student, teacher).max(), 0.005)
        assert -(student.exp() * student).sum() > -(teacher.exp() * teacher).sum() + 0.1, (
            "more entropy than the teacher's"
        )
        honest = log_policy(climbed(start, teacher))
        within(kl(honest, teacher).max(), 1e-10, "the same without the division")

    def test_pushes_a_student_away_that_has_arrived(self) -> None:
        logits = random_logits(1)
        teacher = log_policy(logits)

        def push(at: Tensor, policy: Policy, target: Tensor) -> float:
            return (
                expected_update(
                    response_probabilities(policy(at)), at, target, policy(at), policy=policy
                )
                .norm()
                .item()
            )

        apart(push(logits, self.tempered, teacher), 0.02)
        within(
            push(self.TEMPERATURE * logits, self.tempered, teacher),
            1e-12,
            "the biased point is where it rests",
        )
        within(push(logits, log_policy, teacher), 1e-12, "both at temperature 1")
        within(push(logits, self.tempered, self.tempered(logits)), 1e-12, "both at 0.8")


def test_frozen_rollouts_keep_pushing_a_token_that_has_become_rare() -> None:
    """Why Lightning OPD can fail: a token that the reference gives 1 in 3 and the teacher 1 in 10
    million is pushed down at full strength to the end.

    Fresh rollouts no longer contain it, and importance weights no longer count it.
    """
    start = torch.zeros(len(STATES), 3, dtype=torch.float64)
    away = start.clone()
    away[:, 2] = -16.0
    teacher = log_policy(away)
    rollouts = log_policy(start)
    runs = {
        "offline": climbed(start, teacher, rollouts=rollouts, rate=0.3, num_steps=60),
        "online": climbed(start, teacher, rate=0.3, num_steps=60),
        "weighted": climbed(
            start,
            teacher,
            rollouts=rollouts,
            weightings=(TruncatedImportance(2.0),),
            rate=0.3,
            num_steps=60,
        ),
    }
    rare = {name: log_policy(logits)[0, 2].item() for name, logits in runs.items()}
    assert rare["offline"] < -12
    assert -8 < rare["online"] < -4
    assert -8 < rare["weighted"] < -4
