"""Parameters that a rank holds: counted on Megatron-Core's own modules (lopd.planning.count), and
by formula where many layouts are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pydantic

from lopd.config import ParallelSection
from lopd.errors import TrainingError
from lopd.megatron.weights.architecture import Architecture

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Numbers of parameters on each rank of a pipeline stage. dense: all but experts; routers and
    vocabulary (embedding, output layer) are part of it.
    """

    dense: int
    experts: int
    routers: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class CountJob:
    arch: Architecture
    parallel: ParallelSection

    def to_json(self) -> dict[str, Any]:
        return {"arch": asdict(self.arch), "parallel": self.parallel.model_dump()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> CountJob:
        architecture: Architecture = pydantic.TypeAdapter(Architecture).validate_python(
            raw["arch"]
        )  # parts of it are records, too
        return cls(architecture, ParallelSection(**raw["parallel"]))


def count_parameters(jobs: Sequence[CountJob]) -> list[list[StageParameters]]:
    """Of each job what a rank of each pipeline stage holds, from the model as Megatron-Core builds
    it. One child process, without GPU, for all jobs.

    Layouts must divide the models (lopd.megatron.weights.architecture.layout_problems).
    TrainingError: Megatron-Core could not build one.
    """
    command = [sys.executable, "-m", "lopd.planning.count"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    told = json.dumps([job.to_json() for job in jobs])
    try:
        done = subprocess.run(
            command,
            input=told,
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"building the models took more than {TIMEOUT_S:.0f} s",
            where="lopd plan",
            remedy="try again on a less busy machine",
        ) from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TrainingError(
            f"Megatron-Core cannot build the model: {last[0]}",
            where="lopd plan",
            remedy="run lopd check CONFIG",
        )
    return [[StageParameters(**stage) for stage in stages] for stages in json.loads(done.stdout)]


def parameters_by_formula(arch: Architecture, parallel: ParallelSection) -> list[StageParameters]:
    """The same without building anything. A test holds the two together."""
    hidden, tensor = arch.hidden_size, parallel.tensor
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    attention = (
        hidden * (queries + 2 * keys) + queries * hidden + (queries + 2 * keys) * arch.qkv_bias
    ) // tensor
    norms = 2 * hidden + 2 * arch.head_dim * arch.qk_norm
    router, experts, mlp = 0, 0, 3 * hidden * arch.ffn_hidden_size // tensor
    if arch.num_experts:
        router, mlp = hidden * arch.num_experts, 0
        experts = (
            3
            * hidden
            * arch.moe_ffn_hidden_size
            * (arch.num_experts // parallel.expert)
            // parallel.expert_tensor
        )
    layers = arch.num_layers // parallel.pipeline
    table = arch.padded_vocab_size * hidden // tensor
    stages = []
    for stage in range(parallel.pipeline):
        first, last = stage == 0, stage == parallel.pipeline - 1
        shared = arch.tied_embeddings and first and last
        vocabulary = table * (first + last - shared)
        dense = layers * (attention + norms + mlp + router) + vocabulary + hidden * last
        stages.append(
            StageParameters(
                dense=dense,
                experts=layers * experts,
                routers=layers * router,
                vocabulary=vocabulary,
            )
        )
    return stages


def total_and_active(arch: Architecture) -> tuple[int, int]:
    """All parameters of the model, and those that a token meets: of the experts the chosen ones."""
    (whole,) = parameters_by_formula(arch, ParallelSection())
    padding = (
        (arch.padded_vocab_size - arch.vocab_size)
        * arch.hidden_size
        * (1 if arch.tied_embeddings else 2)
    )
    total = whole.total - padding
    idle = (
        whole.experts * (arch.num_experts - arch.experts_per_token) // arch.num_experts
        if arch.num_experts
        else 0
    )
    return total, total - idle
