"""Four ranks: layouts that combine three kinds of parallelism take the steps of a single rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.limits import apart, within
from tests.megatron.launch import run_ranks
from tests.megatron.layout_cases import FEW, FOUR_RANKS, four_ranks, one_rank
from tests.megatron.test_trainer import difference
from tests.megatron.trainer_cases import NUM_STEPS
from tests.models import write_qwen3_moe

# Four ranks run on two cores here. The layouts of two ranks are in test_trainer.py.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(model: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(one_rank, 1, model=str(model))[0]
    return result


@pytest.fixture(scope="module")
def four(model: Path) -> list[dict[str, Any]]:
    return run_ranks(four_ranks, 4, model=str(model))


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_take_the_steps_of_one(
    layout: str, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    for ranks in four:
        within(difference(ranks[layout], one["all"]), 1e-5)
    assert len(one["all"]["loss"]) == NUM_STEPS


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing_in_any_layout(
    recompute: str, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    within(difference(four[0][recompute], one["all"]), 1e-5)


@pytest.mark.parametrize("layout", FEW)
def test_ranks_without_data_in_the_last_microbatch_change_nothing(
    layout: str, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    found = four[0][f"few: {layout}"]
    within(difference(found, one["few"]), 1e-5)
    assert max(found["empty"]) == NUM_STEPS, "every rank had data"
    assert one["few"]["empty"] == [0]


def test_experts_whose_gradients_stay_on_their_tensor_rank_would_be_noticed(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    apart(difference(four[0]["unmarked experts"], one["all"]), 1e-4)
