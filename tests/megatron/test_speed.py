"""What only makes a training faster: fused kernels, overlapped exchanges, threads and variables of
a rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopd.config import ForwardSection, ParallelSection, TrainSection
from lopd.errors import TrainingError
from lopd.megatron.model import engine, fusions
from lopd.megatron.model.fusions import engine_fusions, fuse_weight_gradients
from lopd.megatron.model.transformer_config import selective_modules, transformer_config
from lopd.megatron.ranks import launch
from lopd.megatron.ranks.launch import device_environment, run_ranks, threads_of
from lopd.megatron.training.optimizer import optimizer_config
from lopd.megatron.training.wrapping import ddp_config
from lopd.megatron.weights.architecture import Architecture, read_architecture
from lopd.planning.known_models import KNOWN_MODELS
from tests.megatron.launch import run_ranks as run_tests_ranks
from tests.megatron.speed_cases import four_ranks, fused_gradients
from tests.models import write_qwen3_moe

KERNELS = {
    "rope_utils": ("fused_apply_rotary_pos_emb_thd",),
    "moe_utils": (*fusions._PERMUTATIONS, *fusions._ROUTING),
}


@pytest.fixture
def moe(tmp_path: Path) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["Qwen3-30B-A3B"]))
    return read_architecture(tmp_path)


@pytest.fixture
def dense(tmp_path: Path) -> Architecture:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(KNOWN_MODELS["Qwen3-8B"]))
    return read_architecture(tmp_path / "dense")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Transformer Engine imports."""
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(getattr(fusions, module), name, lambda: None, raising=False)


# ---- fused kernels ----


def test_transformer_engines_layers_are_fused(
    moe: Architecture, dense: Architecture, kernels: None
) -> None:
    every = {
        "bias_activation_fusion": True,
        "apply_rope_fusion": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
    }
    assert engine_fusions(moe) == every
    assert engine_fusions(dense) == {"bias_activation_fusion": True, "apply_rope_fusion": True}


def test_what_is_not_there_is_not_fused(
    moe: Architecture, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core would refuse the field, or fail at the first step."""
    monkeypatch.setattr(fusions.moe_utils, "fused_sort_chunks_by_index", None)
    monkeypatch.setattr(fusions.rope_utils, "fused_apply_rotary_pos_emb_thd", None)
    found = engine_fusions(moe)
    assert (
        found["moe_permute_fusion"],
        found["apply_rope_fusion"],
        found["moe_router_fusion"],
    ) == (False, False, True)


def test_yarn_is_not_rotated_by_the_fused_kernel(moe: Architecture, kernels: None) -> None:
    """It would leave out the factor on queries and keys, without a word."""
    yarn = SimpleNamespace(factor=4.0)
    with_yarn = dataclasses.replace(moe, yarn=yarn)  # type: ignore[arg-type]
    assert engine_fusions(with_yarn)["apply_rope_fusion"] is False


def configured(arch: Architecture, dtype: str, recompute: str = "none", **overrides: Any) -> Any:
    parallel = ParallelSection(ranks=8, tensor=4, expert=8 if arch.num_experts else 1)
    about: dict[str, Any] = {
        "parallel": parallel,
        "dtype": dtype,
        "recompute": recompute,
        "moe_aux_loss": 0.0,
    }
    return transformer_config(arch, **about, overrides=overrides)


def test_the_local_layers_get_no_fused_kernel(moe: Architecture, kernels: None) -> None:
    config = configured(moe, "float32")
    fused = [name for name in engine_fusions(moe) if getattr(config, name)]
    assert not fused
    assert not config.gradient_accumulation_fusion


def test_fusions_reach_megatron_and_can_be_switched_off(
    moe: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernels here, those that need none."""
    monkeypatch.setattr(engine, "uses_engine", lambda dtype: dtype == "bfloat16")
    assert configured(moe, "bfloat16").bias_activation_fusion
    assert not configured(moe, "bfloat16").gradient_accumulation_fusion, (
        "its own linear layer would ask for apex"
    )
    assert not configured(moe, "bfloat16", bias_activation_fusion=False).bias_activation_fusion


def test_weight_gradients_are_fused_without_apex() -> None:
    linear = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    linear.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    assert fuse_weight_gradients(torch.nn.Sequential(linear, torch.nn.Sequential(other))) == 1
    assert linear.fuse_wgrad_accumulation is True
    assert not hasattr(other, "fuse_wgrad_accumulation")


def test_megatron_adds_no_fused_gradient_a_second_time() -> None:
    """What Megatron-Core's DistributedDataParallel makes of a layer that has added its gradient
    itself, as Transformer Engine's do.
    """
    [found] = run_tests_ranks(fused_gradients, 1)
    assert found["fused"] == pytest.approx(found["plain"], rel=1e-6)
    assert found["silent"] != pytest.approx(found["plain"], rel=0.5), (
        "control: without the mark it adds what autograd was given"
    )


# ---- recompute and overlap ----


def test_selective_recompute_is_of_what_keeps_most(
    moe: Architecture, dense: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selective_modules(moe, engine=True) == ["moe"]
    assert selective_modules(dense, engine=True) == ["mlp"]
    assert (
        selective_modules(moe, engine=False)
        == selective_modules(dense, engine=False)
        == ["core_attn"]
    )
    monkeypatch.setattr(engine, "uses_engine", lambda dtype: dtype == "bfloat16")
    assert configured(moe, "bfloat16", "selective").recompute_modules == ["moe"]
    assert configured(moe, "float32", "selective").recompute_modules == ["core_attn"]
    assert configured(
        moe, "bfloat16", "selective", recompute_modules=["moe_act"]
    ).recompute_modules == ["moe_act"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = write_qwen3_moe(tmp_path_factory.mktemp("speed") / "moe")
    return run_tests_ranks(four_ranks, 4, model=str(folder))


@pytest.mark.parametrize("way", ["overlap", "selective", "both"])
def test_a_faster_way_comes_to_the_same_figures(way: str, measured: list[dict[str, Any]]) -> None:
    for figures in ("loss", "grad_norm"):
        assert measured[0][way][figures] == pytest.approx(measured[0]["plain"][figures], rel=1e-5)


def test_an_exchange_that_did_not_happen_would_be_noticed(measured: list[dict[str, Any]]) -> None:
    assert measured[0]["control"]["grad_norm"] != pytest.approx(
        measured[0]["plain"]["grad_norm"], rel=1e-2
    )


def test_gradients_overlap_where_there_is_a_gpu_and_somebody_to_exchange_with() -> None:
    assert ddp_config(True, {}, overlap=True).overlap_grad_reduce
    assert not ddp_config(True, {}).overlap_grad_reduce
    assert not ddp_config(True, {"overlap_grad_reduce": False}, overlap=True).overlap_grad_reduce


def test_an_offloaded_optimizer_overlaps_its_copies() -> None:
    def config(**overrides: Any) -> Any:
        return optimizer_config(
            TrainSection().optimizer, dtype=torch.bfloat16, distributed=True, overrides=overrides
        )

    assert config(optimizer_cpu_offload=True).overlap_cpu_optimizer_d2h_h2d
    assert not config(
        optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=False
    ).overlap_cpu_optimizer_d2h_h2d


# ---- threads and variables ----

OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}


def test_an_optimizer_on_the_cpu_gets_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))

    def threads(**fields: Any) -> int:
        return threads_of(TrainSection.model_validate({"parallel": {"ranks": 8}, **fields}))

    assert threads(megatron=OFFLOAD) == 12
    assert threads() == 1
    assert threads(megatron=OFFLOAD, threads_per_rank=3) == 3
    assert threads(threads_per_rank=3) == 3
    assert threads(megatron=OFFLOAD, parallel={"ranks": 16, "nodes": 2}) == 12, (
        "each of two machines has eight of them"
    )
    assert threads(megatron=OFFLOAD, parallel={"ranks": 128}) == 1
    assert threads_of(ForwardSection()) == 1
    assert threads_of(ForwardSection(threads_per_rank=2)) == 2


def test_variables_of_a_rank_follow_the_device() -> None:
    assert device_environment(on_gpu=True) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert device_environment(on_gpu=False) == {"TORCHDYNAMO_DISABLE": "1"}


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "1"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")]
)
def test_ranks_on_a_gpu_run_kernels_in_order(
    own: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that only say what they see and end with an error, which brings it back."""
    monkeypatch.setattr(launch, "_GPUS", (str(tmp_path),))
    lines: list[str] = []
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"
    } | own
    with pytest.raises(TrainingError):
        run_ranks(
            "tests.megatron.saying",
            ["CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"],
            ranks=1,
            threads_per_rank=3,
            log=tmp_path / "log",
            timeout_s=60,
            env=environment,
            on_line=lines.append,
        )
    assert f"CUDA_DEVICE_MAX_CONNECTIONS={expected}" in lines
    assert "OMP_NUM_THREADS=3" in lines
