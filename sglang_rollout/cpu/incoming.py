"""Weights that come by broadcast (sync.transport = "distributed") into a server on a CPU: received
where they belong, not beside it and copied.

SGLang makes a tensor for each that comes, waits for all of them, and has its loader copy them into
its parameters. Here a tensor that ends up whole in one contiguous piece of a parameter of the same
type is received there; which piece that is, SGLang's own loader has told
(sglang_rollout.server_side.served_weights). The others, shards of a tensor-parallel server for the
most part, are received beside it and loaded one by one while the next are received.

Only saves time and memory: left out where upstream takes other arguments, and tensor by tensor
where the loader's copies cannot be told. Upstream:
sglang/srt/model_executor/model_runner_components/weight_updater.py,
WeightUpdater.update_weights_from_distributed. Can go: at any time.
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


def install() -> None:
    try:
        module: Any = importlib.import_module(
            "sglang.srt.model_executor.model_runner_components.weight_updater"
        )
    except ModuleNotFoundError:
        return
    original = getattr(
        getattr(module, "WeightUpdater", None), "update_weights_from_distributed", None
    )
    if original is None or tuple(inspect.signature(original).parameters) != (
        "self",
        "names",
        "dtypes",
        "shapes",
        "group_name",
        "load_format",
    ):
        return

    def update_weights_from_distributed(
        self: Any,
        names: list[str],
        dtypes: list[Any],
        shapes: list[list[int]],
        group_name: str,
        load_format: str | None = None,
    ) -> tuple[bool, str]:
        refused = module._unsupported_derived_weight_cache_error()
        if load_format is not None or refused is not None:
            return cast(
                tuple[bool, str], original(self, names, dtypes, shapes, group_name, load_format)
            )
        if group_name not in self._model_update_group:  # upstream's assertion would end the server
            return False, f"there is no group {group_name} (any more)"
        self._assert_weight_cache_inactive("update_weights_from_distributed")
        numbers = [
            dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype) for dtype in dtypes
        ]
        error = receive(
            self.get_model(), names, numbers, shapes, self._model_update_group[group_name]
        )
        return (
            (
                False,
                f"Failed to update parameter online: {error}. The weights are partially updated.",
            )
            if error
            else (True, "Succeeded")
        )

    module.WeightUpdater.update_weights_from_distributed = update_weights_from_distributed


def receive(
    model: Any, names: list[str], dtypes: list[torch.dtype], shapes: list[list[int]], group: Any
) -> Exception | None:
    """Take the broadcasts of these tensors, in this order, from the group's rank 0 into the model;
    what went wrong, after all of them have ended.
    """
    handles: list[Any] = []
    try:
        wanted = {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}
        places = places_in_parameters(model, wanted)
        weights, beside = [], []
        for index, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
            place = places.get(name)
            if place is None or place.dtype != dtype:
                place = torch.empty(wanted[name], dtype=dtype)
                beside.append(index)
            weights.append(place)
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
        for handle in handles:  # a loader may leave some out
            handle.wait()
    except Exception as error:
        for handle in handles:
            with contextlib.suppress(RuntimeError):  # the same failure once more
                handle.wait()
        return error
    return None


def places_in_parameters(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """For those of these tensors that the model holds whole, once, and in their own order: the
    contiguous part of a parameter in which they lie.
    """
    try:
        found = layout(model, shapes)
    except Exception:  # a loader that needs values: its copies cannot be told
        return {}
    places = {}
    for name, (_, copies, copied_only) in found.items():
        held, source = copies[0]
        whole = (
            copied_only and len(copies) == 1 and held.numel() == torch.Size(shapes[name]).numel()
        )
        if whole and held.is_contiguous() and source.is_contiguous() and held.device.type == "cpu":
            places[name] = held
    return places
