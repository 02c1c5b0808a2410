"""Replacements of two slow or batch-dependent places of SGLang's plain-torch path; each is
installed by sglang_rollout.cpu.plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

ROWS = 16
"""A matrix product with fewer rows is computed with this many. MKL takes other kernels for fewer
than 4 rows on one thread and fewer than 12 on two, which sum in another order: a row's result would
depend on how many rows its neighbours bring. From 16 rows on, a row's result is its own (tested).
"""

# keys of a request are padded to a multiple of this: a handful of shapes, at most 31 keys of waste
LENGTH_STEP = 32


def with_enough_rows(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A linear map whose result for a row does not depend on the number of rows. product: of x [N,
    K], weight [M, K], anything else -> [N, M].
    """

    def invariant(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        num_rows = x.shape[0]
        if x.dim() != 2 or num_rows >= ROWS or num_rows == 0:
            return product(x, *arguments, **named)
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
    """Attention of one query per request to its own keys, requests of similar length together;
    writes and returns output [B, H, D].

    The result for a request depends on its own keys and length alone (on one thread): its keys are
    padded to a multiple of LENGTH_STEP, not to the longest of the batch.
    """
    padded = (seq_lens + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP  # [B]
    grouped = query.shape[1] != k_cache.shape[1]
    for length in padded.unique().tolist():
        members = (padded == length).nonzero()[:, 0]  # [b]
        slots = req_to_token[req_pool_indices[members], :length]  # [b, L]
        if slots.shape[1] < length:  # the pool's row ends before the padding does
            slots = pad(slots, (0, length - slots.shape[1]))
        visible = torch.arange(length) < seq_lens[members, None]  # [b, L]
        keys = torch.where(visible, slots, 0)  # what lies beyond the end was never written
        output[members] = scaled_dot_product_attention(
            query[members][:, :, None],  # [b, H, 1, D]
            k_cache[keys].transpose(1, 2).to(query.dtype),  # [b, G, L, D]
            v_cache[keys].transpose(1, 2).to(query.dtype),
            attn_mask=visible[:, None, None],
            scale=scaling,
            enable_gqa=grouped,
        )[:, :, 0]
    return output
