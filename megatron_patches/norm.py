"""RMSNorm for the local layer spec with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension, in float32.

    torch has one kernel for this on a GPU. On a CPU it is made of eight operations, and its
    backward pass of twice as many. Here it is three and six passes over memory, and what is kept
    for the backward pass is the normalised input alone.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = rows.shape[-1]
        # 1 / rms, [..., 1].
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale.square_().div_(size).add_(eps).rsqrt_()
        normed = rows * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        size = normed.shape[-1]
        product = gradients[0] * normed
        flat = product.reshape(-1, size)
        # With g = gradient * weight: (g - normed * mean(g * normed)) / rms.
        mean = flat.mv(weight).div_(-size).view_as(scale)
        grad = (gradients[0] * weight).addcmul_(normed, mean).mul_(scale)
        return grad, flat.sum(0), None


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron-Core's signature, tagged for sequence parallelism.

    What upstream does: WrappedTorchNorm (megatron/core/transformer/torch_norm.py) refuses sequence
    parallelism, which MoE with tensor parallelism demands.

    This class was checked with megatron-core 0.16.1 and 0.18.2. Remove it when WrappedTorchNorm
    tags its weight. It is not used where Transformer Engine is installed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Megatron-Core calls this with more arguments, which a RMSNorm does not need."""
        device = torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        # With sequence parallelism each tensor rank sees a part of the tokens. So the gradient of a
        # norm must be summed over the tensor ranks. finalize_model_grads of Megatron-Core
        # (megatron/core/distributed/finalize_model_grads.py) does that for parameters with this
        # tag. WITHOUT the tag the training runs and is wrong.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, rows: Tensor) -> Tensor:
        """Return the normalised rows, in the shape of the rows."""
        # In 16 bits torch computes in float32 and rounds at the end.
        if rows.is_cuda or not rows.dtype == self.weight.dtype == torch.float32:
            return super().forward(rows)
        normed: Tensor = _Norm.apply(rows, self.weight, self.eps)
        return normed
