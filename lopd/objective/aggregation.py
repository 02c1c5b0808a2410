"""How token losses become the loss of a batch, and sums within sequences.

Nothing here loops over sequences, and nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from lopd.deferred import deferred
from lopd.objective.interface import TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

Aggregation: TypeAlias = Literal["response_mean", "token_mean", "token_sum"]


def loss_tokens_per_sequence(batch: TokenBatch) -> Tensor:
    """Return how many tokens of each sequence carry loss, int64 [S]."""
    return sequence_sums(batch.loss_mask.long(), batch)


def sequence_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return the sum of values [T] over each sequence, [S]. It is exact for integers."""
    # Differences of a running sum instead of a scatter-add: on CUDA a scatter-add uses atomic
    # additions, whose order changes from run to run.
    # before[t] is the sum of all values in front of position t, [T+1].
    before = torch.nn.functional.pad(torch.cumsum(values, dim=0), (1, 0))
    bounds = batch.cu_seqlens.long()
    return before[bounds[1:]] - before[bounds[:-1]]


def running_sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return at each position the sum of values [T] from the start of its sequence.

    The value at the position itself is included. The result [T] is exact for integers.
    """
    running = torch.cumsum(values, dim=0)
    # What the sequences in front of this one have added to the running sum, [S].
    before = torch.nn.functional.pad(running, (1, 0))[batch.cu_seqlens.long()[:-1]]
    return running - expand_to_tokens(before, batch)


def expand_to_tokens(values: Tensor, batch: TokenBatch) -> Tensor:
    """Repeat the value of each sequence [S] at every position of the sequence, [T]."""
    lengths = torch.diff(batch.cu_seqlens.long())  # [S]
    # Without output_size torch would have to wait for the device to learn the result's length.
    return torch.repeat_interleave(values, lengths, output_size=len(batch.loss_mask))


def token_weights(
    batch: TokenBatch, aggregation: Aggregation, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Express an aggregation as one weight per token and a count to divide by.

    With loss_sum = sum of weights * token losses, the loss of a step is the sum of loss_sum over
    the sum of num_items, both over all microbatches and data ranks.

    A response without a loss token counts in neither of the two sums.

    Args:
        batch: The packed sequences.
        aggregation: ``response_mean``: the mean over a response's loss tokens, then the mean over
            responses. ``token_mean``: the mean over all loss tokens. ``token_sum``: the sum over a
            response's loss tokens, then the mean over responses.
        dtype: The dtype of the weights.

    Returns:
        The weights [T] and num_items, int32 [].
    """
    counts = loss_tokens_per_sequence(batch)  # [S]
    mask = batch.loss_mask.to(dtype)  # [T]
    # The padding sequence has no loss token, so it is no response here.
    num_responses = (counts > 0).sum(dtype=torch.int32)
    # Every token counts alike, so a long response counts more than a short one.
    if aggregation == "token_mean":
        return mask, counts.sum(dtype=torch.int32)
    # The form of the paper, whose update is a sum over the tokens of a response.
    if aggregation == "token_sum":
        return mask, num_responses
    assert aggregation == "response_mean", aggregation
    # The form of the paper's code, which produced the paper's numbers: every response counts alike.
    # The clamp acts on sequences without a loss token alone. Their mask is 0, and 0 / 0 would put a
    # nan into the loss.
    return mask / expand_to_tokens(counts, batch).clamp(min=1).to(dtype), num_responses


def count_sums(batch: TokenBatch) -> dict[str, Tensor]:
    """Return num_tokens and num_responses that carry loss, float64 []. Every objective has them."""
    counts = loss_tokens_per_sequence(batch)
    return {
        "num_tokens": counts.sum(dtype=torch.float64),
        # A response whose loss a selection has taken away is not counted.
        "num_responses": (counts > 0).sum(dtype=torch.float64),
    }
