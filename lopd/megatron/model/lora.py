"""LoRA: thin matrices beside the linear layers of a model, trained in place of its weights.

A layer that multiplies by W [out, in] then multiplies by W + scale * B A, with A [rank, in] and
B [out, rank]. The change is computed from the layer's input as B (A x), so that no matrix of the
size of W is made. It is added by a forward hook of the layer. The layer's class, its place and the
names of its own weights stay, whichever of Megatron-Core's linear layers it is.

Megatron-Core itself has no LoRA. It does know weights that take no gradient: its layers then
compute none, and its buffers and its optimizer have no room for one.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import functional

from lopd.config import LoraSection
from lopd.megatron.ranks import parallel
from lopd.megatron.weights.adapters import adapter_weights
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.transfer import load_adapters

# The layers whose input ranks divide. They hold columns of their weight; the others hold rows.
_BY_COLUMNS = ("linear_proj", "linear_fc2")
# A layer's weight. Transformer Engine's grouped layer has one for each expert: weight0, weight1...
_WEIGHT = re.compile(r"weight(\d*)")


def add_adapters(model: Any, arch: Architecture, lora: LoraSection, *, seed: int) -> None:
    """Freeze all weights of a model and add adapters, which change nothing yet: B is zero.

    It comes after the weights are loaded, and before the model is wrapped for training.

    Args:
        model: This rank's part of the model.
        arch: The architecture of the whole model.
        lora: The settings. They must have a rank.
        seed: The seed of the matrices A, which are the same for every layout of ranks.
    """
    while hasattr(model, "module"):
        model = model.module
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in lora.targets:
            _add_to_layer(layer, name, lora, model.config)
    _draw(model, arch, lora, seed)
    # Recompute gives a part of the model no gradient if none of its inputs has one. The embedding
    # is frozen, so the adapters of the first layer would silently not be trained.
    if hasattr(model, "embedding"):
        model.embedding.register_forward_hook(_require_gradient)


def _add_to_layer(layer: Any, name: str, lora: LoraSection, config: Any) -> None:
    """Give one linear layer its matrices, for Transformer Engine's grouped layer one per expert."""
    assert lora.rank is not None
    by_columns = name.rpartition(".")[2] in _BY_COLUMNS
    is_expert = ".mlp.experts." in name
    matches = [_WEIGHT.fullmatch(own) for own, _ in layer.named_parameters(recurse=False)]
    # The numbers of the experts in the layer. A layer of one weight has the number "".
    numbers = [match[1] for match in matches if match is not None]
    assert numbers, f"{name} has no weight that could have an adapter"
    for number in numbers:
        rows, columns = getattr(layer, f"weight{number}").shape
        settings = {"dtype": config.params_dtype, "device": parallel.device()}
        a = torch.nn.Parameter(torch.empty(lora.rank, columns, **settings))
        b = torch.nn.Parameter(torch.empty(rows, lora.rank, **settings))
        # Of the two, one is a part, and the other is the same on all ranks of the tensor group.
        _mark(a, is_part=by_columns, axis=1, is_expert=is_expert)
        _mark(b, is_part=not by_columns, axis=0, is_expert=is_expert)
        layer.register_parameter(f"lora_A{number}", a)
        layer.register_parameter(f"lora_B{number}", b)
    layer.register_forward_hook(
        _AddProduct(tuple(numbers), lora.scale, by_columns, is_expert, config.layernorm_epsilon)
    )


def _mark(parameter: Any, *, is_part: bool, axis: int, is_expert: bool) -> None:
    """Tell Megatron-Core how tensor ranks hold a matrix.

    It decides over which ranks gradients are summed, and where they count in the gradient norm.
    What all weights of experts have in common is marked by lopd.megatron.training.wrapping.
    """
    if is_expert:
        # The expert's ranks have the sum of its gradient (_AddProduct), and it must count once.
        parameter.shared = not is_part and parallel.expert_tensor_rank() > 0
    elif is_part:
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    else:
        # It sees this rank's part of the tokens, as a norm does. So its gradient is summed over the
        # tensor ranks, and counts in the norm on the first of them.
        parameter.sequence_parallel = parallel.tensor_size() > 1


def _draw(model: Any, arch: Architecture, lora: LoraSection, seed: int) -> None:
    """Fill the matrices: A uniform in +-1 / sqrt(in), as PEFT does by default, and B zero."""
    shapes = {
        name: shape
        for weight in adapter_weights(arch, lora)
        for name, shape in zip(weight.hf, weight.shapes, strict=True)
    }

    def tensor(name: str) -> Tensor:
        shape = shapes[name]
        if ".lora_B." in name:
            return torch.zeros(shape)
        # A seed of its own for each name, so that it does not matter which rank draws which.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])

    load_adapters(model, arch, lora, tensor)


def _require_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(torch.is_grad_enabled())


@dataclass(frozen=True, slots=True)
class _AddProduct:
    """A forward hook that adds scale * B (A x) to what a linear layer returns.

    Attributes:
        numbers: The numbers of the layer's experts as text, or "" alone.
        scale: The factor of the product.
        by_columns: Whether tensor ranks hold columns of the weight, else rows.
        is_expert: Whether the layer is a part of an expert.
        epsilon: That of the norm, where the layer has one in front.
    """

    numbers: tuple[str, ...]
    scale: float
    by_columns: bool
    is_expert: bool
    epsilon: float

    def __call__(self, layer: Any, inputs: Any, output: Any) -> Any:
        # Megatron's linear layers return the product and a bias that the caller adds.
        product, bias = output
        hidden = inputs[0]
        # Transformer Engine fuses a norm with the layer behind it. The adapter's input is what the
        # norm returns. It is computed here once more, because the layer keeps it to itself.
        if hasattr(layer, "layer_norm_weight"):
            weight = layer.layer_norm_weight
            normed = functional.rms_norm(hidden.float(), weight.shape, weight.float(), self.epsilon)
            hidden = normed.to(hidden.dtype)
        if self.numbers == ("",):
            return product + self._change(layer, "", hidden), bias
        # The grouped layer gets the tokens of its experts one after the other, and their numbers.
        sizes = [int(size) for size in inputs[1]]
        parts = hidden.split(sizes)
        changes = [
            self._change(layer, number, part)
            for number, part in zip(self.numbers, parts, strict=True)
        ]
        return product + torch.cat(changes), bias

    def _change(self, layer: Any, number: str, hidden: Tensor) -> Tensor:
        """Return scale * B (A x), divided over ranks as the layer's product is."""
        a = getattr(layer, f"lora_A{number}")
        b = getattr(layer, f"lora_B{number}")
        if self.is_expert:
            return self._expert_change(a, b, hidden)
        # Tensor ranks share the tokens between layers (sequence parallelism), and the layer's
        # features inside. The exchange is that of the layer itself, of rank instead of in or out
        # features per token.
        thin = functional.linear(hidden, a)
        if parallel.tensor_size() > 1:
            group = parallel.tensor_group()
            if self.by_columns:
                thin = reduce_scatter_to_sequence_parallel_region(thin, group=group)
            else:
                thin = gather_from_sequence_parallel_region(thin, group=group)
        return functional.linear(thin * self.scale, b)

    def _expert_change(self, a: Tensor, b: Tensor, hidden: Tensor) -> Tensor:
        # All ranks of an expert get the same tokens. Around the expert, Megatron-Core sums its
        # ranks' parts of the output, and of the input's gradient. So nothing is exchanged for the
        # product. But a rank's gradient of the matrix that all of them have is a part of a sum.
        if parallel.expert_tensor_size() > 1:
            group = parallel.expert_tensor_group()
            # The same matrix forward, the sum of its gradients backward.
            if self.by_columns:
                b = copy_to_tensor_model_parallel_region(b, group=group)
            else:
                a = copy_to_tensor_model_parallel_region(a, group=group)
        return functional.linear(functional.linear(hidden, a) * self.scale, b)
