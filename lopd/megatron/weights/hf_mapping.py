"""Which Hugging Face tensors a Megatron parameter holds, and which part of them a rank owns.

One table is read in both directions. Loading reads the ``parts`` of each tensor and ``join``s them.
Exporting ``split``s the parameter and writes its shards to the same ``parts``.

The table names Megatron's parameters as the local layer spec does, with layers and experts numbered
over all ranks. ``global_name`` gives these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lopd.deferred import deferred
from lopd.megatron.weights.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

Layout: TypeAlias = Literal["whole", "rows", "columns", "qkv", "gate_up"]
# One slice for each dimension of a Hugging Face tensor.
Part: TypeAlias = tuple[slice, ...]

# The dimension of the Hugging Face tensors along which ranks divide a parameter.
_AXES = {"whole": None, "rows": 0, "columns": 1, "qkv": 0, "gate_up": 0}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
# Transformer Engine fuses a norm with the linear layer behind it, and it keeps the weights of all
# local experts in one module. So its parameters have other names than those of the local spec.
_ALIASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (
        re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|lora_A|lora_B)(\d+)$"),
        r"mlp.experts.local_experts.\3.\1.\2",
    ),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        megatron: The name of the parameter.
        hf: The names of the Hugging Face tensors.
        shapes: The shapes of the full Hugging Face tensors, padding included.
        layout: How ranks divide the parameter. "whole": it is the same on every rank. "rows" and
            "columns": it is split along the first or the second dimension. "qkv": it holds rows of
            query, key and value, interleaved by key-value head. "gate_up": it holds the rank's rows
            of gate, then those of up.
        kv_heads: The number of key-value heads of the model, for the layout "qkv".
        expert: Whether it is split over expert-tensor ranks instead of tensor ranks.
        copy: Whether it is a second copy of a tensor that another parameter exports: tied
            embeddings on the last pipeline stage.
        num_rows: The rows of the Hugging Face tensor, if the parameter has more. The rows past it
            are zeros, and their number is the same in every layout. 0 means that none were added.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    kv_heads: int = 0
    expert: bool = False
    copy: bool = False
    num_rows: int = 0

    def parts(self, rank: int, size: int) -> tuple[Part, ...]:
        """Return the slices of Hugging Face tensors that `rank`, one of `size` ranks, holds."""
        axis = _AXES[self.layout]
        parts = []
        for shape in self.shapes:
            part = [slice(0, length) for length in shape]
            if axis is not None:
                # Every rank owns the same number of rows or columns, one rank after the other.
                step, rest = divmod(shape[axis], size)
                # validate_layout has refused every layout that does not divide.
                assert rest == 0, f"{self.megatron}: {shape} does not divide by {size}"
                part[axis] = slice(rank * step, (rank + 1) * step)
            parts.append(tuple(part))
        return tuple(parts)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of the Megatron parameter on one of `size` ranks."""
        if self.layout == "whole":
            return self.shapes[0]
        if self.layout == "columns":
            rows, columns = self.shapes[0]
            return (rows, columns // size)
        # The other layouts stack the rows of their tensors.
        return (sum(shape[0] for shape in self.shapes) // size, *self.shapes[0][1:])

    def read(self, tensors: Sequence[Any], rank: int, size: int) -> Tensor:
        """Return the Megatron parameter of one of `size` ranks.

        Args:
            tensors: The full Hugging Face tensors, or objects that are sliced like them. Only the
                rank's own part of each is read.
            rank: The rank.
            size: The number of ranks that divide the parameter.
        """
        parts = self.parts(rank, size)
        if not self.num_rows:
            return self.join([tensor[part] for tensor, part in zip(tensors, parts, strict=True)])
        # The embedding or the output layer of a padded vocabulary. The file has no rows past
        # num_rows, so the rank's rows are cut there and filled up with zeros.
        rows, columns = parts[0]
        (tensor,) = tensors
        start = min(rows.start, self.num_rows)
        stop = min(rows.stop, self.num_rows)
        # A rank may own padding only. Then one row is read and cut off: it gives the type.
        found = tensor[start:stop, columns] if start < stop else tensor[:1, columns][:0]
        padding = found.new_zeros(rows.stop - rows.start - len(found), found.shape[1])
        return torch.cat([found, padding])

    def unpad(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the full tensors without the rows that padding added."""
        # Padding is at the end, on the last ranks.
        return [tensor[: self.num_rows] for tensor in tensors] if self.num_rows else list(tensors)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Return a rank's Megatron parameter, made of its shards of the Hugging Face tensors."""
        # Each rank has its rows of gate and then its rows of up. The full parameter of one rank is
        # therefore not the concatenation of two ranks' parameters.
        if self.layout == "gate_up":
            return torch.cat(list(shards))
        if self.layout == "qkv":
            # Megatron wants the query heads of a group, then its key, then its value, group after
            # group. A plain concatenation would have the right shape and be wrong.
            groups = self._local_groups(shards[1].shape[0])
            # [groups, rows of a group, ...]
            grouped = [shard.reshape(groups, -1, *shard.shape[1:]) for shard in shards]
            return torch.cat(grouped, dim=1).flatten(0, 1)
        (shard,) = shards
        return shard

    def split(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return the shards of the Hugging Face tensors in a parameter. It undoes join."""
        if self.layout == "gate_up":
            return parameter.chunk(2)
        if self.layout == "qkv":
            # Heads in each group of query, key and value. Key and value have one each.
            heads = [shape[0] // self.shapes[1][0] for shape in self.shapes]
            # From the key tensor: its rows are kv_heads * head_dim.
            head_dim = self.shapes[1][0] // self.kv_heads
            grouped = parameter.reshape(-1, sum(heads) * head_dim, *parameter.shape[1:])
            shards = grouped.split([count * head_dim for count in heads], dim=1)
            return tuple(shard.flatten(0, 1) for shard in shards)
        return (parameter,)

    def _local_groups(self, local_rows: int) -> int:
        """Return the number of key-value heads in this many rows of the key tensor."""
        return local_rows * self.kv_heads // self.shapes[1][0]


def global_name(name: str, *, first_layer: int, first_expert: int) -> str:
    """Return the table's name of a parameter.

    Args:
        name: The name that the parameter has on this rank, in either layer spec.
        first_layer: The number of the rank's first layer, counted over all ranks.
        first_expert: The number of the rank's first expert, counted over all ranks.
    """
    # The aliases first: they give an expert of Transformer Engine's the name that has its number.
    for pattern, ours in _ALIASES:
        name = pattern.sub(ours, name)
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first_expert}.", name)


def weights(arch: Architecture) -> tuple[Weight, ...]:
    """Return every parameter of the model, in the order of the Hugging Face checkpoint.

    The order is embedding, layers, norm, head.
    """
    # A tuple, because several readers go through the table more than once.
    return tuple(_table(arch))


def _table(arch: Architecture) -> Iterator[Weight]:
    vocab = (arch.padded_vocab_size, arch.hidden_size)
    # 0 means that the vocabulary divides already.
    num_rows = 0 if arch.vocab_size == arch.padded_vocab_size else arch.vocab_size
    yield Weight(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        (vocab,),
        "rows",
        num_rows=num_rows,
    )
    for layer in range(arch.num_layers):
        yield from _layer(arch, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    # Norms are small and whole on every rank.
    yield _whole("decoder.final_layernorm.weight", "model.norm.weight", arch.hidden_size)
    # With tied embeddings the last pipeline stage has a parameter of its own for the same tensor.
    # It is filled on loading, and the embedding alone is exported.
    yield Weight(
        "output_layer.weight",
        ("model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight",),
        (vocab,),
        "rows",
        copy=arch.tied_embeddings,
        num_rows=num_rows,
    )


def _whole(megatron: str, hf: str, *shape: int) -> Weight:
    """Return a parameter that is the same on every rank."""
    return Weight(megatron, (hf,), (shape,), "whole")


def _layer(arch: Architecture, megatron: str, hf: str) -> Iterator[Weight]:
    hidden = arch.hidden_size
    yield _whole(f"{megatron}input_layernorm.weight", f"{hf}input_layernorm.weight", hidden)
    yield _qkv(arch, megatron, hf, "weight", hidden)
    yield Weight(
        f"{megatron}self_attention.linear_proj.weight",
        (f"{hf}self_attn.o_proj.weight",),
        ((hidden, arch.num_heads * arch.head_dim),),
        "columns",
    )
    norm = f"{hf}post_attention_layernorm.weight"
    yield _whole(f"{megatron}pre_mlp_layernorm.weight", norm, hidden)
    if arch.qkv_bias:
        yield _qkv(arch, megatron, hf, "bias")
    # One norm for all heads.
    if arch.qk_norm:
        for name in "qk":
            norm = f"{megatron}self_attention.{name}_layernorm.weight"
            yield _whole(norm, f"{hf}self_attn.{name}_norm.weight", arch.head_dim)
    if not arch.num_experts:
        width = arch.ffn_hidden_size
        yield from _mlp(f"{megatron}mlp.", f"{hf}mlp.", hidden, width, expert=False)
        return
    # The router is whole on every rank. Each rank chooses the experts of its own tokens.
    router = f"{megatron}mlp.router.weight"
    yield _whole(router, f"{hf}mlp.gate.weight", arch.num_experts, hidden)
    for expert in range(arch.num_experts):
        ours = f"{megatron}mlp.experts.local_experts.{expert}."
        theirs = f"{hf}mlp.experts.{expert}."
        yield from _mlp(ours, theirs, hidden, arch.moe_ffn_hidden_size, expert=True)


def _qkv(arch: Architecture, megatron: str, hf: str, kind: str, *columns: int) -> Weight:
    """Return the fused weight or bias of query, key and value."""
    kv_rows = arch.num_kv_heads * arch.head_dim
    # Megatron-Core keeps the three as one matrix, and Hugging Face as three.
    rows = (arch.num_heads * arch.head_dim, kv_rows, kv_rows)
    return Weight(
        f"{megatron}self_attention.linear_qkv.{kind}",
        tuple(f"{hf}self_attn.{name}_proj.{kind}" for name in "qkv"),
        tuple((count, *columns) for count in rows),
        "qkv",
        kv_heads=arch.num_kv_heads,
    )


def _mlp(megatron: str, hf: str, hidden: int, width: int, *, expert: bool) -> Iterator[Weight]:
    # Megatron computes gate and up in one product.
    up = (width, hidden)
    yield Weight(
        f"{megatron}linear_fc1.weight",
        (f"{hf}gate_proj.weight", f"{hf}up_proj.weight"),
        (up, up),
        "gate_up",
        expert=expert,
    )
    down = (hidden, width)
    yield Weight(
        f"{megatron}linear_fc2.weight",
        (f"{hf}down_proj.weight",),
        (down,),
        "columns",
        expert=expert,
    )


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face checkpoint, in order."""
    # A copy names a tensor that another parameter has named before.
    return {
        name: shape
        for weight in weights(arch)
        if not weight.copy
        for name, shape in zip(weight.hf, _unpadded_shapes(weight), strict=True)
    }


def _unpadded_shapes(weight: Weight) -> tuple[tuple[int, ...], ...]:
    if not weight.num_rows:
        return weight.shapes
    return tuple((weight.num_rows, *shape[1:]) for shape in weight.shapes)
