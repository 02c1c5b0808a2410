"""How the losses of tokens become the loss of a batch, and sums within sequences: no loop over
sequences, no synchronisation with the device.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lopd.objective.interface import TokenBatch

Aggregation: TypeAlias = Literal["response_mean", "token_mean", "token_sum"]


def loss_tokens_per_sequence(batch: TokenBatch) -> Tensor:
    """How many tokens of each sequence carry loss, int64 [S]. From differences of a running count:
    exact, and deterministic on every device.
    """
    return sequence_sums(batch.loss_mask.long(), batch)


def sequence_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """The sum over each sequence [S] of values [T]; exact for integers."""
    running = torch.nn.functional.pad(
        torch.cumsum(values, dim=0), (1, 0)
    )  # [T+1], running[t]: sum before t
    bounds = batch.cu_seqlens.long()
    return running[bounds[1:]] - running[bounds[:-1]]


def running_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """The sum from the start of its sequence up to each position, itself included, [T] of values
    [T]; exact for integers.
    """
    running = torch.cumsum(values, dim=0)
    before = torch.nn.functional.pad(running, (1, 0))[batch.cu_seqlens.long()[:-1]]  # [S]
    return running - on_tokens(before, batch)


def on_tokens(values: Tensor, batch: TokenBatch) -> Tensor:
    """The value of its sequence at every position, [T] of values [S]."""
    lengths = torch.diff(batch.cu_seqlens.long())  # [S]
    # output_size spares the device a synchronisation to learn how long the result is.
    return torch.repeat_interleave(values, lengths, output_size=len(batch.loss_mask))


def token_weights(
    batch: TokenBatch, aggregation: Aggregation, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(weights [T], num_items int32 []): loss_sum = sum of weights * token losses, and sums of both
    over a step give loss = loss_sum / num_items.

    ``response_mean``: mean over a response's loss tokens, then mean over responses. ``token_mean``:
    mean over all loss tokens. ``token_sum``: sum over a response's loss tokens, then mean over
    responses. A response without a loss token counts for nothing, neither above nor below the line.
    """
    counts = loss_tokens_per_sequence(batch)  # [S]
    mask = batch.loss_mask.to(dtype)  # [T]
    num_responses = (counts > 0).sum(dtype=torch.int32)
    if aggregation == "token_mean":
        return mask, counts.sum(dtype=torch.int32)
    if aggregation == "token_sum":
        return mask, num_responses
    assert aggregation == "response_mean", aggregation
    return mask / on_tokens(counts, batch).clamp(min=1).to(dtype), num_responses


def count_sums(batch: TokenBatch) -> dict[str, Tensor]:
    """The counts every objective reports: num_tokens and num_responses that carry loss, float64 []."""
    counts = loss_tokens_per_sequence(batch)
    return {
        "num_tokens": counts.sum(dtype=torch.float64),
        "num_responses": (counts > 0).sum(dtype=torch.float64),
    }
