"""AdamW as Megatron-Core runs it (distributed or not), with the learning rate of a step as a pure
function of its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from lopd.config import OptimizerSection
from lopd.errors import ConfigError
from lopd.megatron.checkpoints.parameter_state import MOMENTS, adamw_parameters, fused_optimizers
from lopd.megatron.model.overrides import build


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Learning rate of the update that follows ``step`` earlier ones, in a training of num_steps.

    The warm-up takes the first round(warmup * num_steps) steps and rises by equal amounts to lr,
    from lr / warm-up steps: a rate of 0 would waste the first batch. A decay falls from lr, at the
    first step after the warm-up, towards min_lr, which step num_steps would have.
    """
    warmup_steps = round(section.warmup * num_steps)
    if step < warmup_steps:
        return section.lr * (step + 1) / warmup_steps
    if section.schedule == "constant":
        return section.lr
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    share = (
        1.0 - progress
        if section.schedule == "linear"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return section.min_lr + (section.lr - section.min_lr) * share


def optimizer_config(
    section: OptimizerSection,
    *,
    dtype: torch.dtype,
    distributed: bool,
    overrides: Mapping[str, Any] | None = None,
) -> OptimizerConfig:
    """Megatron-Core's configuration of AdamW.

    Raises:
        ConfigError: Megatron-Core refuses it, or it would fail on it later.
    """
    if dtype == torch.float32 and (overrides or {}).get("optimizer_cpu_offload"):
        what = "optimizer_cpu_offload with dtype = float32"
        limit = "bfloat16: Megatron-Core's HybridDeviceOptimizer takes no part of a float32 weight"
        remedy = 'set dtype = "bfloat16", or leave optimizer_cpu_offload out'
        raise ConfigError(what, where="megatron", limit=limit, remedy=remedy)
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "lr": section.lr,
        "min_lr": section.min_lr,
        "weight_decay": section.weight_decay,
        "adam_beta1": section.beta1,
        "adam_beta2": section.beta2,
        "adam_eps": section.eps,
        "clip_grad": section.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": distributed,
        # gradients go to the host while the CPU updates the weights that came before them; read
        # only where the optimizer is offloaded
        "overlap_cpu_optimizer_d2h_h2d": True,
    }
    return build(OptimizerConfig, {**settings, **(overrides or {})})


class Optimizer:
    """Megatron-Core's optimizer of a model wrapped in its DistributedDataParallel."""

    def __init__(
        self,
        section: OptimizerSection,
        model: DistributedDataParallel,
        *,
        num_steps: int,
        dtype: torch.dtype,
        distributed: bool,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Collective. dtype: of the weights; with bfloat16 the optimizer keeps float32 copies.
        distributed: state sharded over data-parallel ranks.

        overrides: fields of OptimizerConfig (lopd.megatron.model.overrides). A weight that takes no
        gradient is left out, and keeps its bits.
        """
        self._section, self._num_steps = section, num_steps
        config = optimizer_config(
            section, dtype=dtype, distributed=distributed, overrides=overrides
        )
        groups = get_standard_config_overrides(config)
        if section.router_lr_scale != 1.0:
            groups[ParamKey(name="*.router.weight")] = {"lr_mult": section.router_lr_scale}
        self.megatron: Any = get_megatron_optimizer(config, [model], config_overrides=groups)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self._section, step, self._num_steps)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def grad_norm(self) -> float:
        """Global L2 norm of the reduced gradients, before clipping, the same on every rank; may be
        inf or nan. Collective.
        """
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def update(self, step: int) -> None:
        """Clips the gradients to ``clip_grad`` and makes one AdamW update with the learning rate of
        this step. Collective.

        Weight decay spares norms and biases: Megatron-Core puts parameters of one dimension and
        those named ``*.bias`` into groups with ``wd_mult`` 0. It leaves applying ``wd_mult`` to its
        own scheduler, though, so without the line below AdamW would decay every group alike.
        """
        for group in self.megatron.param_groups:
            group["lr"] = self.learning_rate(step) * group["lr_mult"]
            group["weight_decay"] = self._section.weight_decay * group["wd_mult"]
        updated, _, _ = self.megatron.step()
        assert updated, "only a loss scaler skips an update, and there is none"

    def create_state(self) -> None:
        """Gives the optimizer the state that it otherwise makes at its first update.

        Megatron-Core can neither save nor load state that is not there. State that exists stays.
        """
        for optimizer in self._optimizers():
            for inner, parameter in adamw_parameters(optimizer):
                if not inner.state[parameter]:
                    zeros = {
                        kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS
                    }
                    inner.state[parameter] = {"step": torch.tensor(0.0), **zeros}
            for fused in fused_optimizers(optimizer):
                for group in fused.param_groups:
                    for parameter in group["params"]:
                        if not fused.state[parameter]:
                            _create_fused_state(fused, parameter)

    def set_num_updates(self, num_updates: int) -> None:
        """After a load: how many updates were made, on which Adam's bias correction depends.

        Checkpoints keep it once, as the training's step. torch's AdamW counts in every parameter's
        state, Transformer Engine's FusedAdam in its groups. The groups of a HybridDeviceOptimizer
        itself must not hold it: it copies them onto the optimizers inside before every step, so
        the count would stand still.
        """
        for optimizer in self._optimizers():
            for inner, parameter in adamw_parameters(optimizer):
                inner.state[parameter]["step"] = torch.tensor(float(num_updates))
            for fused in fused_optimizers(optimizer):
                for group in fused.param_groups:
                    group["step"] = num_updates

    def _optimizers(self) -> Iterator[Any]:
        """The optimizers inside Megatron's; none where this rank updates nothing."""
        for chained in self.megatron.chained_optimizers:
            if not getattr(chained, "is_stub_optimizer", False) and chained.optimizer is not None:
                yield chained.optimizer


def _create_fused_state(fused: Any, parameter: torch.Tensor) -> None:
    """Zero moments for Transformer Engine's FusedAdam, in the types that it was asked for.

    Megatron-Core's own function for this leaves out the second argument, which has no default in
    Transformer Engine 2.16.1, so a precision-aware training could not write its first checkpoint.
    """
    if hasattr(fused, "initialize_state"):
        remainders = bool(fused.store_param_remainders) and parameter.dtype == torch.bfloat16
        fused.initialize_state(parameter, remainders)
    else:
        fused.state[parameter].update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
