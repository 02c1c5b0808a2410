"""Mixture of experts on a CPU: the same values with fewer passes over memory.

Megatron-Core's own way without Transformer Engine is written for GPUs. It calls each expert's
layers one after the other, cuts and joins tensors between them, and sums the experts' outputs by
scattered additions. On a CPU each of these is a pass over memory of its own. Parameters, their
names, marks and checkpoints stay upstream's: only what is computed with them changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_patches.products import product
from megatron_patches.registry import patch, replace, require

_CHECKED = "megatron-core 0.16.1 and 0.18.2"
_MOE = "megatron/core/transformer/moe"


class _Experts(torch.autograd.Function):
    """All experts of a rank: for each token down(silu(gate) * up * prob) of its expert.

    The products go expert by expert into one tensor. What lies between them is one operation over
    all tokens. The saved tensors are one fewer than those that autograd would save.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, counts: Sequence[int], *weights: Tensor
    ) -> Tensor:
        """Return [T, H].

        Args:
            ctx: What the backward pass needs.
            tokens: [T, H], the first expert's tokens, then those of the next.
            probs: [T], the weight of each token's output.
            counts: The number of tokens of each expert. Their sum is T.
            weights: For each expert [2F, H], the rows of gate and then those of up. After these for
                each expert [H, F].
        """
        first = weights[: len(counts)]
        second = weights[len(counts) :]
        gate_up = tokens.new_empty(len(tokens), first[0].shape[0])
        _multiply(tokens, [weight.t() for weight in first], counts, gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        activated = functional.silu(gate)
        weighted = (activated * up).mul_(probs.unsqueeze(1))
        outputs = torch.empty_like(tokens)
        _multiply(weighted, [weight.t() for weight in second], counts, outputs)
        ctx.save_for_backward(tokens, probs, gate_up, activated, weighted, *weights)
        ctx.counts = counts
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, probs, gate_up, activated, weighted, *weights = ctx.saved_tensors
        counts = ctx.counts
        gradient = gradients[0].contiguous()
        gate, up = gate_up.chunk(2, dim=1)

        # The gradient of `weighted`, then in the same memory that of the product silu(gate) * up.
        grad = torch.empty_like(weighted)
        _multiply(gradient, weights[len(counts) :], counts, grad)
        grad_probs = (activated * up).mul_(grad).sum(1)
        grad.mul_(probs.unsqueeze(1))

        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        grad_tokens = torch.empty_like(tokens)
        _multiply(grad_gate_up, weights[: len(counts)], counts, grad_tokens)

        # An expert without tokens gets zeros, as upstream gives it.
        grad_first = _outer_sums(grad_gate_up, tokens, counts)
        grad_second = _outer_sums(gradient, weighted, counts)
        return grad_tokens, grad_probs, None, *grad_first, *grad_second


def _multiply(rows: Tensor, weights: Sequence[Tensor], counts: Sequence[int], out: Tensor) -> None:
    """Write each expert's rows times its weight into its rows of `out`."""
    parts = zip(rows.split(counts), weights, out.split(counts), strict=True)
    for part, weight, target in parts:
        product(part, weight, out=target)


def _outer_sums(left: Tensor, right: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return for each expert the sum over its rows of the outer products."""
    parts = zip(left.split(counts), right.split(counts), strict=True)
    return [one.t() @ other for one, other in parts]


def _is_plain(config: Any) -> bool:
    """Return whether an expert is down(silu(gate) * up * prob), computed by plain products."""
    return (
        config.activation_func is functional.silu
        and config.gated_linear_unit
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
        and not config.add_bias_linear
        and not config.moe_apply_probs_on_input
        # Fields that choose another kernel.
        and not config.bias_activation_fusion
        and not config.use_te_activation_func
        and not config.gradient_accumulation_fusion
        and not config.fp8
        and not config.fp4
    )


def _is_hooked(layer: torch.nn.Module) -> bool:
    """Return whether somebody wants to know when this layer is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


@patch(
    upstream=f"{_MOE}/experts.py:SequentialMLP.forward",
    checked=_CHECKED,
    until="upstream has grouped experts that run on a CPU",
    without_cuda=True,
)
def experts_in_one_function() -> None:
    """SequentialMLP cuts the tokens, calls the layers of each expert, and joins the outputs. So
    each expert has its own activation, its own weighting and its own backward pass. All experts of
    a rank are now one function with the same products, and what lies between them is one
    operation. Experts that are computed in another way than by default, and layers that somebody
    watches with a hook, still go through upstream's function.
    """
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import SequentialMLP

    original = require(
        SequentialMLP,
        "forward",
        parameters=("self", "permuted_local_hidden_states", "tokens_per_expert", "permuted_probs"),
        source="output, output_bias = expert(tokens, probs)",
    )
    # The order of the factors: the weight of a token comes before the second product.
    require(
        MLP,
        "forward",
        parameters=("self", "hidden_states", "per_token_scale"),
        source="intermediate_parallel = intermediate_parallel * per_token_scale.unsqueeze(-1)",
    )

    def forward(self: Any, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
        first = [expert.linear_fc1 for expert in self.local_experts]
        second = [expert.linear_fc2 for expert in self.local_experts]
        # In 16 bits upstream rounds between the operations.
        is_float = tokens.dtype == probs.dtype == first[0].weight.dtype == torch.float32
        is_watched = any(map(_is_hooked, (*self.local_experts, *first, *second)))
        if not is_float or is_watched or not _is_plain(self.config):
            return original(self, tokens, tokens_per_expert, probs)
        counts = tokens_per_expert.tolist()
        weights = [layer.weight for layer in (*first, *second)]
        # The experts have no bias, which would be the second result.
        return _Experts.apply(tokens, probs, counts, *weights), None

    replace(SequentialMLP, "forward", forward)


class _ReadRows(torch.autograd.Function):
    """rows[index]. The places say where each row went, so the backward pass reads too.

    Autograd would add each gradient to its row, one after the other.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum_rows(gradients[0].contiguous(), places), None, None


class _SumRows(torch.autograd.Function):
    """The sum of the rows in each row of places: what _ReadRows does, backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return _sum_rows(rows, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None


def _sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Return for each row of places [T, K] the sum of these rows [*, H]."""
    # By the order of the places, which is that of the experts. Upstream adds in the same order.
    return functional.embedding_bag(places, rows, mode="sum")


def places_of(routing_map: Tensor) -> Tensor | None:
    """Return where the rows of each token are after the permutation, int64 [T, K].

    Args:
        routing_map: bool [T, experts], the experts of each token.

    Returns:
        None if not all tokens have the same number K of experts, because some were dropped.
    """
    num_tokens = len(routing_map)
    fewest, most = routing_map.sum(1).aminmax() if num_tokens else (0, 0)
    if int(fewest) != int(most) or int(most) == 0:
        return None
    # Rows are in the order of the experts, and inside of an expert in that of the tokens.
    by_expert = routing_map.t().contiguous()
    rows = by_expert.flatten().cumsum(0).sub_(1).view(by_expert.shape)
    return rows.t().masked_select(routing_map).view(num_tokens, int(most))


@patch(
    upstream=f"{_MOE}/moe_utils.py: permute, unpermute (used in token_dispatcher.py)",
    checked=_CHECKED,
    until="upstream permutes without scattered additions",
    without_cuda=True,
)
def permutation_reads() -> None:
    """The backward pass of permute and the forward pass of unpermute add rows to scattered places,
    one after the other. 0.18 sorts a row for each pair of a token and an expert besides. On a CPU
    it is faster to read the rows of a token and to add them. This needs their places, which follow
    from the routing. Tokens that were dropped, and fused kernels, still take upstream's way.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    permute = require(
        moe_utils,
        "permute",
        parameters=(
            "tokens",
            "routing_map",
            "probs",
            "num_out_tokens",
            "fused",
            "drop_and_pad",
        ),
        source="permuted_input = tokens.index_select(0, sorted_indices)",
    )
    unpermute = require(
        moe_utils,
        "unpermute",
        parameters=("permuted_tokens", "sorted_indices", "restore_shape", "probs"),
        source="output_tokens.scatter_add_(",
    )
    # 0.18 returns two values more. Without padding they are None and what it was given.
    is_longer = "tokens_per_expert" in inspect.signature(permute).parameters

    def read(
        tokens: Tensor,
        routing_map: Tensor,
        probs: Tensor | None = None,
        num_out_tokens: Any = None,
        fused: bool = False,
        drop_and_pad: bool = False,
        **rest: Any,
    ) -> Any:
        is_plain = not fused and not drop_and_pad and tokens.dtype == torch.float32
        places = places_of(routing_map) if is_plain else None
        if places is None:
            given = (probs, num_out_tokens, fused, drop_and_pad)
            return permute(tokens, routing_map, *given, **rest)
        by_expert = routing_map.t().contiguous()
        index = torch.arange(len(tokens)).expand_as(by_expert).masked_select(by_expert)
        # unpermute is given the index alone.
        index.places = places  # type: ignore[attr-defined]
        rows = _ReadRows.apply(tokens, index, places)
        weights = None if probs is None else probs.t().contiguous().masked_select(by_expert)
        found = (rows, weights, index)
        return (*found, None, rest.get("tokens_per_expert")) if is_longer else found

    def sum_up(
        permuted_tokens: Tensor,
        sorted_indices: Tensor,
        restore_shape: torch.Size,
        probs: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        places = getattr(sorted_indices, "places", None)
        if places is None or probs is not None or permuted_tokens.dtype != torch.float32:
            return unpermute(permuted_tokens, sorted_indices, restore_shape, probs=probs, **rest)
        summed: Tensor = _SumRows.apply(permuted_tokens, sorted_indices, places)
        return summed

    # token_dispatcher imported both by name, so it has references of its own.
    for module in (moe_utils, token_dispatcher):
        replace(module, "permute", read)
        replace(module, "unpermute", sum_up)


@patch(
    upstream=f"{_MOE}/moe_utils.py:sort_chunks_by_idxs (used in token_dispatcher.py)",
    checked=_CHECKED,
    until="upstream leaves chunks that are in order where they are",
    without_cuda=True,
)
def chunks_in_order_stay() -> None:
    """Where one rank has all experts, the chunks of tokens are in the order of the experts already.
    Upstream still cuts the tokens and joins them again, before the experts and after them, and
    the backward pass does the same. Chunks that are in order now stay where they are.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    original = require(
        moe_utils,
        "sort_chunks_by_idxs",
        parameters=("input", "split_sizes", "sorted_idxs", "probs"),
        source="output = torch.cat([input[i] for i in sorted_idxs.tolist()], dim=0)",
    )

    def sort(
        input: Tensor,
        split_sizes: Tensor,
        sorted_idxs: Tensor,
        probs: Tensor | None = None,
        fused: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        order = sorted_idxs.tolist()
        if not fused and order == list(range(len(order))):
            return input, probs
        found: tuple[Tensor, Tensor | None]
        found = original(input, split_sizes, sorted_idxs, probs=probs, fused=fused)
        return found

    for module in (moe_utils, token_dispatcher):
        replace(module, "sort_chunks_by_idxs", sort)
