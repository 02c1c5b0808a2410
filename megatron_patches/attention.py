"""Attention over packed sequences without Transformer Engine.

Sequences of similar length are padded on the right to one length and go through one batched call.
With a causal mask a real query never sees a key to its right. So padding needs no mask of its own
and changes no result.

The alternative is to slice each sequence out of the row. The backward pass would then make a
gradient of the whole row for each of them. On a CPU that took a fifth of the whole training step,
for rows of a hundred short sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn import functional

# A sequence joins a group if the longest of the group is longer by at most this share. A larger
# value means fewer calls and more computation on padding.
MAX_PADDING = 0.25


@dataclass(frozen=True, slots=True)
class PaddedGroups:
    """How the T packed tokens become P padded ones, group after group.

    Attributes:
        groups: The number of sequences and the padded length of each group.
        padded: int64 [P], the token in each place, and T where there is none. None if the packed
            and the padded tokens are the same.
        packed: int64 [T], the place of each token. None if padded is None.
    """

    groups: tuple[tuple[int, int], ...]
    padded: Tensor | None
    packed: Tensor | None

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device) -> PaddedGroups:
        """Put sequences of similar length into groups.

        Args:
            bounds: Where the sequences begin and end, from 0 to T.
            device: The device of the index tensors.
        """
        starts = bounds[:-1]
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        # All have one length: the packed row is already the padded batch.
        if len(set(lengths)) == 1:
            return cls(((len(lengths), lengths[0]),), None, None)
        # Longest first, so that the first sequence of a group is its longest. Empty sequences have
        # nothing to compute.
        filled = [index for index, length in enumerate(lengths) if length > 0]
        order = sorted(filled, key=lambda index: -lengths[index])
        groups: list[list[int]] = []
        for index in order:
            if not groups or lengths[index] * (1 + MAX_PADDING) < lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(index)
        # The token that does not exist: it stands in the places of padding.
        num_tokens = bounds[-1]
        rows = []
        for group in groups:
            # [sequences of the group, padded length]: the token in each place.
            offsets = torch.arange(lengths[group[0]])
            first = torch.tensor([starts[index] for index in group]).unsqueeze(1)
            length = torch.tensor([lengths[index] for index in group]).unsqueeze(1)
            rows.append(torch.where(offsets < length, first + offsets, num_tokens).flatten())
        padded = torch.cat(rows)
        # The inverse. Its last entry collects the places of padding and is cut off.
        packed = torch.empty(num_tokens + 1, dtype=torch.int64)
        packed[padded] = torch.arange(len(padded))
        sizes = tuple((len(group), lengths[group[0]]) for group in groups)
        return cls(sizes, padded.to(device), packed[:-1].to(device))


class _Rearrange(torch.autograd.Function):
    """rows[index], where an index past the end gives zeros.

    The inverse says where each row went. With it the backward pass is a gather too. On a CPU that
    is much faster than the index_add that autograd would use.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather(rows, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Each row went to one place at most, so its gradient is read from there.
        _, inverse = ctx.saved_tensors
        return _gather(gradient, inverse), None, None


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    # Towards the padded side there are indices past the end. They find the row of zeros.
    if len(index) > len(rows):
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return rows.index_select(0, index)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PaddedGroups,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute causal attention inside of each sequence.

    Args:
        query: [T, heads, head_dim].
        key: [T, kv_heads, head_dim].
        value: [T, kv_heads, head_dim].
        plan: The groups of the sequences.
        scale: The factor of the scores before the softmax.
        dropout: The probability that a weight of the attention is dropped.

    Returns:
        [T, heads, head_dim].
    """
    tensors = [query, key, value]
    # [P, ...]
    if plan.padded is not None:
        tensors = [_Rearrange.apply(tensor, plan.padded, plan.packed) for tensor in tensors]
    # The tokens of each group stand one after the other, so a split copies nothing.
    sizes = [math.prod(group) for group in plan.groups]
    by_group = zip(plan.groups, *(tensor.split(sizes) for tensor in tensors), strict=True)
    parts = []
    for group, *flat in by_group:
        # [sequences, heads, length, head_dim], the order that torch's function takes.
        q, k, v = (tensor.unflatten(0, group).transpose(1, 2) for tensor in flat)
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            dropout_p=dropout,
        )
        # Back to [sequences * length, heads, head_dim].
        parts.append(out.transpose(1, 2).flatten(0, 1))
    # Back from the order of the groups to the order of the row.
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if plan.padded is None else _Rearrange.apply(out, plan.packed, plan.padded)


class PackedAttention(DotProductAttention):
    """Causal attention inside of each sequence of a packed row.

    It is computed by torch's scaled_dot_product_attention.

    What upstream does: DotProductAttention.forward
    (megatron/core/transformer/dot_product_attention.py) asserts that no packed_seq_params are
    given. With this class the trainer can always pass packed sequences, as it does with Transformer
    Engine.

    This class was checked with megatron-core 0.16.1 and 0.18.2. Remove it when the attention of
    Megatron-Core's local spec accepts the thd layout. It is not used where Transformer Engine is
    installed.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return [T, heads / tp * head_dim].

        Args:
            query: [T, heads / tp, head_dim].
            key: [T, kv_heads / tp, head_dim].
            value: [T, kv_heads / tp, head_dim].
            attention_mask: It is ignored for packed sequences: the mask follows from the bounds.
            attn_mask_type: It is ignored for packed sequences, which are causal here.
            attention_bias: None for packed sequences.
            packed_seq_params: The bounds of the sequences. None leaves the call to upstream.
        """
        if packed_seq_params is None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, None
            )
        assert packed_seq_params.qkv_format == "thd"
        assert attention_bias is None
        # One plan for all layers of a microbatch. The parameters are made anew for each microbatch,
        # so the plan can be kept on them.
        plan = getattr(packed_seq_params, "padded_groups", None)
        if plan is None:
            plan = PaddedGroups.of(packed_seq_params.cu_seqlens_q.tolist(), query.device)
            packed_seq_params.padded_groups = plan
        # Megatron-Core's dropout module knows whether the model trains. torch's function does not.
        dropout = self.attention_dropout.p if self.training else 0.0
        scale = self.softmax_scale
        out = packed_attention(query, key, value, plan, scale=scale, dropout=dropout)
        return out.flatten(1)
