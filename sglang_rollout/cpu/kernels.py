"""Replacements of two places of SGLang's plain-torch path that are slow or depend on the batch.

sglang_rollout.cpu.plugin installs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# A matrix product with fewer rows is computed with this many. MKL takes other kernels for fewer
# than 4 rows on one thread and for fewer than 12 on two. They sum in another order, so a row's
# result would depend on how many rows its neighbours bring. From 16 rows on it does not (tested).
ROWS = 16
# The keys of a request are padded to a multiple of this. So there are few shapes, and at most 31
# keys are wasted.
LENGTH_STEP = 32


def with_enough_rows(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a linear map whose result for a row does not depend on the number of rows.

    Args:
        product: A function of x [N, K], weight [M, K] and more, that returns [N, M].
    """

    def invariant(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        num_rows = x.shape[0]
        # Other inputs than a matrix, and an empty one, have no rows to add to.
        if x.dim() != 2 or num_rows >= ROWS or num_rows == 0:
            return product(x, *arguments, **named)
        # The added rows are zeros. Their results are cut off again.
        return product(pad(x, (0, 0, 0, ROWS - num_rows)), *arguments, **named)[:num_rows]

    return invariant


def decode_attention(
    query: torch.Tensor,  # [B, H, D], one new token of each request
    output: torch.Tensor,  # [B, H, D], written
    k_cache: torch.Tensor,  # [N, G, D]
    v_cache: torch.Tensor,  # [N, G, D]
    req_to_token: torch.Tensor,  # [R, C] where in the caches a request's tokens are
    req_pool_indices: torch.Tensor,  # [B] the requests' rows in it
    seq_lens: torch.Tensor,  # [B] keys of each request
    scaling: float | None,
) -> torch.Tensor:
    """Compute the attention of one query per request to the request's own keys.

    Requests of similar length are computed together. On one thread the result for a request depends
    on its own keys and its length alone.

    Returns:
        The tensor output [B, H, D].
    """
    # The keys are padded to a multiple of LENGTH_STEP. If they were padded to the longest request
    # of the batch, the sums would be split in another way for every batch.
    padded = (seq_lens + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP  # [B]
    # With grouped queries several query heads share one head of keys and values.
    grouped = query.shape[1] != k_cache.shape[1]
    for length in padded.unique().tolist():
        members = (padded == length).nonzero()[:, 0]  # [b]
        slots = req_to_token[req_pool_indices[members], :length]  # [b, L]
        # The row of the pool ends at the context length, which may be no multiple of the step.
        if slots.shape[1] < length:
            slots = pad(slots, (0, length - slots.shape[1]))
        visible = torch.arange(length) < seq_lens[members, None]  # [b, L]
        # Slots beyond a request's end were never written, and may be no index of the caches.
        keys = torch.where(visible, slots, 0)  # [b, L]
        output[members] = scaled_dot_product_attention(
            query[members][:, :, None],  # [b, H, 1, D]
            k_cache[keys].transpose(1, 2).to(query.dtype),  # [b, G, L, D]
            v_cache[keys].transpose(1, 2).to(query.dtype),
            attn_mask=visible[:, None, None],
            scale=scaling,
            enable_gqa=grouped,
        )[:, :, 0]
    return output
