"""In a server's processes: fingerprints of the weights that it really uses, under the names and in
the layout of the Hugging Face checkpoint.

SGLang fuses and splits what it loads (query, key and value in one matrix, all experts in another,
each rank its share). Where the parts of a tensor end up is not written down here: SGLang's own
loader is run once on tensors without data (device meta), and its copies are recorded instead of
made. So this holds for every architecture whose loader copies slices, and for any tensor- and
expert-parallel layout.

What changes in SGLang: WeightChecker.handle (sglang/srt/utils/weight_checker.py), behind POST
/weights_checker, learns one more action. SGLang's own checksum of the fused parameters cannot be
compared with a trainer's tensors, and needs a GPU. Versions: 0.5.17 to 0.5.23. Can go: when SGLang
tells checksums of checkpoint tensors.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_rollout.server_side.checkpoint import tensor_shapes
from sglang_rollout.server_side.fingerprints import part_fingerprint

FINGERPRINTS, DTYPES = (
    "lopd.fingerprints:",
    "lopd.dtypes:",
)  # actions, followed by the folder of a checkpoint with the tensors' names and shapes
NOT_FED = ""  # in the place of a tensor's name
_REMEMBERED = "_lopd_placements"  # attribute of a model
_COPIES = ("aten::_to_copy", "aten::clone", "aten::contiguous")


class Placement(NamedTuple):
    """Where this rank holds a checkpoint tensor."""

    columns: int
    copies: list[tuple[Tensor, Tensor]]  # part of a parameter, part of a tensor without data
    copied_only: bool  # the loader does nothing else to the parameter


def install() -> None:
    """RuntimeError: upstream has moved."""
    checker = importlib.import_module("sglang.srt.utils.weight_checker").WeightChecker
    original = checker.handle
    parameters = tuple(inspect.signature(original).parameters)
    if parameters not in (
        ("self", "action", "allow_quant_error"),
        ("self", "action", "allow_quant_error", "skip_tensor_list", "role"),
    ):
        raise RuntimeError(
            f"sglang_rollout.server_side.served_weights: WeightChecker.handle takes {parameters}; this SGLang version needs another patch"
        )

    def handle(self: Any, action: str, *more: Any, **named: Any) -> dict[str, Any] | None:
        kind, colon, folder = action.partition(":")
        if kind + colon not in (FINGERPRINTS, DTYPES):
            result: dict[str, Any] | None = original(self, action, *more, **named)
            return result
        told = _told(self, Path(folder), parts=kind + colon == FINGERPRINTS)
        role = (
            {"role": named["role"]} if "role" in parameters else {}
        )  # from 0.5.21 on: the model or its draft
        return {
            "checksums": told,
            "per_gpu_checksum": "",
            "parallelism_info": self._parallelism_info(**role).model_dump(),
        }

    checker.handle = handle


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Instead of a copy from a tensor without data into a parameter, remembers it; nothing else is
    changed either.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[
            tuple[Tensor, Tensor]
        ] = []  # (part of a parameter, part of a meta tensor)
        self.changed: set[int] = set()  # addresses of storages that something else is done to

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name == "aten::copy_":
            if args[1].is_meta and not args[0].is_meta:
                self.copies.append((args[0], args[1]))
            elif not args[0].is_meta:
                self.changed.add(args[0].untyped_storage().data_ptr())
            return args[0]
        if name in _COPIES and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0].view_as(
                args[0]
            )  # to another device or dtype on its way into the parameter
        if (
            function._schema.is_mutable
            and args
            and isinstance(args[0], Tensor)
            and not args[0].is_meta
        ):
            if args[0].numel():
                self.changed.add(args[0].untyped_storage().data_ptr())
            return args[0]  # padding that is filled with zeros
        return function(*args, **(kwargs or {}))


def _told(checker: Any, template_dir: Path, *, parts: bool) -> dict[str, str]:
    """Tensor -> JSON of {"dtype", "parts": [[offset, shape, strides, fingerprint], ...]}: what this
    rank holds of it, positions in elements.

    Under NOT_FED the JSON of a list: this rank's parameters that no tensor goes into.
    """
    model = checker._get_model()
    found = layout(model, tensor_shapes(template_dir))
    fed = {
        held.untyped_storage().data_ptr()
        for placement in found.values()
        for held, _ in placement.copies
    }
    parameters = (
        model.named_parameters()
    )  # scales of a cache in 8 bits are of one element, and not from a checkpoint
    told = {
        NOT_FED: json.dumps(
            [
                name
                for name, held in parameters
                if held.numel() > 1 and held.untyped_storage().data_ptr() not in fed
            ]
        )
    }
    for name, (columns, copies, _) in found.items():
        entry: dict[str, Any] = {"dtype": str(copies[0][0].dtype).removeprefix("torch.")}
        if parts:
            entry["parts"] = []
            for held, source in copies:
                offset, strides = int(source.storage_offset()), list(source.stride())
                entry["parts"].append(
                    [
                        offset,
                        list(source.shape),
                        strides,
                        part_fingerprint(held, offset, strides, columns),
                    ]
                )
        told[name] = json.dumps(entry)
    return told


def layout(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    """Of these checkpoint tensors, those of which the model holds something. Remembered with the
    model, as long as its parameters stay where they are.
    """
    parameters = tuple(parameter.data_ptr() for parameter in model.parameters())
    known = getattr(model, _REMEMBERED, None)
    if known is None or known[0] != parameters:
        known = (parameters, {})
        object.__setattr__(model, _REMEMBERED, known)  # past torch.nn.Module's own
    placements: dict[tuple[str, tuple[int, ...]], Placement | None] = known[1]
    new = {name: shape for name, shape in shapes.items() if (name, shape) not in placements}
    if new:
        recorded = _recorded(model, new)
        placements.update({(name, shape): recorded.get(name) for name, shape in new.items()})
    asked = ((name, placements[name, shape]) for name, shape in shapes.items())
    return {name: placement for name, placement in asked if placement is not None}


def _recorded(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    sources = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model.load_weights(iter(sources.items()))
    names = {source.untyped_storage()._cdata: name for name, source in sources.items()}
    found: dict[str, Placement] = {}
    for held, source in recorder.copies:
        name = names[source.untyped_storage()._cdata]
        if held.shape != source.shape:
            source = source.expand(held.shape)
        columns = shapes[name][-1] if shapes[name] else 1
        copied_only = held.untyped_storage().data_ptr() not in recorder.changed
        found.setdefault(name, Placement(columns, [], copied_only)).copies.append(
            (held.detach(), source)
        )
    return found
