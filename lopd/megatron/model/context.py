"""Context parallelism: the part of a microbatch that this rank computes, and the way back.

The model of a context rank sees a part of each sequence. Its rows are then put together to those of
the whole microbatch.
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
    """Return the part of a microbatch that this rank computes."""
    return context_part(
        microbatch.cu_seqlens,
        microbatch.num_sequences,
        rank=parallel.context_rank(),
        size=parallel.context_size(),
        # Sequence parallelism divides the part once more, so its length must divide too.
        tensor=parallel.tensor_size(),
    )


def num_computed_tokens(microbatch: Microbatch) -> int:
    """Return the tokens that all context ranks compute together, padding included."""
    return len(part_of(microbatch).index) * parallel.context_size()


def gather_rows(rows: Tensor, part: ContextPart) -> Tensor:
    """Return the rows of the whole microbatch on every context rank. Differentiable.

    Args:
        rows: [P, ...], this rank's rows.
        part: The part of the microbatch that this rank has computed.

    Returns:
        [T, ...], the same on every context rank. Tokens that no rank computes have zeros.
    """
    # Objectives need whole responses, for means, prefixes and running sums. So every rank is given
    # all rows. A row is a few numbers only.
    if parallel.context_size() == 1:
        return rows
    index = torch.as_tensor(part.index, device=rows.device)
    place = torch.as_tensor(part.place, device=rows.device)
    gathered: Tensor = _GatherRows.apply(rows, index, place)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        parts = [torch.empty_like(rows) for _ in range(parallel.context_size())]
        dist.all_gather(parts, rows.contiguous(), group=parallel.context_group())
        return _take(torch.cat(parts), place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # No communication: every rank computes the same loss of all rows, so it has the gradient
        # of its own rows already. A sum over ranks would count it once for each context rank.
        (index,) = ctx.saved_tensors
        return _take(gradient, index), None, None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index], with zeros where the index is past the end."""
    # The index past the end finds the row of zeros. No branch, so that nothing waits for a GPU.
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, index)
