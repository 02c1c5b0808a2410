"""Parameters counted on Megatron-Core's own modules are the published ones, and the formula agrees
with them in every layout.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lopd.config import LoraSection, ParallelSection, TrainSection
from lopd.megatron.weights.adapters import adapter_weights
from lopd.planning import Assumptions
from lopd.planning.memory import trainer_memory
from lopd.planning.parameters import (
    CountJob,
    StageParameters,
    adapter_parameters,
    count_parameters,
    parameters_by_formula,
    total_and_active,
)
from tests.planning.configs import architecture

MOE = "Qwen3-30B-A3B-Base"
LAYOUTS = [
    (MOE, {}),
    (MOE, {"ranks": 8, "tensor": 4, "expert": 8}),  # the reference layout
    (MOE, {"ranks": 8, "tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2}),
    ("Qwen3-8B-Base", {"ranks": 8, "tensor": 4}),
    # The embeddings are tied, so the last stage has a copy.
    (
        "Qwen3-4B-Base",
        {"ranks": 4, "tensor": 2, "pipeline": 2},
    ),
    ("QwQ-32B", {"ranks": 8, "tensor": 8}),  # biases, no norms on queries
]


@pytest.fixture(scope="module")
def counted() -> list[list[StageParameters]]:
    """All in one child process."""
    return count_parameters(
        [CountJob(architecture(name), ParallelSection(**layout)) for name, layout in LAYOUTS]
    )


def test_the_whole_model_has_its_published_parameters(counted: list[list[StageParameters]]) -> None:
    (whole,) = counted[0]
    total, active = total_and_active(architecture(MOE))
    assert whole.total == total == 30_532_122_624
    assert active / 1e9 == pytest.approx(3.35, abs=0.01)
    experts = architecture(MOE).experts_per_token / architecture(MOE).num_experts
    assert active == whole.dense + whole.experts * experts


def test_the_formula_is_what_megatron_builds(counted: list[list[StageParameters]]) -> None:
    for (name, layout), stages in zip(LAYOUTS, counted, strict=True):
        assert stages == parameters_by_formula(architecture(name), ParallelSection(**layout)), (
            name,
            layout,
        )
    without_norms = dataclasses.replace(architecture("Qwen3-8B-Base"), qk_norm=False)
    assert parameters_by_formula(without_norms, ParallelSection(ranks=8, tensor=4)) != counted[3], (
        "forgotten norms would not be noticed"
    )


def test_ranks_hold_the_model_once_per_copy(counted: list[list[StageParameters]]) -> None:
    """Experts: exactly once over the 8 ranks of TP4 EP8. Everything else: a quarter each, but for
    what tensor ranks share (norms and routers).
    """
    (rank,) = counted[1]
    (whole,) = counted[0]
    assert rank.experts * 8 == whole.experts
    norms_and_routers = whole.dense - 4 * (whole.dense - rank.dense) // 3
    assert rank.dense == norms_and_routers + (whole.dense - norms_and_routers) // 4
    assert norms_and_routers == whole.routers + 48 * (2 * 2048 + 2 * 128) + 2048


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-0.6B-Base", 0.596),
        ("Qwen3-4B-Base", 4.02),
        ("Qwen3-8B-Base", 8.19),
        ("Qwen3-32B", 32.76),
        ("Qwen3-235B-A22B-Thinking-2507", 235.1),
    ],
)
def test_the_facts_of_public_models_give_their_published_size(name: str, billions: float) -> None:
    assert total_and_active(architecture(name))[0] / 1e9 == pytest.approx(billions, rel=0.001)


def test_active_parameters_of_the_largest() -> None:
    assert total_and_active(architecture("Qwen3-235B-A22B-Thinking-2507"))[
        1
    ] / 1e9 == pytest.approx(22, abs=0.5)


# ---- adapters ----

LORA = LoraSection(rank=16)


def test_adapters_are_counted_by_hand() -> None:
    """Of Qwen3-8B: query, key and value share their A, and so do gate and up."""
    layer = 16 * ((4096 + 4096 + 2 * 1024) + (4096 + 4096) + (4096 + 2 * 12288) + (12288 + 4096))
    whole = adapter_parameters(architecture("Qwen3-8B-Base"), ParallelSection(), LORA)
    assert whole == StageParameters(36 * layer, 0, 0, 0)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_adapters_of_a_rank_are_those_of_the_table(name: str, layout: dict[str, int]) -> None:
    """Which is the one that the trainer builds them by."""
    arch = architecture(name)
    parallel = ParallelSection(**layout)
    found = adapter_parameters(arch, parallel, LORA)
    expected = {True: 0, False: 0}
    for weight in adapter_weights(arch, LORA):
        ranks = parallel.expert_tensor if weight.expert else parallel.tensor
        expected[weight.expert] += math.prod(weight.local_shape(ranks))
    assert found.dense * parallel.pipeline == expected[False] > 0
    assert found.experts * parallel.pipeline * parallel.expert == expected[True]


def test_memory_of_adapters(counted: list[list[StageParameters]]) -> None:
    """Gradients and optimizer state of the adapters alone, and a little more weights."""
    arch = architecture(MOE)
    parallel = ParallelSection(**LAYOUTS[1][1])
    adapters = adapter_parameters(arch, parallel, LORA)

    def memory(**fields: Any) -> Any:
        settings = TrainSection(parallel=parallel, **fields)
        return trainer_memory(arch, settings, counted[1], Assumptions()).gpu

    plain = memory()
    thin = memory(lora={"rank": 16})
    assert thin["weights"] == plain["weights"] + 2 * adapters.total
    assert thin["gradients"] == 4 * adapters.total
    # A float32 copy and two moments. Two data ranks share those of the dense layers.
    assert thin["optimizer"] == 12 * (adapters.dense // 2 + adapters.experts)
    assert sum(thin.values()) < 0.6 * sum(plain.values())
