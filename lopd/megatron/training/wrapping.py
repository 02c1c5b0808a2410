"""A model wrapped for training: what each weight is, and the buffers of its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from lopd.megatron.model.overrides import build
from lopd.megatron.ranks import parallel


def wrap_for_training(
    module: Any, *, distributed: bool, freeze_router: bool, overrides: Mapping[str, Any]
) -> DistributedDataParallel:
    """Wrap a model in Megatron-Core's DistributedDataParallel.

    Args:
        module: This rank's part of the model.
        distributed: Whether the optimizer's state is sharded over the data-parallel ranks.
        freeze_router: Whether the routers of experts keep their weights.
        overrides: Fields of DistributedDataParallelConfig that win over ours.

    Raises:
        ConfigError: Megatron-Core refuses the fields.
    """
    # Both come before the wrapper. It reads the marks to choose a weight's gradient buffer, and a
    # frozen weight gets no room in one.
    mark_experts(module)
    if freeze_router:
        _freeze_routers(module)
    # Gradients of finished layers are exchanged while the backward pass continues. A CPU has no
    # second queue of work, so there it would only add overhead.
    overlap = torch.cuda.is_available() and parallel.data_context_size() > 1
    config = ddp_config(distributed, overrides, overlap=overlap)
    return DistributedDataParallel(module.config, config, module)


def ddp_config(
    distributed: bool, overrides: Mapping[str, Any], *, overlap: bool = False
) -> DistributedDataParallelConfig:
    """Return Megatron-Core's configuration of the gradient buffers.

    Args:
        distributed: Whether the optimizer's state is sharded over the data-parallel ranks.
        overrides: Fields of DistributedDataParallelConfig that win over ours.
        overlap: Whether gradients are exchanged during the backward pass.

    Raises:
        ConfigError: Megatron-Core refuses the fields.
    """
    ours = {
        # A bfloat16 sum over many microbatches and ranks would lose small gradients.
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": distributed,
        "overlap_grad_reduce": overlap,
    }
    return build(DistributedDataParallelConfig, {**ours, **overrides})


def mark_experts(module: Any) -> None:
    """Tell Megatron-Core which weights are an expert's, in every layout and for every layer."""
    for name, parameter in module.named_parameters():
        if ".mlp.experts." not in name:
            continue
        # Its gradient is summed over the ranks that hold the same expert. Megatron gives experts
        # this mark only where expert > 1. With expert = expert_tensor = 1 and tensor > 1 each
        # tensor rank holds all experts and sees its own part of the tokens. Without the mark no
        # gradient would cross tensor ranks, and their experts would drift apart.
        parameter.allreduce = False
        # It counts in the gradient norm on every rank, because the norm of experts is summed over
        # ranks that hold different ones. Transformer Engine since 2.13 leaves grouped weights
        # unmarked where expert > 1, and Megatron counts an unmarked weight on the first tensor
        # rank alone. With four tensor ranks three quarters of the experts would not count.
        parameter.tensor_model_parallel = True


def _freeze_routers(module: Any) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith(".router.weight"):
            parameter.requires_grad_(False)
