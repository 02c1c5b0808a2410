"""Context parallelism: what this rank's model sees of a microbatch, and the way from its rows back
to those of the whole microbatch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lopd.batching.context import ContextPart, context_part
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch


def part_of(microbatch: Microbatch) -> ContextPart:
    """Of this rank."""
    size, tensor = parallel.context_size(), parallel.tensor_size()
    return context_part(
        microbatch.cu_seqlens,
        microbatch.num_sequences,
        rank=parallel.context_rank(),
        size=size,
        tensor=tensor,
    )


def num_computed(microbatch: Microbatch) -> int:
    """Tokens that all context ranks compute together, padding included."""
    return len(part_of(microbatch).index) * parallel.context_size()


def gather(rows: Tensor, part: ContextPart) -> Tensor:
    """Rows [T, ...] of the whole microbatch, the same on every context rank, from each rank's rows
    [P, ...]; zeros for tokens that nobody computes.

    Objectives need whole responses (means over one, prefixes, running sums), so they are given all
    rows, on every rank; a row is a few numbers. The gradient of a rank's own rows needs no
    communication: every rank has computed it, from the same loss.
    """
    if parallel.context_size() == 1:
        return rows
    index, place = (
        torch.as_tensor(values, device=rows.device) for values in (part.index, part.place)
    )
    gathered: Tensor = _Gather.apply(rows, index, place)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        parts = [torch.empty_like(rows) for _ in range(parallel.context_size())]
        dist.all_gather(parts, rows.contiguous(), group=parallel.context_group())
        return _take(torch.cat(parts), place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _take(gradient, index), None, None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]; zeros where the index is past the end."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, index)
