"""RMSNorm for the local layer spec with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch


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
