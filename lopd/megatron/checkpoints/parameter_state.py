"""What the optimizers of Megatron-Core keep of one parameter: float32 weights and Adam's moments.

Where they are depends on the optimizer that Megatron-Core was configured with:

    torch's AdamW, Transformer Engine's FusedAdam   Megatron-Core keeps the float32 weights, the
                                                    optimizer the moments (MegatronState)
    use_precision_aware_optimizer                   FusedAdam keeps all of it, in the configured
                                                    types (FusedState)
    optimizer_cpu_offload                           HybridDeviceOptimizer has an AdamW of its own on
                                                    the CPU, with copies of its own (HybridState)

Each class gives the same flat float32 tensors and takes them back. So a checkpoint says nothing
about the optimizer that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
# The optimizer's float32 weights, where the model's are of another type.
MAIN = "param"
# FusedAdam's name for them.
_MASTER = "master_param"


class ParameterState(Protocol):
    """The optimizer's state of one parameter, or of the part of it that this rank updates."""

    @property
    def device(self) -> torch.device:
        """Return the device that holds the state. Loaded tensors must be on this device."""

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        """Return flat float32 tensors by kind. They may be the state itself.

        Args:
            kinds: Some of MOMENTS and MAIN.
        """

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over flat float32 tensors by kind. Without MAIN the model's weights are taken."""


def state_of(optimizer: Any, main: Tensor) -> ParameterState:
    """Return the state of a parameter.

    Args:
        optimizer: The optimizer inside one of Megatron-Core's chained optimizers.
        main: The tensor in one of its groups that it updates.
    """
    # The hybrid first: its state lies in the optimizers inside of it, and not in itself.
    if is_hybrid(optimizer):
        return HybridState(optimizer, main)
    if keeps_weights(optimizer):
        return FusedState(optimizer, main)
    return MegatronState(optimizer, main)


def is_hybrid(optimizer: Any) -> bool:
    """Return whether this is Megatron-Core's HybridDeviceOptimizer."""
    return hasattr(optimizer, "sub_optimizers")


def keeps_weights(optimizer: Any) -> bool:
    """Return whether this is a FusedAdam that keeps the float32 weights itself."""
    return bool(getattr(optimizer, "master_weights", False))


@dataclass(frozen=True, slots=True)
class MegatronState:
    """The state of torch's AdamW, or of a FusedAdam without float32 weights of its own."""

    optimizer: Any
    main: Tensor

    @property
    def device(self) -> torch.device:
        return self.main.device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        state = {MAIN: self.main, **self.optimizer.state[self.main]}
        return {kind: state[kind].detach().reshape(-1) for kind in kinds}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        # In place: what read returns are views of the state.
        for kind, held in self.read(tuple(tensors)).items():
            held.copy_(tensors[kind])


@dataclass(frozen=True, slots=True)
class FusedState:
    """The state of Transformer Engine's FusedAdam with use_precision_aware_optimizer.

    Moments of fewer bits are read as float32. bfloat16 comes back to the bit. float16 and float8
    have a scale that is chosen anew when they are written, so they come back up to rounding.
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
        # With store_param_remainders FusedAdam keeps only the lower halves of the float32 weights.
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
                # The upper half is the model's weight, which is loaded already.
                _, value = split(value)
            self.optimizer.set_scaled_state(self.main, name, value)
        if MAIN not in tensors and _MASTER in self.optimizer.state[self.main]:
            # In float32 the file has no MAIN, but FusedAdam has a copy of the weights. It is the
            # copy from before the load, and the next step would write it over the loaded weights.
            self.optimizer.set_scaled_state(self.main, _MASTER, self.main.detach().clone())


@dataclass(frozen=True, slots=True)
class HybridState:
    """The state of Megatron-Core's HybridDeviceOptimizer, which updates copies on the CPU."""

    optimizer: Any
    main: Tensor

    @property
    def device(self) -> torch.device:
        return self._inner().device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        # The hybrid optimizer's own attribute `state` follows the optimizers inside it only at the
        # end of a step. So their state is read and written here, and not its own.
        inner = self._inner()
        state = {MAIN: inner, **self._owner(inner).state[inner]}
        return {kind: state[kind].detach().reshape(-1) for kind in kinds}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        inner = self._inner()
        for kind, held in self.read(tuple(tensors)).items():
            held.copy_(tensors[kind])
        if inner is self.main:
            return
        # Two copies of the weights must agree: the one on the CPU, and the one on the device.
        if MAIN in tensors:
            # The optimizer does the same after a step.
            self.main.data.copy_(inner)
        else:
            # Otherwise the copy on the CPU would continue from the previous weights.
            inner.data.copy_(self.main)

    def _inner(self) -> Tensor:
        """Return the float32 tensor that an optimizer inside updates instead of the parameter."""
        inner: Tensor = self.optimizer.param_to_inner_param[self.main]
        return inner

    def _owner(self, inner: Tensor) -> Any:
        # One optimizer inside has the parameters on the CPU, another those on the device.
        return next(each for each in self.optimizer.sub_optimizers if inner in each.state)


@dataclass(frozen=True, slots=True)
class WeightState:
    """A weight of the model itself, in the form of the optimizer's state of it."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def read(self, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        # float32 holds every bfloat16 number, so the way there and back changes no bit.
        return {kind: self.weight.detach().float().reshape(-1) for kind in kinds}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            self.weight.copy_(tensor.view_as(self.weight))


def joined(rounded: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 weights of which FusedAdam keeps bfloat16 and the lower 16 bits.

    Args:
        rounded: bfloat16, the weights rounded to the nearest (halves away from zero).
        remainder: int16 of the same shape, the lower bits of the float32 weights.

    Returns:
        float32 of the same shape.
    """
    # A remainder with its highest bit set is a negative int16. There the rounding has added one to
    # the upper half, which is taken back.
    upper = rounded.contiguous().view(torch.int16).to(torch.int32) - (remainder < 0).to(torch.int32)
    # The conversion to int32 extends the sign. The mask keeps the 16 bits alone.
    lower = remainder.to(torch.int32) & 0xFFFF
    return ((upper << 16) | lower).view(torch.float32)


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return bfloat16 weights and int16 remainders of float32 weights. The inverse of joined."""
    bits = weights.contiguous().view(torch.int32)
    remainder = (bits & 0xFFFF).to(torch.int16)
    upper = (bits >> 16) + (remainder < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def adamw_parameters(optimizer: Any) -> Iterator[tuple[torch.optim.AdamW, Tensor]]:
    """Yield every torch AdamW inside an optimizer, with each parameter that it updates."""
    # torch's AdamW counts its updates in the state of every parameter. All others count in their
    # groups (fused_optimizers), so the two are told apart.
    for inner in _inside(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                yield from ((inner, parameter) for parameter in group["params"])


def fused_optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield every optimizer inside an optimizer that counts its updates in its groups."""
    for inner in _inside(optimizer):
        if not isinstance(inner, torch.optim.AdamW):
            yield inner


def _inside(optimizer: Any) -> list[Any]:
    return list(optimizer.sub_optimizers) if is_hybrid(optimizer) else [optimizer]
