"""Exchanges over gloo that move fewer bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_patches.registry import patch, replace, require


@patch(
    upstream="megatron/core/tensor_parallel/mappings.py:_reduce_scatter_along_first_dim",
    checked="megatron-core 0.16.1 and 0.18.2, torch 2.11.0 and 2.13.0",
    until="gloo has a reduce-scatter of its own",
    without_cuda=True,
)
def reduce_scatter_by_exchange() -> None:
    """gloo has no reduce-scatter: torch copies the tensor, sums all of it over all ranks, and takes
    the own part. Now each rank sends the others their parts and adds up what it is given. That
    moves half the bytes, and the terms are added in the order of the ranks.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    require(
        mappings,
        "_reduce_scatter_along_first_dim",
        parameters=("input_", "group", "input_split_sizes"),
        source="dist_reduce_scatter_func(output, input_.contiguous(), group=group)",
    )

    def reduce_scatter(output: Tensor, input: Tensor, *, group: Any) -> None:
        received = torch.empty_like(input)
        torch.distributed.all_to_all_single(received, input, group=group)
        torch.sum(received.view(group.size(), *output.shape), dim=0, out=output)

    replace(mappings, "dist_reduce_scatter_func", reduce_scatter)
