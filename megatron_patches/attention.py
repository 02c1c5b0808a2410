"""Attention over packed sequences without Transformer Engine.

Sequences of similar length are padded on the right to one length and go through one batched call:
with a causal mask a real query never sees a key to its right, so padding needs no mask of its own
and changes no result. Slicing each sequence out of the row instead would cost a gradient of the
whole row for each: on a CPU, for rows of a hundred short sequences, a fifth of the whole training
step.
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

MAX_PADDING = 0.25  # a sequence joins a group whose longest is at most this much longer


@dataclass(frozen=True, slots=True)
class PaddedGroups:
    """How the T packed tokens become P padded ones, group after group.

    groups: (number of sequences, padded length) of each. padded int64 [P]: the token in each place,
    T where there is none. packed int64 [T]: the place of each token. None, None where packed and
    padded are the same.
    """

    groups: tuple[tuple[int, int], ...]
    padded: Tensor | None
    packed: Tensor | None

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device) -> PaddedGroups:
        """bounds: where the sequences begin and end, from 0 to T."""
        starts, lengths = bounds[:-1], [end - start for start, end in itertools.pairwise(bounds)]
        if len(set(lengths)) == 1:
            return cls(((len(lengths), lengths[0]),), None, None)
        order = sorted(
            (index for index, length in enumerate(lengths) if length > 0),
            key=lambda index: -lengths[index],
        )
        groups: list[list[int]] = []
        for index in order:
            if not groups or lengths[index] * (1 + MAX_PADDING) < lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(index)
        num_tokens = bounds[-1]
        rows = []
        for group in groups:
            offsets = torch.arange(lengths[group[0]])
            first = torch.tensor([starts[index] for index in group]).unsqueeze(1)
            length = torch.tensor([lengths[index] for index in group]).unsqueeze(1)
            rows.append(torch.where(offsets < length, first + offsets, num_tokens).flatten())
        padded = torch.cat(rows)
        packed = torch.empty(num_tokens + 1, dtype=torch.int64)
        packed[padded] = torch.arange(len(padded))
        return cls(
            tuple((len(group), lengths[group[0]]) for group in groups),
            padded.to(device),
            packed[:-1].to(device),
        )


class _Rearrange(torch.autograd.Function):
    """rows[index], where an index past the end gives zeros. inverse: where each row went. Both ways
    are gathers: much faster on a CPU than index_add.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather(rows, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _gather(gradient, inverse), None, None


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    if len(index) > len(rows):  # towards the padded side
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
    """Causal attention inside each sequence. query [T, heads, head_dim], key and value [T,
    kv_heads, head_dim]; gives [T, heads, head_dim].
    """
    tensors = [query, key, value]
    if plan.padded is not None:
        tensors = [
            _Rearrange.apply(tensor, plan.padded, plan.packed) for tensor in tensors
        ]  # [P, ...]
    sizes = [math.prod(group) for group in plan.groups]
    parts = []
    for (num_sequences, length), *pieces in zip(
        plan.groups, *(tensor.split(sizes) for tensor in tensors), strict=True
    ):
        q, k, v = (
            piece.unflatten(0, (num_sequences, length)).transpose(1, 2) for piece in pieces
        )  # [N, heads, L, head_dim]
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            dropout_p=dropout,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))  # [N * L, heads, head_dim]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if plan.padded is None else _Rearrange.apply(out, plan.packed, plan.padded)


class PackedAttention(DotProductAttention):
    """Causal attention inside each sequence of a packed row, by torch's
    scaled_dot_product_attention.

    Why: upstream's DotProductAttention (megatron/core/transformer/dot_product_attention.py:forward)
    asserts that no packed_seq_params are given. With this
    one the trainer always passes packed sequences, as with Transformer Engine. Checked with
    megatron-core
    0.16.1 and 0.18.2. Can go when the local spec takes the thd layout; not used where Transformer
    Engine is installed.
    """

    def forward(
        self,
        query: Tensor,  # [T, heads / tp, head_dim]
        key: Tensor,  # [T, kv_heads / tp, head_dim]
        value: Tensor,  # [T, kv_heads / tp, head_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[T, heads / tp * head_dim]."""
        if packed_seq_params is None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, None
            )
        assert packed_seq_params.qkv_format == "thd"
        assert attention_bias is None
        plan = getattr(packed_seq_params, "padded_groups", None)
        if plan is None:  # one plan for all layers of a microbatch
            plan = PaddedGroups.of(packed_seq_params.cu_seqlens_q.tolist(), query.device)
            packed_seq_params.padded_groups = plan
        dropout = self.attention_dropout.p if self.training else 0.0
        return packed_attention(
            query, key, value, plan, scale=self.softmax_scale, dropout=dropout
        ).flatten(1)
