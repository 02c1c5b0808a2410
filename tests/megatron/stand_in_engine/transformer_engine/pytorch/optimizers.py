"""FusedAdam in plain torch, with the arguments and the bookkeeping of Transformer Engine 2.16.1's.

It counts steps in its groups, not in every parameter's state as torch's AdamW does. It can keep the
float32 weights itself (master_weights), whole or as the 16 bits that bfloat16 weights lack
(store_param_remainders), and moments in bfloat16. tests/image compares it with the real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        assert adam_w_mode
        assert bias_correction
        assert not capturable
        assert master_weight_dtype == torch.float32
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.master_weights = master_weights
        self.store_param_remainders = store_param_remainders and master_weights
        self._decoupled = use_decoupled_grad
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        state = self.state[param]
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(param, dtype=self.name_to_dtype_map[kind])
        if self.master_weights:
            state["master_param"] = (
                torch.zeros_like(param, dtype=torch.int16)
                if store_param_remainders
                else param.detach().clone().float()
            )

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        held = self.state[param][state_name]
        return held.float() if held.dtype == torch.bfloat16 else held

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        held = self.state[param][state_name]
        assert unscaled_state.dtype == (torch.int16 if held.dtype == torch.int16 else torch.float32)
        held.copy_(unscaled_state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                gradient = getattr(param, "decoupled_grad", None) if self._decoupled else param.grad
                if gradient is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(
                        param, self.store_param_remainders and param.dtype == torch.bfloat16
                    )
                self._update(param, gradient.float(), group)

    def _update(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        beta1, beta2 = group["betas"]
        mean, spread = (self.get_unscaled_state(param, kind).clone() for kind in MOMENTS)
        mean.lerp_(gradient, 1 - beta1)
        spread.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weights = self._weights(param)
        direction = (mean / (1 - beta1 ** group["step"])) / (
            spread / (1 - beta2 ** group["step"])
        ).sqrt_().add_(group["eps"])
        weights = weights - group["lr"] * (direction + group["weight_decay"] * weights)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(spread)
        if "master_param" not in state:
            param.copy_(weights)
        elif state["master_param"].dtype == torch.int16:
            bits = weights.view(torch.int32)
            lower = (bits & 0xFFFF).to(torch.int16)
            param.copy_(((bits >> 16) + (lower < 0).int()).to(torch.int16).view(torch.bfloat16))
            state["master_param"].copy_(lower)
        else:
            state["master_param"].copy_(weights)
            param.copy_(weights)

    def _weights(self, param: Tensor) -> Tensor:
        held = self.state[param].get("master_param")
        if held is None:
            return param.float()
        if held.dtype != torch.int16:
            return held.clone()
        upper = param.contiguous().view(torch.int16).int() - (held < 0).int()
        return ((upper << 16) | (held.int() & 0xFFFF)).view(torch.float32)


class FusedSGD:
    """Megatron-Core imports the name."""
