"""A trainer that leaves its device between steps: its storages are emptied, and it trains on to the
bit. One case of it runs in test_trainer.py, and one in a stage in the pipeline's test_refresh.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron.launch import run_ranks
from tests.megatron.offload_cases import CASES, STEPS, leave_and_come_back, on_device
from tests.models import write_qwen3_moe

LAYOUTS: dict[int, dict[str, Any]] = {1: {}, 2: {"expert": 2}}


@pytest.fixture(
    scope="module", params=[pytest.param(size, marks=pytest.mark.slow) for size in LAYOUTS]
)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Results of each rank, of one and of two ranks (experts split, the rest data-parallel)."""
    folder = tmp_path_factory.mktemp("offload")
    return run_ranks(
        leave_and_come_back,
        request.param,
        model=str(write_qwen3_moe(folder / "model")),
        folder=str(folder),
        layout=LAYOUTS[request.param],
    )


def test_it_trains_on_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in (
            f"{case} {optimizer}" for case in CASES for optimizer in ("distributed", "plain")
        ):
            assert rank[name]["left"] == rank[name]["stayed"], name
            assert len(set(rank[name]["left"]["loss"])) == STEPS
        # Control: the optimizer's state came back as zeros.
        assert rank["forgetful"]["loss"] != rank["float32 distributed"]["stayed"]["loss"]


def test_what_leaves_is_no_longer_held(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, result in rank.items():
            if name in ("forgetful", "refused"):
                continue
            before, without_optimizer, nothing, after = result["memory"][:4]
            assert min(before.values()) > 0
            assert before["weights"] >= result["resident"]
            assert before["gradients"] >= result["resident"] * (1 if "float32" in name else 1.9) * (
                "frozen" not in name
            )
            assert without_optimizer == {
                "gradients": 0,
                "optimizer": 0,
                "weights": before["weights"],
            }
            assert nothing == {"gradients": 0, "optimizer": 0, "weights": 0}
            assert after == before
    float32, bfloat16 = (ranks[0][f"{case} plain"]["memory"][0] for case in ("float32", "bfloat16"))
    # The optimizer holds two moments and updates the weights themselves.
    assert float32["optimizer"] == 2 * float32["weights"]
    # Here it also holds a float32 copy. Norms of 64 elements are padded in buffers.
    assert 5.9 < bfloat16["optimizer"] / bfloat16["weights"] <= 6


def test_nobody_reads_what_is_away(ranks: list[dict[str, Any]]) -> None:
    optimizer = "gradients and optimizer are on the host"
    everything = "the weights are on the host"
    for rank in ranks:
        said = [line.split(":")[0] for line in rank["refused"]]
        assert said == [optimizer] * 3 + [everything] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_free_meanwhile(tmp_path: Path) -> None:
    """What the allocator counts falls by what is said to leave, and goes back to the device:
    another process can have it.
    """
    model = write_qwen3_moe(
        tmp_path / "model", hidden_size=1024, moe_intermediate_size=1024, num_experts=16
    )
    [result] = run_ranks(on_device, 1, model=str(model))
    held = result["held"]
    allocated = result["allocated"]
    reserved = result["reserved"]
    for first in range(0, 4 * STEPS, 4):
        before, without_optimizer, nothing, after = allocated[first : first + 4]
        assert before - without_optimizer >= held["gradients"] + held["optimizer"]
        assert without_optimizer - nothing >= held["weights"]
        assert after == pytest.approx(before, rel=0.01)
        assert reserved[first + 2] < reserved[first] - 0.8 * sum(held.values())
    assert result["left"] == pytest.approx(result["stayed"], rel=1e-2)
