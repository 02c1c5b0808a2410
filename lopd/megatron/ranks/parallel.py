"""Ranks and process groups. No other file of lopd asks megatron.core.parallel_state.

The names tp, pp, cp, ep, etp and dp mean tensor, pipeline, context, expert, tensor inside an
expert, and data.

All ranks of a tensor, pipeline and context group are given the same microbatches. Ranks with
different data_rank() are given different ones. Each context rank computes a part of a microbatch
(lopd.megatron.model.context). The experts are spread over all ranks of a pipeline stage, so an
expert group reaches across context and data ranks.
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
    """Join the process group, form Megatron's groups, and seed every random generator.

    torchrun's environment describes the process group. It uses NCCL where CUDA is available, else
    gloo. The function may be called again with another layout of the same ranks.

    Args:
        parallel: The layout of the ranks.
        seed: The seed of the generators of Python, NumPy, torch and Megatron-Core.
        timeout_s: A collective that waits longer than this for a rank fails.

    Raises:
        TrainingError: torchrun did not start this process, or it started another number of ranks
            than parallel.ranks.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "the variables RANK and WORLD_SIZE are not set",
            where="trainer",
            remedy="start the trainer with torchrun, as lopd does",
        )
    # Megatron-Core would take the ranks that exist, and make more or fewer data ranks of them. Then
    # a step would not have the batch that the configuration says.
    started = int(os.environ["WORLD_SIZE"])
    if started != parallel.ranks:
        raise TrainingError(
            f"{started} ranks were started, but parallel.ranks is {parallel.ranks}",
            where="trainer",
            remedy=f"start exactly {parallel.ranks} ranks",
        )
    # First, so that nothing of Megatron-Core runs without the patches.
    megatron_patches.apply()
    cuda = torch.cuda.is_available()
    # Before any collective: NCCL uses the current device. Without this all ranks of a machine would
    # use its first GPU.
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    # Groups of an earlier layout. Megatron-Core refuses to form them twice.
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # The groups of Megatron-Core have a timeout of their own.
        distributed_timeout_minutes=timeout_s / 60,
    )
    python_random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # Megatron-Core keeps one state for what is the same on all tensor ranks and another for what
    # differs. Forced, because an earlier layout had its own states.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all process groups.

    It may be called twice, and also when initialize was never called.
    """
    # Megatron's groups first: they are built on the process group.
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Return the device that holds the tensors of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every rank has come here."""
    dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, on every rank. Collective.

    Args:
        value: The value of this rank. It is sent to all ranks, so it must be small and plain.
    """
    # A single rank needs no process group, so tools may run without torchrun.
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return the global rank. It is 0 outside of a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks. It is 1 outside of a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def data_rank() -> int:
    return int(parallel_state.get_data_parallel_rank())


def data_size() -> int:
    return int(parallel_state.get_data_parallel_world_size())


def data_group() -> Any:
    """Return the ranks that hold the same dense weights and are given different microbatches.

    Each context rank has a group of its own.
    """
    return parallel_state.get_data_parallel_group()


def data_context_group() -> Any:
    """Return data_group() together with the context ranks. Dense gradients are summed over it."""
    # Context ranks hold the same dense weights and see other tokens, as data ranks do.
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def data_context_size() -> int:
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def reports_for_data_rank() -> bool:
    """Return whether this rank counts what belongs to a microbatch.

    Exactly one of the ranks that are given the same microbatches does so. It is on the last
    pipeline stage, where the losses are.
    """
    return is_last_stage() and tensor_rank() == 0 and context_rank() == 0


def context_rank() -> int:
    return int(parallel_state.get_context_parallel_rank())


def context_size() -> int:
    return int(parallel_state.get_context_parallel_world_size())


def context_group() -> Any:
    """Return the ranks that share the tokens of one microbatch."""
    return parallel_state.get_context_parallel_group()


def expert_data_group() -> Any:
    """Return the ranks that hold the same experts."""
    # Expert gradients are summed over these ranks only. Other ranks hold other experts.
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
    """Return the ranks that together hold one copy of the dense weights (tensor and pipeline)."""
    return parallel_state.get_model_parallel_group()


def is_first_stage() -> bool:
    return bool(parallel_state.is_pipeline_first_stage())


def is_last_stage() -> bool:
    """Return whether this rank computes logits and losses."""
    return bool(parallel_state.is_pipeline_last_stage())


def last_stage_rank() -> int:
    """Return the global rank of the last stage in the pipeline of this rank."""
    return int(parallel_state.get_pipeline_model_parallel_last_rank())


def expert_rank() -> int:
    return int(parallel_state.get_expert_model_parallel_rank())


def expert_size() -> int:
    return int(parallel_state.get_expert_model_parallel_world_size())


def expert_tensor_rank() -> int:
    return int(parallel_state.get_expert_tensor_parallel_rank())


def expert_tensor_size() -> int:
    return int(parallel_state.get_expert_tensor_parallel_world_size())


def expert_tensor_group() -> Any:
    """Return the ranks that together hold one expert."""
    return parallel_state.get_expert_tensor_parallel_group()
