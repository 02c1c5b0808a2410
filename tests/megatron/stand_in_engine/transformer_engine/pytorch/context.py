"""Attention across context ranks in plain torch, and the order of tokens that Transformer Engine
asks for.

The real one passes keys and values round a ring; here every rank gathers all of them, and a mask
over true positions says who sees whom. The order is written a second time here, token by token as
in Transformer Engine's CUDA kernel (thd_partition_indices_kernel), so that ours is compared with
something.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def thd_get_partitioned_indices(
    cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int
) -> Tensor:
    """The tokens of this rank, int32 [total_tokens / world_size]."""
    found: list[int] = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        assert (end - start) % (2 * world_size) == 0, (
            f"a sequence of {end - start} tokens cannot be cut for {world_size} ranks"
        )
        chunk = (end - start) // (2 * world_size)
        for number in (rank, 2 * world_size - 1 - rank):
            found += range(start + number * chunk, start + (number + 1) * chunk)
    assert len(found) * world_size == total_tokens
    return torch.tensor(found, dtype=torch.int32)


class _AllGather(torch.autograd.Function):
    """[P, ...] of each rank to [size * P, ...]; the way back adds up what every rank did with this
    rank's rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


def attention_across_ranks(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, group: Any, *, scale: float
) -> Tensor:
    """query [P, heads, head_dim], key and value [P, kv_heads, head_dim] of this rank; gives [P,
    heads, head_dim]. cu_seqlens: of all ranks' tokens.
    """
    size = group.size()
    total = int(cu_seqlens[-1])
    assert len(query) * size == total, (
        f"{len(query)} tokens on each of {size} ranks, {total} in all"
    )
    # The shape is [total].
    order = torch.cat(
        [thd_get_partitioned_indices(cu_seqlens, total, size, rank) for rank in range(size)]
    )
    sequence = torch.bucketize(order, cu_seqlens[1:], right=True)
    own = slice(group.rank() * len(query), (group.rank() + 1) * len(query))
    seen = (sequence[own, None] == sequence) & (order[own, None] >= order)  # [P, total]
    keys = _AllGather.apply(key, group)
    values = _AllGather.apply(value, group)
    # The shapes are [1, heads, tokens, head_dim].
    q, k, v = (rows.transpose(0, 1)[None] for rows in (query, keys, values))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
