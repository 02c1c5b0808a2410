"""Which tokens of a response carry loss: a prefix, or none where the response was truncated.

A selection only takes tokens away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lopd.deferred import deferred
from lopd.objective.aggregation import expand_to_tokens, loss_tokens_per_sequence, running_sums
from lopd.objective.interface import TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


class Selection(Protocol):
    """A rule that says which tokens keep their loss."""

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the tokens that keep their loss, bool [T]."""
        ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """Only the first tokens of each response carry loss.

    Early tokens carry most of the gain of on-policy distillation. Later states have drifted from
    what the teacher would have written ("On the Position Bias of On-Policy Distillation", arXiv
    2606.22600: the first 30% do about as well as all).

    Exactly one of share and num_tokens is given.

    Attributes:
        share: The share of a response's loss tokens, rounded up to whole tokens.
        num_tokens: The number of loss tokens.
        keep_end_token: Whether the end token of a response that was not truncated keeps its loss.
            Without it nothing in the loss tells the student when to stop.
    """

    share: float | None = None
    num_tokens: int | None = None
    keep_end_token: bool = True

    def __post_init__(self) -> None:
        assert (self.share is None) != (self.num_tokens is None), (
            "a prefix is a share or a number of tokens"
        )

    def __call__(self, batch: TokenBatch) -> Tensor:
        if self.share is None:
            assert self.num_tokens is not None
            limit = torch.full_like(batch.cu_seqlens[1:], self.num_tokens, dtype=torch.int64)  # [S]
        else:
            # In float64: in float32 the tolerance below would be smaller than the rounding of a
            # long response.
            share = loss_tokens_per_sequence(batch).double() * self.share
            # 30 tokens * 0.1 is 3.0000000000000004 in float64, and must stay 3 tokens.
            limit = torch.ceil(share - 1e-9).long()
        # The first loss token has a running sum of 1, so `<=` takes exactly `limit` of them.
        chosen = running_sums(batch.loss_mask.long(), batch) <= expand_to_tokens(limit, batch)
        return chosen | end_tokens(batch) if self.keep_end_token else chosen


@dataclass(frozen=True, slots=True)
class DropTruncated:
    """Responses that were cut off at the length limit carry no loss.

    Such a response often leads nowhere, and the teacher's scores teach the student to continue it.
    """

    def __call__(self, batch: TokenBatch) -> Tensor:
        assert batch.truncated is not None, "it must be known which responses were truncated"
        return expand_to_tokens(~batch.truncated, batch)


def end_tokens(batch: TokenBatch) -> Tensor:
    """Return the end token of each response that was not truncated, bool [T].

    The end token is the last loss token of a response. So call this before selections take tokens
    away. If it is not known which responses were truncated, no token is an end token.
    """
    if batch.truncated is None:
        return torch.zeros_like(batch.loss_mask)
    counts = expand_to_tokens(loss_tokens_per_sequence(batch), batch)
    is_last = running_sums(batch.loss_mask.long(), batch) == counts
    # The running count stays at its last value after the last loss token. Only the mask tells that
    # token from what follows it.
    return batch.loss_mask & is_last & expand_to_tokens(~batch.truncated, batch)


def apply_selections(batch: TokenBatch, selections: Iterable[Selection]) -> TokenBatch:
    """Return the batch with loss only on the tokens that every selection keeps."""
    mask = batch.loss_mask
    for selection in selections:
        # Each selection sees the whole responses. If one saw only what remains after another, a
        # share of a response would depend on the order of the selections.
        mask = mask & selection(batch)
    return replace(batch, loss_mask=mask)
