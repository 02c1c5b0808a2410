"""Which tokens of a response carry loss: a prefix, or nothing of a truncated one. A selection only
takes tokens away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lopd.objective.aggregation import loss_tokens_per_sequence, on_tokens, running_sums
from lopd.objective.interface import TokenBatch


class Selection(Protocol):
    def __call__(self, batch: TokenBatch) -> Tensor:
        """Tokens that go on carrying loss, bool [T]."""
        ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """Only the first tokens of each response: a share of its loss tokens (rounded up) or a number
    of them; exactly one of the two is given.

    Early tokens carry most of what on-policy distillation gains, because later states have drifted
    from what the teacher would have written ("On the Position Bias of On-Policy Distillation",
    arXiv 2606.22600: the first 30% do about as well as all). keep_end_token: the end token of a
    response that was not cut off keeps its loss; without it nothing in the loss speaks about when
    to stop.
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
            share = loss_tokens_per_sequence(batch).double() * self.share
            limit = torch.ceil(share - 1e-9).long()  # 30 tokens * 0.1 = 3.0000000000000004 are 3
        chosen = running_sums(batch.loss_mask.long(), batch) <= on_tokens(limit, batch)
        return chosen | end_tokens(batch) if self.keep_end_token else chosen


@dataclass(frozen=True, slots=True)
class DropTruncated:
    """No loss on responses that were cut off at the length limit: the teacher's scores of a text
    that goes nowhere teach to go on with it.
    """

    def __call__(self, batch: TokenBatch) -> Tensor:
        assert batch.truncated is not None, "it must be known which responses were truncated"
        return on_tokens(~batch.truncated, batch)


def end_tokens(batch: TokenBatch) -> Tensor:
    """The end token of each response that was not truncated, where it carries loss, bool [T]; none
    where truncation is not known.

    The last loss token of a response: look before tokens are taken away.
    """
    if batch.truncated is None:
        return torch.zeros_like(batch.loss_mask)
    is_last = running_sums(batch.loss_mask.long(), batch) == on_tokens(
        loss_tokens_per_sequence(batch), batch
    )
    return batch.loss_mask & is_last & on_tokens(~batch.truncated, batch)


def narrowed(batch: TokenBatch, selections: Iterable[Selection]) -> TokenBatch:
    """The batch with loss only where every selection agrees; each looks at the tokens of the whole
    responses.
    """
    mask = batch.loss_mask
    for selection in selections:
        mask = mask & selection(batch)
    return replace(batch, loss_mask=mask)
