"""Context parallelism: refused where it cannot be, and on four ranks, together with every other
kind of parallelism, the steps of a single rank.

Two ranks are in test_engine_spec.py, the cut itself in tests/batching/test_context.py. Run with a
stand-in for Transformer Engine's attention; that the real one does the same is for a machine that
has it (docs/gpu_results.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopd.config import ParallelSection
from lopd.errors import ConfigError
from lopd.megatron.model import build, engine
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.architecture import read_architecture
from tests.limits import apart, close, within
from tests.megatron.context_cases import FOUR_RANKS, RESUMED, four_ranks, one_rank
from tests.megatron.launch import run_ranks
from tests.megatron.test_engine_spec import ENGINE_PATH
from tests.megatron.test_trainer import difference
from tests.megatron.trainer_cases import NUM_STEPS
from tests.models import write_qwen3_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


# ---- where it cannot be ----


@pytest.mark.parametrize(
    ("imports", "gpu", "dtype", "lack"),
    [
        (
            False,
            True,
            "bfloat16",
            "context = 2 needs Transformer Engine, which does not import here",
        ),
        (
            True,
            False,
            "bfloat16",
            "context = 2 needs Transformer Engine, which needs a GPU, and there is none here",
        ),
        (
            True,
            True,
            "float32",
            "context = 2 needs Transformer Engine, whose attention has no kernels for float32",
        ),
        (True, True, "bfloat16", None),
    ],
)
def test_it_is_refused_with_what_is_missing(
    imports: bool, gpu: bool, dtype: str, lack: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.gpt_layer_specs, "HAVE_TE", imports)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = [
        str(problem)
        for problem in engine.context_problems(
            ParallelSection(ranks=2, context=2), dtype, where="distill.parallel"
        )
    ]
    if lack is None:
        assert found == []
    else:
        (message,) = found
        assert message.startswith(
            f"distill.parallel: {lack}; limit: exactly 1 without Transformer Engine; "
            "remedy: set context to 1"
        )
    assert not [*engine.context_problems(ParallelSection(ranks=2), dtype)]


def test_no_model_is_built_without_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "initialize", None)
    section = ParallelSection(ranks=2, context=2)
    with pytest.raises(ConfigError, match="context = 2 needs Transformer Engine"):
        build.build_model(
            read_architecture(model),
            parallel=section,
            dtype="float32",
            recompute="none",
            moe_aux_loss=0.0,
        )


# ---- four ranks ----


@pytest.fixture(scope="module")
def one(model: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(one_rank, 1, model=str(model))[0]
    return result


@pytest.fixture(scope="module")
def four(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(
        four_ranks,
        4,
        env=ENGINE_PATH,
        timeout_s=400,
        model=str(model),
        folder=str(tmp_path_factory.mktemp("checkpoints")),
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*FOUR_RANKS, "recomputed"])
def test_four_ranks_take_the_steps_of_one(
    layout: str, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    for ranks in four:
        within(difference(ranks[layout], one["all"]), 1e-5)
    assert len(one["all"]["loss"]) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["few", "few, data"])
def test_ranks_without_data_in_the_last_microbatch_change_nothing(
    case: str, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    within(difference(four[0][case], one["few"]), 1e-5)
    assert four[0]["few, data"]["empty"] == [0, 0, NUM_STEPS, NUM_STEPS], (
        "both context ranks of the second data rank have none"
    )


@pytest.mark.slow
def test_load_balancing_and_top_k_losses_weigh_the_same(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    for case in ("balanced", "top-K"):
        within(difference(four[0][case], one[case]), 1e-5, case)
    apart(difference(four[0]["balanced, unscaled"], one["balanced"]), 1e-4)


@pytest.mark.slow
def test_scores_are_those_of_one_rank_on_every_rank(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    expected = np.array(one["scores"])
    for ranks in four:
        close(ranks["scores"], expected, abs=2e-5)  # 3.4e-6 seen
    assert np.abs(np.roll(expected, 1) - expected).max() > 1, "control: a shift by one"


@pytest.mark.slow
def test_a_training_resumes_bit_for_bit_and_without_or_with_more_context_ranks(
    four: list[dict[str, Any]],
) -> None:
    found = four[0]["resumed"]
    unbroken = {**found["unbroken"], "lr": found["tensor, context"]["lr"]}
    assert found["tensor, context"] == unbroken
    for name in RESUMED:
        assert len(found[name]["loss"]) == 2
        within(difference(found[name], unbroken), 1e-5, name)
    others = found["four context ranks"]["weights"]
    assert others != unbroken["weights"], "another layout rounds in another way"


@pytest.mark.slow
def test_how_ranks_exchange_keys_and_values_is_passed_on(four: list[dict[str, Any]]) -> None:
    assert four[0]["cp_comm_type"] == "a2a"
