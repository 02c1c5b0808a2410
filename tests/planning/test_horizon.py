"""Short horizons: what a plan says they save, and which refresh has which."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd.checks.combinations import refresh_problems
from lopd.planning.horizon import short_horizon
from lopd.planning.plan_json import as_json
from lopd.planning.stages import LIGHTNING
from lopd.stages.refresh_service import rollout_of
from tests.planning.configs import PAPER_8B, config_of, plan_of

PREFIX = "distill.objective.prefix_tokens=1024"


def test_the_plan_says_what_rollouts_that_stop_at_the_prefix_would_take(tmp_path: Path) -> None:
    plan = plan_of(PAPER_8B, tmp_path, [PREFIX])
    found = short_horizon(plan)
    assert found is not None
    short = plan_of(PAPER_8B, tmp_path, ["rollout.max_new_tokens=1024"])
    assert found.gpu_hours == pytest.approx(sum(short.gpu_hours(stage) for stage in LIGHTNING))
    assert found.instead_of == pytest.approx(sum(plan.gpu_hours(stage) for stage in LIGHTNING))
    # By far most of the tokens are rollouts' here, so the hours fall with them.
    assert found.gpu_hours < 0.5 * found.instead_of
    assert "(rollout.max_new_tokens = 1024)" in found.line
    assert as_json(plan)["short_horizon"]["tokens"] == 1024


def test_without_a_shorter_prefix_it_says_nothing(tmp_path: Path) -> None:
    for overrides in ([], ["distill.objective.prefix_tokens=4096"], [PREFIX, "distill.cache=c"]):
        plan = plan_of(PAPER_8B, tmp_path, overrides)
        assert short_horizon(plan) is None, overrides
        assert as_json(plan)["short_horizon"] is None


def test_the_horizon_grows_with_the_refreshes(tmp_path: Path) -> None:
    grown = ["distill.refresh.every=10", "distill.refresh.horizons=[512, 1024]"]
    config = config_of(PAPER_8B, tmp_path, grown)
    assert [rollout_of(config, number).max_new_tokens for number in (1, 2, 3)] == [512, 1024, 1024]
    assert rollout_of(config, 1).temperature == config.rollout.temperature
    assert not [*refresh_problems(config)]
    plain = config_of(PAPER_8B, tmp_path, grown[:1])
    assert rollout_of(plain, 2) == plain.rollout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distill.refresh.horizons=[512]"], "refresh.horizons has no effect without a refresh"),
        (
            ["distill.refresh.every=1", "distill.refresh.horizons=[512, 8192]"],
            "refresh.horizons has 8192; limit: at least 1 and at most rollout.max_new_tokens",
        ),
        (["distill.refresh.every=1", "distill.refresh.horizons=[0]"], "refresh.horizons has 0"),
    ],
)
def test_horizons_that_cannot_be_are_refused(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    (problem,) = refresh_problems(config_of(PAPER_8B, tmp_path, overrides))
    assert expected in str(problem)
