"""What is computed with fewer passes over memory on a CPU, beside upstream's own functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COUNTS = [7, 0, 12, 5]  # of 4 experts; one has no token


def largest(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor."""
    pairs = zip(left, right, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in pairs)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result of the function and the gradients of its inputs, all weighted unevenly."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    weight = torch.linspace(-1, 1, result.numel()).view_as(result)
    gradients = torch.autograd.grad((result * weight).sum(), leaves)
    return [result.detach(), *gradients]


def one_rank(model: str) -> dict[str, float]:
    """Differences between ours and upstream's, and of controls."""
    from tests.megatron.parity_cases import Case, load_model

    case = Case(Path(model))
    experts = load_model(case, {}).decoder.layers[0].mlp.experts
    parts = (_experts(experts), _permutations(), _rotations(), _norms(), _products())
    return {name: figure for part in parts for name, figure in part.items()}


def two_ranks() -> float:
    """The difference of our reduce-scatter from the sum over both ranks."""
    from megatron.core.tensor_parallel import mappings

    from lopd.config import ParallelSection
    from lopd.megatron.ranks import parallel

    parallel.initialize(ParallelSection(ranks=2, tensor=2), seed=1, timeout_s=500)
    # Each rank makes the tensors of both.
    tensors = [
        torch.randn(6, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(2)
    ]
    rank = parallel.rank()
    own = mappings._reduce_scatter_along_first_dim(tensors[rank], parallel.tensor_group())
    expected = (tensors[0] + tensors[1]).chunk(2)[rank]
    parallel.shutdown()
    return (own - expected).abs().max().item()


def _experts(experts: Any) -> dict[str, float]:
    torch.manual_seed(5)
    ours = type(experts).forward
    upstream = ours.__wrapped__
    inputs = [torch.randn(sum(COUNTS), experts.config.hidden_size), torch.rand(sum(COUNTS))]
    weights = list(experts.parameters())

    def of(forward: Any, counts: list[int]) -> list[Tensor]:
        """The outputs, and the gradients of inputs and weights."""
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = forward(experts, leaves[0], torch.tensor(counts), leaves[1])[0]
        uneven = torch.linspace(-1, 1, result.numel()).view_as(result)
        gradients = torch.autograd.grad((result * uneven).sum(), [*leaves, *weights])
        return [result.detach(), *gradients]

    theirs = of(upstream, COUNTS)
    found = {
        "experts": largest(of(ours, COUNTS), theirs),
        "experts, control": largest(of(ours, COUNTS[::-1]), theirs),
    }
    # Who watches a layer sees it called, and the values are the same.
    seen: list[int] = []
    layer = experts.local_experts[2].linear_fc2
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found["experts, watched"] = largest(of(ours, COUNTS), theirs)
    handle.remove()
    found["calls seen"] = float(seen == [COUNTS[2]])
    # In 16 bits upstream's rounding stays.
    experts.to(torch.bfloat16)
    halves = (inputs[0].bfloat16(), torch.tensor(COUNTS), inputs[1])
    found["experts, 16 bits"] = largest(
        [ours(experts, *halves)[0]], [upstream(experts, *halves)[0]]
    )
    return found


def _permutations() -> dict[str, float]:
    from megatron.core.transformer.moe import token_dispatcher

    torch.manual_seed(6)
    tokens = torch.randn(11, 6)
    probs = torch.rand(11, 5)
    routing = torch.zeros(11, 5, dtype=torch.bool)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(11)])
    routing.scatter_(1, chosen, True)
    dropped = routing.clone()
    dropped[3, chosen[3, 0]] = False

    def there_and_back(permute: Any, unpermute: Any, routing: Tensor) -> Any:
        def function(tokens: Tensor, probs: Tensor) -> Tensor:
            count = routing.sum()
            rows, weights, index, *_ = permute(tokens, routing, probs=probs, num_out_tokens=count)
            summed: Tensor = unpermute(
                rows * weights[:, None], index, tokens.shape, routing_map=routing
            )
            return summed

        return function

    ours = (token_dispatcher.permute, token_dispatcher.unpermute)
    theirs = tuple(function.__wrapped__ for function in ours)
    found = {}
    for name, routes in (("permutation", routing), ("permutation, dropped", dropped)):
        inputs = [tokens, probs]
        found[name] = largest(
            with_gradients(there_and_back(*ours, routes), inputs),
            with_gradients(there_and_back(*theirs, routes), inputs),
        )
    found["permutation, control"] = largest(
        with_gradients(there_and_back(*ours, routing), [tokens, probs]),
        with_gradients(there_and_back(*theirs, routing.roll(1, 0)), [tokens, probs]),
    )
    sizes = torch.tensor([3, 0, 4, 4])
    sort = token_dispatcher.sort_chunks_by_idxs
    for name, order in (("chunks", [0, 1, 2, 3]), ("chunks, turned", [2, 0, 3, 1])):
        both = [
            way(tokens, sizes, torch.tensor(order), probs=probs[:, 0])
            for way in (sort, sort.__wrapped__)
        ]
        found[name] = largest(*(list(pair) for pair in both))
    found["chunks stay"] = float(sort(tokens, sizes, torch.arange(4))[0] is tokens)
    return found


def _rotations() -> dict[str, float]:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.parallel_state import get_context_parallel_group

    torch.manual_seed(7)
    group = get_context_parallel_group()
    angles = torch.rand(9, 1, 1, 4) * torch.arange(9).view(-1, 1, 1, 1)
    freqs = torch.cat([angles, angles], dim=-1)
    heads = torch.randn(14, 3, 8)
    apply = rope_utils._apply_rotary_pos_emb_thd
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)

    def turned(way: Any, bounds: Tensor, freqs: Tensor = freqs, mscale: float = 1.3) -> Any:
        return with_gradients(
            lambda rows: way(rows, bounds, freqs, mscale=mscale, cp_group=group), [heads]
        )

    theirs = turned(apply.__wrapped__, bounds)
    found = {
        "rotation": largest(turned(apply, bounds), theirs),
        # The second call finds what the first has kept with the bounds.
        "rotation, again": largest(turned(apply, bounds), theirs),
    }
    other = torch.tensor([0, 4, 6, 14], dtype=torch.int32)
    found["rotation, control"] = largest(turned(apply, other), theirs)
    # A table of another model, and another factor, with the same bounds.
    for name, table, factor in (("table", freqs * 2, 1.3), ("factor", freqs, 1.0)):
        found[f"rotation, other {name}"] = largest(
            turned(apply, bounds, table, factor), turned(apply.__wrapped__, bounds, table, factor)
        )
    # Angles of the packed tokens, and heads of which only a part is turned.
    packed = torch.rand(14, 1, 1, 8)
    part = freqs[..., :6]
    for name, table in (("packed", packed), ("part", part)):
        found[f"rotation, {name}"] = largest(
            turned(apply, bounds, table), turned(apply.__wrapped__, bounds, table)
        )
    return found


def _norms() -> dict[str, float]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_patches.norm import SequenceParallelRMSNorm, _Norm

    torch.manual_seed(8)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    norm = SequenceParallelRMSNorm(config, 8, eps=1e-3)
    # A slice of a larger tensor, as heads are.
    rows = torch.randn(5, 3, 16)

    def of(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return with_gradients(
            lambda rows, weight: function(rows[..., 4:12], weight), [rows, torch.rand(8) + 0.5]
        )

    def ours(rows: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = _Norm.apply(rows, weight, norm.eps)
        return normed

    def theirs(rows: Tensor, weight: Tensor, eps: float = 1e-3) -> Tensor:
        return torch.nn.functional.rms_norm(rows, (8,), weight, eps)

    torch.manual_seed(9)
    first = of(ours)
    torch.manual_seed(9)
    second = of(theirs)
    torch.manual_seed(9)
    control = of(lambda rows, weight: theirs(rows, weight, 0.1))
    is_used = type(norm(rows[..., :8]).grad_fn).__name__ == "_NormBackward"
    return {
        "norm": largest(first, second),
        "norm, control": largest(first, control),
        "norm is used": float(is_used),
    }


def _products() -> dict[str, float]:
    from megatron.core.tensor_parallel import layers

    from megatron_patches.products import product

    torch.manual_seed(10)
    linear = layers.linear_with_grad_accumulation_and_async_allreduce
    found = {"product": 0.0}
    # Shorter than a block, as long, and with a last block that overlaps the one before.
    for num_rows in (0, 1, 127, 128, 300, 2500):
        rows = torch.randn(num_rows, 24)
        matrix = torch.randn(16, 24).t()
        exact = (rows.double() @ matrix.double()).float()
        if num_rows:
            found["product"] = max(found["product"], largest([product(rows, matrix)], [exact]))
        assert product(rows, matrix).shape == exact.shape
    inputs = [torch.randn(300, 1, 24), torch.randn(16, 24), torch.randn(16)]

    def of(way: Any) -> list[Tensor]:
        return with_gradients(lambda *given: way(*given, False, False, False), inputs)

    theirs = of(linear.__wrapped__)
    found["linear"] = largest(of(linear), theirs)
    inputs[2] = inputs[2].roll(1)
    found["linear, control"] = largest(of(linear), theirs)
    return found
