"""AdamW as Megatron-Core runs it, distributed or not.

The learning rate of a step is a function of the step's number alone.
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
    """Return the learning rate of an update.

    The warm-up takes the first round(warmup * num_steps) steps and rises to lr by equal amounts. A
    decay falls from lr, at the first step after the warm-up, towards min_lr, which step num_steps
    would have.

    Args:
        section: The [*.optimizer] section.
        step: The number of updates made before.
        num_steps: The length of the training.
    """
    warmup_steps = round(section.warmup * num_steps)
    if step < warmup_steps:
        # step + 1: with a rate of 0 the first batch would be wasted.
        return section.lr * (step + 1) / warmup_steps
    if section.schedule == "constant":
        return section.lr
    # The bound acts where a training is longer than num_steps: the rate then stays at min_lr.
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if section.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_lr + (section.lr - section.min_lr) * share


def optimizer_config(
    section: OptimizerSection,
    *,
    dtype: torch.dtype,
    distributed: bool,
    overrides: Mapping[str, Any] | None = None,
) -> OptimizerConfig:
    """Return Megatron-Core's configuration of AdamW.

    Args:
        section: The [*.optimizer] section.
        dtype: The dtype of the weights.
        distributed: Whether the state is sharded over the data-parallel ranks.
        overrides: Fields of OptimizerConfig that win over ours.

    Raises:
        ConfigError: Megatron-Core refuses the fields, or they would fail later.
    """
    if dtype == torch.float32 and (overrides or {}).get("optimizer_cpu_offload"):
        raise ConfigError(
            "optimizer_cpu_offload cannot be used with dtype = float32: Megatron-Core's "
            "HybridDeviceOptimizer does not support a part of a float32 weight",
            where="megatron",
            limit="exactly bfloat16",
            remedy='set dtype = "bfloat16", or remove optimizer_cpu_offload',
        )
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
        # Gradients go to the host while the CPU updates the weights that came before them. The
        # field is read only where the optimizer is offloaded.
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
        """Build the optimizer. Collective.

        A weight that takes no gradient is left out, and keeps its bits.

        Args:
            section: The [*.optimizer] section.
            model: The wrapped model.
            num_steps: The length of the training, for the learning rate.
            dtype: The dtype of the weights. With bfloat16 the optimizer keeps float32 copies.
            distributed: Whether the state is sharded over the data-parallel ranks.
            overrides: Fields of OptimizerConfig (lopd.megatron.model.overrides).
        """
        self._section = section
        self._num_steps = num_steps
        config = optimizer_config(
            section, dtype=dtype, distributed=distributed, overrides=overrides
        )
        groups = get_standard_config_overrides(config)
        # Routers get a group of their own only where their rate differs.
        if section.router_lr_scale != 1.0:
            groups[ParamKey(name="*.router.weight")] = {"lr_mult": section.router_lr_scale}
        self.megatron: Any = get_megatron_optimizer(config, [model], config_overrides=groups)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` earlier ones."""
        return learning_rate(self._section, step, self._num_steps)

    def zero_grad(self) -> None:
        """Forget the gradients that the optimizer holds."""
        self.megatron.zero_grad()

    def grad_norm(self) -> float:
        """Return the global L2 norm of the reduced gradients before clipping. Collective.

        It is the same on every rank, and may be inf or nan.
        """
        # The norm is of the optimizer's float32 gradients, which prepare_grads copies from the
        # buffers. update() calls it once more, which gives the same gradients.
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def update(self, step: int) -> None:
        """Clip the gradients to clip_grad and make one AdamW update. Collective.

        Args:
            step: The number of updates made before. It decides the learning rate.
        """
        for group in self.megatron.param_groups:
            group["lr"] = self.learning_rate(step) * group["lr_mult"]
            # Norms and biases must not decay. Megatron-Core puts parameters of one dimension and
            # those named *.bias into groups with wd_mult 0. But only its own scheduler applies
            # wd_mult. Without this line AdamW would decay every group alike.
            group["weight_decay"] = self._section.weight_decay * group["wd_mult"]
        updated, _, _ = self.megatron.step()
        assert updated, "only a loss scaler skips an update, and there is none"

    def create_state(self) -> None:
        """Create the state that the optimizer otherwise creates at its first update.

        State that exists stays. Megatron-Core can neither save nor load state that is not there.
        """
        for optimizer in self._optimizers():
            for inner, parameter in adamw_parameters(optimizer):
                # Reading a missing key of a defaultdict adds an empty entry, which counts as none.
                if not inner.state[parameter]:
                    # Zeros are what the first step would begin with. Loading needs tensors to write
                    # into.
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
        """Set how many updates were made, after a load. Adam's bias correction depends on it.

        A checkpoint keeps the number once, as the step of the training.
        """
        # torch's AdamW counts in the state of every parameter, Transformer Engine's FusedAdam in
        # its groups. The groups of a HybridDeviceOptimizer itself must not hold the count: it
        # copies them onto the optimizers inside before every step, so the count would stand still.
        # fused_optimizers yields the optimizers inside, and not the hybrid one.
        for optimizer in self._optimizers():
            for inner, parameter in adamw_parameters(optimizer):
                inner.state[parameter]["step"] = torch.tensor(float(num_updates))
            for fused in fused_optimizers(optimizer):
                for group in fused.param_groups:
                    group["step"] = num_updates

    def _optimizers(self) -> Iterator[Any]:
        """Yield the optimizers inside Megatron-Core's."""
        for chained in self.megatron.chained_optimizers:
            # A rank may have nothing to update, for example no expert.
            if not getattr(chained, "is_stub_optimizer", False) and chained.optimizer is not None:
                yield chained.optimizer


def _create_fused_state(fused: Any, parameter: torch.Tensor) -> None:
    """Give Transformer Engine's FusedAdam zero moments, in the types that were configured."""
    if hasattr(fused, "initialize_state"):
        # Megatron-Core's own function for this does not pass the second argument, which has no
        # default in Transformer Engine 2.16.1. With it a precision-aware training could not write
        # its first checkpoint.
        remainders = bool(fused.store_param_remainders) and parameter.dtype == torch.bfloat16
        fused.initialize_state(parameter, remainders)
    else:
        fused.state[parameter].update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
