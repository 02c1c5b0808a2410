"""What only a GPU shows: pytest -m gpu -s. Elsewhere these tests skip themselves; what they run,
gpu_cases.py, is run on a CPU by test_health.py, and context_cases.py by test_engine_spec.py.

LOPD_GPU_RESULTS=FILE collects the figures as JSON, for docs/gpu_results.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.megatron.weights.architecture import read_architecture
from tests.megatron.context_cases import CONTROLS, two_ranks
from tests.megatron.gpu_cases import (
    BYTES_PER_WEIGHT,
    layers_that_fit,
    parity,
    planned_bytes,
    settings_of_stage,
    stage,
    weights_of_layer,
    write_stage,
)
from tests.megatron.launch import ROOT, run_ranks
from tests.megatron.test_trainer import difference
from tests.megatron.trainer_cases import train_on_one_rank
from tests.models import write_qwen3_dense, write_qwen3_moe

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_gpu = lambda test: gpu[0](gpu[1](pytest.mark.timeout(600)(test)))  # noqa: E731
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
STAGE_TOKENS = 12_288
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def figures() -> Iterator[Figures]:
    found: Figures = {}
    yield found
    if "LOPD_GPU_RESULTS" in os.environ and found:
        packages = ("torch", "megatron-core", "transformer-engine", "triton")
        versions = {
            name: importlib.metadata.version(name)
            for name in packages
            if importlib.util.find_spec(name.replace("-", "_").replace("_core", ".core"))
        }
        Path(os.environ["LOPD_GPU_RESULTS"]).write_text(
            json.dumps(
                {"gpu": torch.cuda.get_device_name(), "versions": versions, **found}, indent=1
            )
            + "\n"
        )


# ---- sizes ----


def test_the_shape_has_the_published_number_of_weights_and_the_planner_knows_them(
    tmp_path: Path,
) -> None:
    arch = read_architecture(write_stage(tmp_path / "stage", 48))
    assert weights_of(arch) == pytest.approx(30.5e9, rel=0.01)
    two = read_architecture(write_stage(tmp_path / "stage", 2))
    planned = planned_bytes(
        two, settings_of_stage(num_tokens=STAGE_TOKENS, dtype="bfloat16", recompute="full")
    )
    assert planned > weights_of(two) * BYTES_PER_WEIGHT


def weights_of(arch: Any) -> float:
    return float(arch.num_layers * weights_of_layer(arch) + 2 * arch.vocab_size * arch.hidden_size)


# ---- on a GPU ----


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "mean", "largest"), [("float32", 1e-5, 1e-4), ("bfloat16", 0.05, 1.0)]
)
@pytest.mark.parametrize("family", ["dense", "moe"])
def test_logprobs_are_those_of_transformers(
    family: str, dtype: str, mean: float, largest: float, tmp_path: Path, figures: Figures
) -> None:
    """In bfloat16 a token whose router chooses another expert is far off, so of the mixture of
    experts only the mean is bounded there.
    """
    folder = (
        write_qwen3_moe(tmp_path / family)
        if family == "moe"
        else write_qwen3_dense(tmp_path / family)
    )
    found = figures[f"parity, {family}, {dtype}"] = run_ranks(
        parity, 1, folder=str(folder), dtype=dtype
    )[0]
    assert found["device"] == 1.0, "not on the GPU"
    assert found["mean"] < (0.2 if (family, dtype) == ("moe", "bfloat16") else mean)
    assert found["largest"] < largest or (family, dtype) == ("moe", "bfloat16")
    assert found["control"] > 5 * found["mean"]


@on_gpu
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_five_steps_are_those_of_a_cpu(
    dtype: str, limit: float, tmp_path: Path, figures: Figures
) -> None:
    model = str(write_qwen3_moe(tmp_path / "moe"))
    here, there = (
        run_ranks(train_on_one_rank, 1, env=env, model=model, dtype=dtype)[0]
        for env in ({}, NO_GPU)
    )
    worst = max(
        abs(a - b) / abs(b)
        for key in ("loss", "grad_norm")
        for a, b in zip(here[key], there[key], strict=True)
    )
    figures[f"five steps against a CPU, {dtype}"] = worst
    assert 0 < worst < limit, "equal to the bit: not on the GPU"


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_context_ranks_take_the_steps_of_one(tmp_path: Path, figures: Figures) -> None:
    """Transformer Engine's attention across ranks, which no CPU runs; a dense model, in which
    rounding chooses no expert.
    """
    found = run_ranks(
        two_ranks, 2, model=str(write_qwen3_dense(tmp_path / "dense")), dtype="bfloat16"
    )[0]
    distances = {name: difference(found[name], found["one rank"]) for name in ("right", *CONTROLS)}
    figures["two context ranks against one"] = distances
    assert 0 < distances["right"] < 0.02
    assert min(distances[name] for name in CONTROLS) > 3 * distances["right"]


@on_gpu
def test_logprobs_without_logits_at_full_size(tmp_path: Path, figures: Figures) -> None:
    """12,288 tokens, 151,936 vocabulary rows, bfloat16. Memory is bounded; time, which nobody has
    measured yet, is reported, of all kernels and libraries.
    """
    file = tmp_path / "logprob.json"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks/logprob.py"),
            "--device",
            "cuda",
            "--json",
            str(file),
        ],
        check=True,
        timeout=500,
    )
    found = figures["logprob"] = json.loads(file.read_text())
    assert "triton" in found, found["not_measured"]
    for prefix in ("", "triton_"):
        assert found[f"{prefix}memory_ratio"] <= 1 / 8
        assert found[f"{prefix}difference"] < 1e-2


@on_gpu
@pytest.mark.parametrize("recompute", ["full", "none"])
def test_a_stage_of_qwen3_30b_a3b(recompute: str, tmp_path: Path, figures: Figures) -> None:
    """Train as many of its 48 layers as fit for five steps. Compare memory with the planner's."""
    whole = read_architecture(write_stage(tmp_path / "whole", 48))
    layers = layers_that_fit(whole, torch.cuda.mem_get_info()[0], recompute)
    assert layers > 0, "not one layer fits"
    folder = write_stage(tmp_path / "stage", layers)
    steps = run_ranks(
        stage,
        1,
        timeout_s=550,
        folder=str(folder),
        num_tokens=STAGE_TOKENS,
        sequence_len=4096,
        dtype="bfloat16",
        recompute=recompute,
        num_steps=5,
    )[0]
    last = steps[-1]
    planned = (
        planned_bytes(
            read_architecture(folder),
            settings_of_stage(num_tokens=STAGE_TOKENS, dtype="bfloat16", recompute=recompute),
        )
        / 2**30
    )
    names = ("tokens_per_s", "seconds", "model_tflops_per_s", "mfu", "peak_memory_gib")
    kept = {name: last.get(name) for name in names}
    found = {"layers": layers, "planned_gib": planned, **kept}
    figures[f"stage, recompute {recompute}"] = found
    assert last["peak_memory_gib"] == pytest.approx(planned, rel=0.15)
    assert last["mfu"] > 0.05
