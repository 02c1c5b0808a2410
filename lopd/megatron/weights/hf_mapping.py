"""Which Hugging Face tensors a Megatron parameter holds, and which part of them a rank owns. One
table, read in both directions.

Loading reads ``parts`` of each tensor and ``join``s them; exporting ``split``s the parameter and
writes its pieces at the same ``parts``. Names of Megatron parameters in the table are those of the
local spec, with layers and experts numbered over all ranks; ``global_name`` gives them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lopd.megatron.weights.architecture import Architecture

Layout: TypeAlias = Literal["whole", "rows", "columns", "qkv", "gate_up"]
Part: TypeAlias = tuple[slice, ...]  # one slice for each dimension of a Hugging Face tensor

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
# Transformer Engine fuses a norm with the linear layer behind it, and keeps the weights of all
# local experts in one module.
_ALIASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (
        re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"),
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter.

    layout: whole (the same on every rank), rows or columns (split along the first or second
    dimension), qkv (rows of query, key and value, interleaved by key-value head), gate_up (the
    rank's rows of gate, then of up). expert: split over expert_tensor ranks instead of tensor
    ranks. copy: a second holder of a tensor that another parameter exports (tied embeddings on the
    last pipeline stage). num_rows: of the Hugging Face tensor, where the parameter has more: zeros,
    the same number in every layout (0: it has as many).
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the full Hugging Face tensors, padding included
    layout: Layout
    kv_heads: int = 0
    expert: bool = False
    copy: bool = False
    num_rows: int = 0

    def parts(self, rank: int, size: int) -> tuple[Part, ...]:
        """What rank of size ranks owns of each Hugging Face tensor."""
        axis = {"whole": None, "rows": 0, "columns": 1, "qkv": 0, "gate_up": 0}[self.layout]
        parts = []
        for shape in self.shapes:
            part = [slice(0, length) for length in shape]
            if axis is not None:
                step, rest = divmod(shape[axis], size)
                assert rest == 0, f"{self.megatron}: {shape} does not divide by {size}"
                part[axis] = slice(rank * step, (rank + 1) * step)
            parts.append(tuple(part))
        return tuple(parts)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the Megatron parameter on one of size ranks."""
        if self.layout == "whole":
            return self.shapes[0]
        if self.layout == "columns":
            rows, columns = self.shapes[0]
            return (rows, columns // size)
        return (sum(shape[0] for shape in self.shapes) // size, *self.shapes[0][1:])

    def read(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """The Megatron parameter of a rank from the full Hugging Face tensors, or from what is
        sliced like them; only its own part of them is touched.
        """
        parts = self.parts(rank, size)
        if not self.num_rows:
            return self.join([tensor[part] for tensor, part in zip(tensors, parts, strict=True)])
        (rows, columns), (tensor,) = parts[0], tensors
        start, stop = (min(bound, self.num_rows) for bound in (rows.start, rows.stop))
        piece = tensor[start:stop, columns] if start < stop else tensor[:1, columns][:0]
        return torch.cat(
            [piece, piece.new_zeros(rows.stop - rows.start - len(piece), piece.shape[1])]
        )

    def unpad(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The full tensors as Hugging Face has them."""
        return [tensor[: self.num_rows] for tensor in tensors] if self.num_rows else list(tensors)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The Megatron parameter of a rank from its pieces of the Hugging Face tensors."""
        if self.layout == "gate_up":
            return torch.cat(list(pieces))
        if self.layout == "qkv":
            groups = self._local_groups(pieces[1].shape[0])
            grouped = [
                piece.reshape(groups, -1, *piece.shape[1:]) for piece in pieces
            ]  # [groups, rows of a group, ...]
            return torch.cat(grouped, dim=1).flatten(0, 1)
        (piece,) = pieces
        return piece

    def split(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Inverse of join."""
        if self.layout == "gate_up":
            return parameter.chunk(2)
        if self.layout == "qkv":
            heads = [
                shape[0] // self.shapes[1][0] for shape in self.shapes
            ]  # query heads per key-value head, 1, 1
            head_dim = self.shapes[1][0] // self.kv_heads
            grouped = parameter.reshape(-1, sum(heads) * head_dim, *parameter.shape[1:])
            return tuple(
                piece.flatten(0, 1)
                for piece in grouped.split([count * head_dim for count in heads], dim=1)
            )
        return (parameter,)

    def _local_groups(self, local_rows: int) -> int:
        return local_rows * self.kv_heads // self.shapes[1][0]


def global_name(name: str, *, first_layer: int, first_expert: int) -> str:
    """The table's name of a parameter that a rank calls so; first_layer and first_expert: the
    rank's first, counted over all ranks.
    """
    for pattern, ours in _ALIASES:
        name = pattern.sub(ours, name)
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first_expert}.", name)


def weights(arch: Architecture) -> tuple[Weight, ...]:
    """Every parameter of the model, in the order of the Hugging Face checkpoint: embedding, layers,
    norm, head.
    """
    hidden, vocab = arch.hidden_size, (arch.padded_vocab_size, arch.hidden_size)
    num_rows = 0 if arch.vocab_size == arch.padded_vocab_size else arch.vocab_size
    table = [
        Weight(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            (vocab,),
            "rows",
            num_rows=num_rows,
        )
    ]
    for layer in range(arch.num_layers):
        table += _layer(arch, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    table.append(
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), "whole")
    )
    head = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    table.append(
        Weight(
            "output_layer.weight",
            (head,),
            (vocab,),
            "rows",
            copy=arch.tied_embeddings,
            num_rows=num_rows,
        )
    )
    return tuple(table)


def _layer(arch: Architecture, megatron: str, hf: str) -> list[Weight]:
    hidden, q_rows, kv_rows = (
        arch.hidden_size,
        arch.num_heads * arch.head_dim,
        arch.num_kv_heads * arch.head_dim,
    )
    qkv = tuple(f"{hf}self_attn.{name}_proj" for name in "qkv")
    rows = (q_rows, kv_rows, kv_rows)
    qkv_weights, qkv_biases = (
        tuple(f"{name}.weight" for name in qkv),
        tuple(f"{name}.bias" for name in qkv),
    )
    table = [
        Weight(
            f"{megatron}input_layernorm.weight",
            (f"{hf}input_layernorm.weight",),
            ((hidden,),),
            "whole",
        ),
        Weight(
            f"{megatron}self_attention.linear_qkv.weight",
            qkv_weights,
            tuple((count, hidden) for count in rows),
            "qkv",
            kv_heads=arch.num_kv_heads,
        ),
        Weight(
            f"{megatron}self_attention.linear_proj.weight",
            (f"{hf}self_attn.o_proj.weight",),
            ((hidden, q_rows),),
            "columns",
        ),
        Weight(
            f"{megatron}pre_mlp_layernorm.weight",
            (f"{hf}post_attention_layernorm.weight",),
            ((hidden,),),
            "whole",
        ),
    ]
    if arch.qkv_bias:
        table.append(
            Weight(
                f"{megatron}self_attention.linear_qkv.bias",
                qkv_biases,
                tuple((count,) for count in rows),
                "qkv",
                kv_heads=arch.num_kv_heads,
            )
        )
    if arch.qk_norm:
        for name in "qk":
            table.append(
                Weight(
                    f"{megatron}self_attention.{name}_layernorm.weight",
                    (f"{hf}self_attn.{name}_norm.weight",),
                    ((arch.head_dim,),),
                    "whole",
                )
            )
    if not arch.num_experts:
        return table + _mlp(
            f"{megatron}mlp.", f"{hf}mlp.", hidden, arch.ffn_hidden_size, expert=False
        )
    table.append(
        Weight(
            f"{megatron}mlp.router.weight",
            (f"{hf}mlp.gate.weight",),
            ((arch.num_experts, hidden),),
            "whole",
        )
    )
    for expert in range(arch.num_experts):
        table += _mlp(
            f"{megatron}mlp.experts.local_experts.{expert}.",
            f"{hf}mlp.experts.{expert}.",
            hidden,
            arch.moe_ffn_hidden_size,
            expert=True,
        )
    return table


def _mlp(megatron: str, hf: str, hidden: int, width: int, *, expert: bool) -> list[Weight]:
    up = (width, hidden)
    return [
        Weight(
            f"{megatron}linear_fc1.weight",
            (f"{hf}gate_proj.weight", f"{hf}up_proj.weight"),
            (up, up),
            "gate_up",
            expert=expert,
        ),
        Weight(
            f"{megatron}linear_fc2.weight",
            (f"{hf}down_proj.weight",),
            ((hidden, width),),
            "columns",
            expert=expert,
        ),
    ]


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint with its shape, in order."""
    return {
        name: shape
        for weight in weights(arch)
        if not weight.copy
        for name, shape in zip(weight.hf, _unpadded(weight), strict=True)
    }


def _unpadded(weight: Weight) -> tuple[tuple[int, ...], ...]:
    return (
        tuple((weight.num_rows, *shape[1:]) for shape in weight.shapes)
        if weight.num_rows
        else weight.shapes
    )
