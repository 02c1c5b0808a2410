"""RMSNorm for the local layer spec with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron-Core's signature, tagged for sequence parallelism.

    Why: upstream's WrappedTorchNorm (megatron/core/transformer/torch_norm.py) refuses sequence
    parallelism, which MoE with tensor parallelism demands. With sequence parallelism each tensor
    rank sees a part of the tokens, so a norm's gradient must be summed over the tensor ranks;
    megatron/core/distributed/finalize_model_grads.py does that for parameters that carry
    `sequence_parallel = True`. WITHOUT the tag training runs and is wrong. Checked with
    megatron-core 0.16.1 and 0.18.2. Can go when WrappedTorchNorm tags its weight; not used where
    Transformer Engine is installed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight.sequence_parallel = config.sequence_parallel
