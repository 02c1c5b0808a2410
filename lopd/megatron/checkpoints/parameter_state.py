"""What Megatron-Core's optimizers keep of one parameter: float32 weights and Adam's two moments.

Where they are depends on the optimizer that Megatron-Core was asked for:

    torch's AdamW, Transformer Engine's FusedAdam   Megatron keeps the float32 weights, the optimizer
                                                    the moments (MegatronState)
    use_precision_aware_optimizer                   FusedAdam keeps all of it, in the types that were
                                                    asked for (FusedState)
    optimizer_cpu_offload                           HybridDeviceOptimizer has an AdamW of its own on
                                                    the CPU, with copies of its own (HybridState)

Each class gives the same flat float32 tensors and takes them back, so that a checkpoint says
nothing
of the optimizer that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"  # the optimizer's float32 weights, where the model's are of another type
_MASTER = "master_param"  # FusedAdam's name for them


class ParameterState(Protocol):
    """The optimizer's state of one parameter, or of the part of it that this rank updates."""

    @property
    def device(self) -> torch.device:
        """Where the state is kept, and so where loaded tensors are wanted."""

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        """Flat float32 tensors by kind (of MOMENTS and MAIN). They may be the state itself."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over flat float32 tensors by kind. Without MAIN the model's weights are taken."""


def state_of(optimizer: Any, main: Tensor) -> ParameterState:
    """The state of ``main``, a parameter in one of optimizer's groups.

    Args:
        optimizer: The optimizer inside one of Megatron-Core's chained optimizers.
        main: The tensor that it updates.
    """
    if is_hybrid(optimizer):
        return HybridState(optimizer, main)
    if keeps_weights(optimizer):
        return FusedState(optimizer, main)
    return MegatronState(optimizer, main)


def is_hybrid(optimizer: Any) -> bool:
    """Whether this is Megatron-Core's HybridDeviceOptimizer."""
    return hasattr(optimizer, "sub_optimizers")


def keeps_weights(optimizer: Any) -> bool:
    """Whether this is a FusedAdam that keeps the float32 weights itself."""
    return bool(getattr(optimizer, "master_weights", False))


@dataclass(frozen=True, slots=True)
class MegatronState:
    """Of torch's AdamW, and of FusedAdam where Megatron-Core keeps the float32 weights."""

    optimizer: Any
    main: Tensor

    @property
    def device(self) -> torch.device:
        return self.main.device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        found = {MAIN: self.main, **self.optimizer.state[self.main]}
        return {kind: found[kind].detach().reshape(-1) for kind in kinds}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for kind, held in self.read(tuple(tensors)).items():
            held.copy_(tensors[kind])


@dataclass(frozen=True, slots=True)
class FusedState:
    """Of Transformer Engine's FusedAdam with use_precision_aware_optimizer.

    Moments of fewer bits are read as float32. bfloat16 comes back to the bit. float16 and float8
    have a scale that is chosen anew when they are written, so these come back to rounding.
    """

    optimizer: Any
    main: Tensor

    @property
    def device(self) -> torch.device:
        return self.main.device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        return {kind: self._read(kind).detach().reshape(-1) for kind in kinds}

    def _read(self, kind: str) -> Tensor:
        name = _MASTER if kind == MAIN else kind
        held: Tensor = self.optimizer.get_unscaled_state(self.main, name)
        if kind == MAIN and held.dtype == torch.int16:
            held = joined(self.main, held)
        if held.data_ptr() == self.optimizer.state[self.main][name].data_ptr():
            return held
        # A converted copy goes to the host: copies of all parameters at once would not fit beside
        # the state itself.
        return held.cpu()

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for kind, tensor in tensors.items():
            name = _MASTER if kind == MAIN else kind
            value = tensor.view_as(self.main)
            if kind == MAIN and self.optimizer.state[self.main][name].dtype == torch.int16:
                _, value = split(value)
            self.optimizer.set_scaled_state(self.main, name, value)
        if MAIN not in tensors and _MASTER in self.optimizer.state[self.main]:
            # float32 weights are not stored twice: its copy would be that of before the load
            self.optimizer.set_scaled_state(self.main, _MASTER, self.main.detach().clone())


@dataclass(frozen=True, slots=True)
class HybridState:
    """Of Megatron-Core's HybridDeviceOptimizer, which updates copies of the parameters on the CPU.

    Its own attribute ``state`` follows the optimizers inside it only at the end of a step, so what
    is read and written here is theirs.
    """

    optimizer: Any
    main: Tensor

    @property
    def device(self) -> torch.device:
        return self._inner().device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        inner = self._inner()
        found = {MAIN: inner, **self._owner(inner).state[inner]}
        return {kind: found[kind].detach().reshape(-1) for kind in kinds}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        inner = self._inner()
        for kind, held in self.read(tuple(tensors)).items():
            held.copy_(tensors[kind])
        if inner is self.main:
            return
        if MAIN in tensors:
            self.main.data.copy_(inner)  # as the optimizer does after a step
        else:
            inner.data.copy_(self.main)  # else the copy would go on from the former weights

    def _inner(self) -> Tensor:
        """The float32 tensor that an optimizer inside updates in place of the parameter."""
        inner: Tensor = self.optimizer.param_to_inner_param[self.main]
        return inner

    def _owner(self, inner: Tensor) -> Any:
        return next(each for each in self.optimizer.sub_optimizers if inner in each.state)


def joined(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights of which FusedAdam keeps bfloat16 and the lower 16 bits.

    Args:
        rounded: bfloat16, the weights rounded to the nearest (halves away from zero).
        remainder: int16 of the same shape, the lower bits of the float32 weights.

    Returns:
        float32 of the same shape. Where the remainder is negative, its highest bit is set: the
        rounding added one to the upper half, which is taken back.
    """
    upper = rounded.contiguous().view(torch.int16).to(torch.int32) - (remainder < 0).to(torch.int32)
    lower = remainder.to(torch.int32) & 0xFFFF
    return ((upper << 16) | lower).view(torch.float32)


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 weights and int16 remainders of float32 weights. The inverse of joined."""
    bits = weights.contiguous().view(torch.int32)
    remainder = (bits & 0xFFFF).to(torch.int16)
    upper = (bits >> 16) + (remainder < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def adamw_parameters(optimizer: Any) -> Iterator[tuple[torch.optim.AdamW, Tensor]]:
    """Every torch AdamW in an optimizer of Megatron-Core's, with each parameter it updates."""
    for inner in optimizer.sub_optimizers if is_hybrid(optimizer) else [optimizer]:
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                yield from ((inner, parameter) for parameter in group["params"])


def fused_optimizers(optimizer: Any) -> Iterator[Any]:
    """Every optimizer in one of Megatron-Core's that counts its updates in its groups."""
    for inner in optimizer.sub_optimizers if is_hybrid(optimizer) else [optimizer]:
        if not isinstance(inner, torch.optim.AdamW):
            yield inner
