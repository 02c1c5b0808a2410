"""Ranks and process groups. The only file that asks megatron.core.parallel_state.

tp, pp, cp, ep, etp, dp: tensor, pipeline, context, expert, tensor inside an expert, data. Every
rank of a tensor, pipeline and context group is given the same microbatches; ranks with different
data_rank() are given different ones. Of a microbatch each context rank computes a part
(lopd.megatron.model.context). Experts are spread over all ranks of a pipeline stage, across context
and data ranks too.
"""

from __future__ import annotations

import datetime
import os
import random as python_random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

import megatron_patches
from lopd.config import ParallelSection
from lopd.errors import TrainingError


def initialize(parallel: ParallelSection, *, seed: int, timeout_s: float) -> None:
    """Join the process group that torchrun's environment describes (NCCL with CUDA, else gloo),
    form Megatron's groups, seed every generator.

    Installs megatron_patches first, so that nothing of Megatron-Core runs without them. timeout_s:
    a collective that waits longer for a lost rank fails.
    May be called again with another layout of the same ranks (tests do).
    TrainingError: not started by torchrun, or with another number of ranks than parallel.ranks.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "RANK and WORLD_SIZE are not set",
            where="trainer",
            remedy="start it with torchrun (lopd does)",
        )
    started = int(os.environ["WORLD_SIZE"])
    if started != parallel.ranks:
        raise TrainingError(
            f"{started} ranks were started, parallel.ranks is {parallel.ranks}",
            where="trainer",
            remedy="start as many ranks as configured",
        )
    megatron_patches.apply()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=timeout_s / 60,
    )
    python_random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all groups. Safe to call twice, and when initialize was never called."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def barrier() -> None:
    dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value (small, plain), by rank, on every rank. Collective."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """Global rank; 0 outside of a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def data_rank() -> int:
    return int(parallel_state.get_data_parallel_rank())


def data_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def data_group() -> Any:
    """Ranks that hold the same dense weights and see different microbatches; one such group for
    each context rank.
    """
    return parallel_state.get_data_parallel_group()


def data_context_group() -> Any:
    """data_group() and the context ranks: over which dense gradients are summed."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def data_context_size() -> int:
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def speaks_for_data_rank() -> bool:
    """True on one of the ranks that are given the same microbatches, on the last pipeline stage:
    what belongs to a microbatch is counted there, once.
    """
    return is_last_stage() and tensor_rank() == 0 and context_rank() == 0


def context_rank() -> int:
    return int(parallel_state.get_context_parallel_rank())


def context_size() -> int:
    return int(parallel_state.get_context_parallel_world_size())


def context_group() -> Any:
    """Ranks that share the tokens of one microbatch."""
    return parallel_state.get_context_parallel_group()


def expert_data_group() -> Any:
    """Ranks that hold the same experts."""
    return parallel_state.get_expert_data_parallel_group()


def expert_data_rank() -> int:
    return int(parallel_state.get_expert_data_parallel_rank())


def tensor_rank() -> int:
    return int(parallel_state.get_tensor_model_parallel_rank())


def tensor_size() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())


def tensor_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_rank() -> int:
    return int(parallel_state.get_pipeline_model_parallel_rank())


def pipeline_size() -> int:
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def pipeline_group() -> Any:
    return parallel_state.get_pipeline_model_parallel_group()


def model_group() -> Any:
    """All ranks that together hold one copy of the dense weights (tensor and pipeline)."""
    return parallel_state.get_model_parallel_group()


def is_first_stage() -> bool:
    return bool(parallel_state.is_pipeline_first_stage())


def is_last_stage() -> bool:
    """True where logits and losses are."""
    return bool(parallel_state.is_pipeline_last_stage())


def last_stage_rank() -> int:
    """Global rank of the last pipeline stage of this rank's pipeline."""
    return int(parallel_state.get_pipeline_model_parallel_last_rank())


def expert_rank() -> int:
    return int(parallel_state.get_expert_model_parallel_rank())


def expert_size() -> int:
    return int(parallel_state.get_expert_model_parallel_world_size())


def expert_tensor_rank() -> int:
    return int(parallel_state.get_expert_tensor_parallel_rank())


def expert_tensor_size() -> int:
    return int(parallel_state.get_expert_tensor_parallel_world_size())
