"""Matrix products on a CPU, and linear layers that use them.

torch's matrix products in float32 are MKL's. On a processor that is not Intel's, MKL leaves half
of AVX-512 unused: on an AMD EPYC it reaches 100 GFLOP/s on a core where oneDNN, which is in torch
too, reaches 230 (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_patches.registry import patch, replace, require

# The rows of a block. oneDNN generates code for each new shape, and the number of rows is new in
# nearly every step. Whole products of all rows were slower than MKL's for that reason.
_BLOCKS = (128, 256, 512, 1024)


@functools.cache
def uses_onednn() -> bool:
    """Return whether this processor multiplies faster with oneDNN.

    It does not depend on a measurement, because a run must resume bit for bit.
    """
    has_operation = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_operation and is_wide and torch.backends.mkldnn.is_available()


def product(rows: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Return rows [M, K] @ matrix [K, N], float32.

    Args:
        rows: The rows, one after the other in memory.
        matrix: The matrix. It may be a transposed view.
        out: Where the result is written, [M, N]. None makes a tensor.
    """
    num_rows = len(rows)
    if out is None:
        out = rows.new_empty(num_rows, matrix.shape[1])
    if num_rows < _BLOCKS[0] or not uses_onednn():
        return torch.mm(rows, matrix, out=out)
    # The operation multiplies by the transpose of its second argument.
    transposed = matrix.t()
    start = 0
    while start < num_rows:
        size = _block_size(num_rows - start, num_rows)
        # The last block begins earlier if it is longer than what is left. The rows that it shares
        # with the one before are computed again.
        first = min(start, num_rows - size)
        part = rows.narrow(0, first, size)
        found = torch.ops.mkldnn._linear_pointwise(part, transposed, None, "none", [], "")
        out.narrow(0, first, size).copy_(found)
        start = first + size
    return out


def _block_size(num_left: int, num_rows: int) -> int:
    """Return the smallest block that covers what is left, or else the largest that fits."""
    fitting = [size for size in _BLOCKS if size <= num_rows]
    return next((size for size in fitting if size >= num_left), fitting[-1])


class _Linear(torch.autograd.Function):
    """inputs [..., K] times the transpose of a weight [N, K]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        rows = inputs.reshape(-1, inputs.shape[-1])
        return product(rows, weight.t()).view(*inputs.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        rows = inputs.reshape(-1, inputs.shape[-1])
        gradient = gradients[0].reshape(-1, len(weight))
        # oneDNN gains nothing in the sum over rows, for which it would have to turn both.
        return product(gradient, weight).view(inputs.shape), gradient.t() @ rows


@patch(
    upstream="megatron/core/tensor_parallel/layers.py:"
    "linear_with_grad_accumulation_and_async_allreduce",
    checked="megatron-core 0.16.1 and 0.18.2",
    until="torch multiplies by oneDNN in float32, or MKL uses all of AVX-512",
    without_cuda=True,
)
def linear_layers_by_onednn() -> None:
    """The linear layers multiply by torch.matmul. They now multiply by the faster of two libraries
    that torch has. With sequence parallelism they keep the tokens of all tensor ranks for the
    backward pass, where upstream gathers them a second time: over gloo an exchange costs more than
    the product. Layers with a fused or deferred gradient still take upstream's way.
    """
    import megatron.core.tensor_parallel.layers as layers
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    original = require(
        layers,
        "linear_with_grad_accumulation_and_async_allreduce",
        parameters=(
            "input",
            "weight",
            "bias",
            "gradient_accumulation_fusion",
            "allreduce_dgrad",
            "sequence_parallel",
            "grad_output_buffer",
        ),
    )

    def linear(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: Any = None,
        tp_group: Any = None,
        **rest: Any,
    ) -> Any:
        is_special = gradient_accumulation_fusion or allreduce_dgrad or grad_output_buffer
        if is_special or not input.dtype == weight.dtype == torch.float32:
            return original(
                input,
                weight,
                bias,
                gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                grad_output_buffer=grad_output_buffer,
                tp_group=tp_group,
                **rest,
            )
        if sequence_parallel:
            # Its backward pass sums the gradient over the ranks and gives each its tokens.
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        found = _Linear.apply(input, weight)
        return found if bias is None else found + bias

    # Upstream's function looks at this mark under its own name. Its warning is about CUDA.
    linear.warned = True  # type: ignore[attr-defined]
    replace(layers, "linear_with_grad_accumulation_and_async_allreduce", linear)
