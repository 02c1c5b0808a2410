"""The number of parameters that a rank holds.

Parameters are counted on Megatron-Core's own modules (lopd.planning.count). Where many layouts are
compared, a formula gives the same numbers in no time.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pydantic

from lopd.config import LoraSection, ParallelSection, TrainSection
from lopd.errors import TrainingError
from lopd.megatron.weights.adapters import adapter_weights
from lopd.megatron.weights.architecture import Architecture

# Seconds for building all models. It takes about 6 s on a free machine, most of them imports.
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Numbers of parameters on each rank of a pipeline stage.

    Attributes:
        dense: All parameters but the experts'.
        experts: The experts' parameters.
        routers: The routers' parameters, which are part of dense.
        vocabulary: Those of the embedding and of the output layer, which are part of dense.
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
    """A model and a layout whose parameters are to be counted."""

    arch: Architecture
    parallel: ParallelSection

    def to_json(self) -> dict[str, Any]:
        return {"arch": asdict(self.arch), "parallel": self.parallel.model_dump()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> CountJob:
        # Parts of an Architecture are records too. pydantic makes them from their dicts.
        adapter = pydantic.TypeAdapter(Architecture)
        arch: Architecture = adapter.validate_python(raw["arch"])
        return cls(arch, ParallelSection(**raw["parallel"]))


def count_parameters(jobs: Sequence[CountJob]) -> list[list[StageParameters]]:
    """Count parameters on the models as Megatron-Core builds them.

    One child process without a GPU counts for all jobs.

    Args:
        jobs: Models and layouts. A layout must divide its model
            (lopd.megatron.weights.architecture.layout_problems).

    Returns:
        For each job what a rank of each pipeline stage holds.

    Raises:
        TrainingError: Megatron-Core could not build a model, or it took too long.
    """
    environment = {
        **os.environ,
        # Nothing is computed, so the child must not take memory of a GPU that others use.
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    try:
        done = subprocess.run(
            # The jobs go through stdin: a command line has a limit, and architectures are long.
            [sys.executable, "-m", "lopd.planning.count"],
            input=json.dumps([job.to_json() for job in jobs]),
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"Megatron-Core needed more than {TIMEOUT_S:.0f} s to build the models",
            where="lopd plan",
            remedy="run the command again when the machine is less busy",
        ) from None
    # The layout has been checked before, so this is a limit of Megatron-Core that is not known
    # here.
    if done.returncode != 0:
        # The last line of a traceback names the error.
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TrainingError(
            f"Megatron-Core cannot build the model: {last[0]}",
            where="lopd plan",
            remedy="run lopd check CONFIG",
        )
    return [[StageParameters(**stage) for stage in stages] for stages in json.loads(done.stdout)]


def parameters_by_formula(arch: Architecture, parallel: ParallelSection) -> list[StageParameters]:
    """Compute what a rank of each pipeline stage holds, without building anything.

    A test compares the result with count_parameters.

    Args:
        arch: The shape of the model.
        parallel: A layout that divides the model.
    """
    per_layer = _layer_parameters(arch, parallel)
    # A layout divides the layers evenly, or it is refused.
    layers = arch.num_layers // parallel.pipeline
    # The embedding and the output layer are tables of this size, cut by vocabulary.
    table = arch.padded_vocab_size * arch.hidden_size // parallel.tensor
    stages = []
    # All stages have equally many layers. They differ in the vocabulary and the last norm.
    for stage in range(parallel.pipeline):
        is_first = stage == 0
        is_last = stage == parallel.pipeline - 1
        # Tied embeddings are one table only if both ends of the model are on one rank. On
        # several pipeline stages each end has a copy.
        is_shared = arch.tied_embeddings and is_first and is_last
        vocabulary = table * (is_first + is_last - is_shared)
        final_norm = arch.hidden_size * is_last
        stages.append(
            StageParameters(
                dense=layers * per_layer.dense + vocabulary + final_norm,
                experts=layers * per_layer.experts,
                routers=layers * per_layer.routers,
                vocabulary=vocabulary,
            )
        )
    return stages


def _layer_parameters(arch: Architecture, parallel: ParallelSection) -> StageParameters:
    """Compute what a rank holds of one layer."""
    hidden = arch.hidden_size
    # Numbers of query features and of key features, which are also those of the values.
    queries = arch.num_heads * arch.head_dim
    keys = arch.num_kv_heads * arch.head_dim
    qkv = hidden * (queries + 2 * keys) + (queries + 2 * keys) * arch.qkv_bias
    output = queries * hidden
    # Tensor ranks share the heads, and with them both matrices.
    attention = (qkv + output) // parallel.tensor
    # Norms are small. Every tensor rank holds them whole.
    norms = 2 * hidden + 2 * arch.head_dim * arch.qk_norm
    if not arch.num_experts:
        # Gate, up and down projection.
        mlp = 3 * hidden * arch.ffn_hidden_size // parallel.tensor
        return StageParameters(attention + norms + mlp, experts=0, routers=0, vocabulary=0)
    # Every rank routes its own tokens, so every rank holds the whole router.
    router = hidden * arch.num_experts
    experts_here = arch.num_experts // parallel.expert
    experts = 3 * hidden * arch.moe_ffn_hidden_size * experts_here // parallel.expert_tensor
    return StageParameters(attention + norms + router, experts, routers=router, vocabulary=0)


def adapter_parameters(
    arch: Architecture, parallel: ParallelSection, lora: LoraSection
) -> StageParameters:
    """Compute the adapters that a rank holds, which is the same on every pipeline stage.

    Args:
        arch: The shape of the model.
        parallel: A layout that divides the model.
        lora: The settings of the adapters.
    """
    # All layers are alike, and all experts of a layer.
    one_layer = replace(arch, num_layers=1, num_experts=min(arch.num_experts, 1))
    layers = arch.num_layers // parallel.pipeline
    experts_here = arch.num_experts // parallel.expert
    dense = 0
    experts = 0
    for weight in adapter_weights(one_layer, lora):
        ranks = parallel.expert_tensor if weight.expert else parallel.tensor
        size = layers * math.prod(weight.local_shape(ranks))
        if weight.expert:
            experts += size * experts_here
        else:
            dense += size
    return StageParameters(dense, experts, routers=0, vocabulary=0)


def trained_parameters(
    arch: Architecture, settings: TrainSection, held: StageParameters
) -> StageParameters:
    """Return which parameters of a rank have gradients and optimizer state.

    Args:
        arch: The shape of the model.
        settings: The settings of the training.
        held: All parameters of the rank but adapters.
    """
    if settings.lora.is_on:
        return adapter_parameters(arch, settings.parallel, settings.lora)
    if settings.optimizer.freeze_router:
        return replace(held, dense=held.dense - held.routers, routers=0)
    return held


def total_and_active(arch: Architecture) -> tuple[int, int]:
    """Return all parameters of a model, and those that one token meets.

    Of the experts, a token meets the chosen ones only.
    """
    # One rank holds the whole model.
    (whole,) = parameters_by_formula(arch, ParallelSection())
    # Megatron-Core pads the vocabulary. The published sizes of models do not count that.
    padded_rows = arch.padded_vocab_size - arch.vocab_size
    tables = 1 if arch.tied_embeddings else 2
    total = whole.total - padded_rows * arch.hidden_size * tables
    if not arch.num_experts:
        return total, total
    # All experts of a layer have the same size, so shares of their number are shares of weights.
    idle = whole.experts * (arch.num_experts - arch.experts_per_token) // arch.num_experts
    return total, total - idle
