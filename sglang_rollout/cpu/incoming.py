"""Weights that come by broadcast (sync.transport = "distributed") into a server on a CPU.

SGLang makes a tensor for each that comes, waits for all of them, and has its loader copy them into
its parameters. Here a tensor is received in the parameter itself, if it ends up whole in one
contiguous part of a parameter of the same type. A record of SGLang's own loader shows which part
that is (sglang_rollout.server_side.served_weights). The others are received in memory of their own
and loaded one by one while the next are received. Most of those are the shards of a tensor-parallel
server.

This only saves time and memory. It is left out where upstream takes other arguments, and for all
tensors where the loader's copies cannot be recorded. Upstream: WeightUpdater
.update_weights_from_distributed in sglang/srt/model_executor/model_runner_components/
weight_updater.py. It can be removed at any time.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from sglang_rollout.server_side.served_weights import layout

_UPSTREAM = "sglang.srt.model_executor.model_runner_components.weight_updater"
_PARAMETERS = ("self", "names", "dtypes", "shapes", "group_name", "load_format")


def install() -> None:
    """Replace SGLang's method, if it is as described above."""
    try:
        module: Any = importlib.import_module(_UPSTREAM)
    except ModuleNotFoundError:
        return
    updater = getattr(module, "WeightUpdater", None)
    original = getattr(updater, "update_weights_from_distributed", None)
    # Another version may do something else under this name, and then its own way is used.
    if original is None or tuple(inspect.signature(original).parameters) != _PARAMETERS:
        return

    def update_weights_from_distributed(
        self: Any,
        names: list[str],
        dtypes: list[Any],
        shapes: list[list[int]],
        group_name: str,
        load_format: str | None = None,
    ) -> tuple[bool, str]:
        # Other formats, and servers that hold weights derived from the sent ones, are upstream's.
        refused = module._unsupported_derived_weight_cache_error()
        if load_format is not None or refused is not None:
            answer = original(self, names, dtypes, shapes, group_name, load_format)
            return cast(tuple[bool, str], answer)
        # Upstream asserts this, and the assertion would end the server.
        if group_name not in self._model_update_group:
            return False, f"there is no group {group_name} (any more)"
        self._assert_weight_cache_inactive("update_weights_from_distributed")
        torch_dtypes = [
            dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype) for dtype in dtypes
        ]
        group = self._model_update_group[group_name]
        error = receive(self.get_model(), names, torch_dtypes, shapes, group)
        if error:
            # The words of upstream.
            return (
                False,
                f"Failed to update parameter online: {error}. The weights are partially updated.",
            )
        return True, "Succeeded"

    module.WeightUpdater.update_weights_from_distributed = update_weights_from_distributed


def receive(
    model: Any, names: list[str], dtypes: list[torch.dtype], shapes: list[list[int]], group: Any
) -> Exception | None:
    """Take the broadcasts of these tensors from the group's rank 0 into the model.

    Args:
        model: SGLang's model.
        names: The Hugging Face names, in the order of the broadcasts.
        dtypes: The types of the tensors that come.
        shapes: Their shapes.
        group: The process group.

    Returns:
        What went wrong, after all broadcasts have ended, or None.
    """
    handles: list[Any] = []
    try:
        # SGLang sends shapes as JSON lists.
        wanted = {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}
        places = places_in_parameters(model, wanted)
        weights = []
        # The indices of the tensors that are received beside the model.
        beside = []
        for index, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
            place = places.get(name)
            # Where the types differ, a loader must round. Bytes cannot be received in place.
            if place is None or place.dtype != dtype:
                place = torch.empty(wanted[name], dtype=dtype)
                beside.append(index)
            weights.append(place)
        # All are started at once and in the sender's order. gloo matches broadcasts by order alone.
        handles += [
            torch.distributed.broadcast(weight, src=0, group=group, async_op=True)
            for weight in weights
        ]

        def received() -> Iterator[tuple[str, Tensor]]:
            for index in beside:
                handles[index].wait()
                yield names[index], weights[index]

        if beside:
            model.load_weights(received())
        # A loader may leave some of them out, and those received in place it never sees.
        for handle in handles:
            handle.wait()
    except Exception as error:
        # The memory of a broadcast that still runs must not be freed. Waiting raises the same
        # failure once more for each of them.
        for handle in handles:
            with contextlib.suppress(RuntimeError):
                handle.wait()
        return error
    return None


def places_in_parameters(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the parts of parameters in which tensors can be received.

    Args:
        model: SGLang's model.
        shapes: The shapes of checkpoint tensors by name.

    Returns:
        A contiguous part of a parameter for each tensor that the model holds whole, once, and in
        the tensor's own order.
    """
    try:
        found = layout(model, shapes)
    except Exception:
        # A loader that needs the values of a tensor fails on tensors without data, in any way. Its
        # copies cannot be recorded, and everything is received in memory of its own.
        return {}
    places = {}
    for name, (copies, copied_only) in found.items():
        held, source = copies[0]
        num_elements = torch.Size(shapes[name]).numel()
        # A tensor that the loader also changes, or copies to several places, must go through it.
        is_whole = copied_only and len(copies) == 1 and held.numel() == num_elements
        # A transposed copy has the same elements in another order.
        in_order = held.is_contiguous() and source.is_contiguous()
        if is_whole and in_order and held.device.type == "cpu":
            places[name] = held
    return places
