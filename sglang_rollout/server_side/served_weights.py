"""In a server's processes: where it holds the weights that it really uses, and their fingerprints.

Both stand under the names and in the layout of the Hugging Face checkpoint. But SGLang fuses and
splits what it loads: query, key and value in one matrix, all experts in another, each rank its
share. Where the parts of a tensor end up is not written down here. SGLang's own loader is run once
on tensors without data (device meta), and its copies are recorded instead of made. So this holds
for every architecture whose loader copies slices, and for every tensor- and expert-parallel layout.

What changes in SGLang: WeightChecker.handle (sglang/srt/utils/weight_checker.py), behind POST
/weights_checker, learns two more actions. SGLang's own checksums are of the fused parameters, which
cannot be compared with a trainer's tensors, and need a GPU. Versions: 0.5.17 to 0.5.23. Remove them
when SGLang reports checksums of checkpoint tensors.
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
from sglang_rollout.server_side.fingerprints import fingerprints, method_for
from sglang_rollout.server_side.parts import Part

# Actions of /weights_checker. The folder of a checkpoint with the tensors' names and shapes follows
# the colon.
FINGERPRINTS = "lopd.fingerprints:"
LAYOUT = "lopd.layout:"
# In the place of a tensor's name: what holds for the whole rank.
RANK = ""
# The attribute of a model that remembers its placements.
_REMEMBERED = "_lopd_placements"
# Operations of a loader that move a tensor on its way into a parameter.
_COPIES = ("aten::_to_copy", "aten::clone", "aten::contiguous")


class Placement(NamedTuple):
    """Where a rank holds a checkpoint tensor.

    Attributes:
        copies: Pairs of a part of a parameter and the part of the tensor (without data) in it.
        copied_only: Whether the loader does nothing else to that parameter.
    """

    copies: list[tuple[Tensor, Tensor]]
    copied_only: bool


def install() -> None:
    """Add the actions to SGLang's weight checker.

    Raises:
        RuntimeError: The place upstream has moved.
    """
    checker = importlib.import_module("sglang.srt.utils.weight_checker").WeightChecker
    original = checker.handle
    parameters = tuple(inspect.signature(original).parameters)
    if parameters not in (
        ("self", "action", "allow_quant_error"),
        ("self", "action", "allow_quant_error", "skip_tensor_list", "role"),
    ):
        raise RuntimeError(
            "sglang_rollout.server_side.served_weights: WeightChecker.handle takes "
            f"{parameters}; this SGLang version needs another patch"
        )

    def handle(self: Any, action: str, *more: Any, **named: Any) -> dict[str, Any] | None:
        # SGLang's own actions have no colon, so they go on to the function that knows them.
        kind, colon, folder = action.partition(":")
        if kind + colon not in (FINGERPRINTS, LAYOUT):
            result: dict[str, Any] | None = original(self, action, *more, **named)
            return result
        # Each rank answers for what it holds. SGLang collects the answers of all ranks.
        answer = _answer(self, Path(folder), numbers=kind + colon == FINGERPRINTS)
        # From 0.5.21 on the role says whether the model or its draft is meant.
        role = {"role": named["role"]} if "role" in parameters else {}
        return {
            "checksums": answer,
            "per_gpu_checksum": "",
            "parallelism_info": self._parallelism_info(**role).model_dump(),
        }

    checker.handle = handle


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the copies of a loader and changes nothing.

    A tensor of the device meta stands for a tensor of the checkpoint, and every other tensor for a
    part of a parameter.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Pairs of a part of a parameter and a part of a meta tensor.
        self.copies: list[tuple[Tensor, Tensor]] = []
        # Addresses of the storages that the loader does something else to.
        self.changed: set[int] = set()

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
        on_tensor = bool(args) and isinstance(args[0], Tensor)
        # A real copy would have a storage of its own, and the tensor's name is found by its
        # storage. A view keeps the storage, and the offset and strides of the part.
        if name in _COPIES and on_tensor and args[0].is_meta:
            return args[0].view_as(args[0])
        # For example padding that is filled with zeros. It must not happen: the server is serving
        # from these parameters.
        if function._schema.is_mutable and on_tensor and not args[0].is_meta:
            if args[0].numel():
                self.changed.add(args[0].untyped_storage().data_ptr())
            return args[0]
        return function(*args, **(kwargs or {}))


def _answer(checker: Any, template_dir: Path, *, numbers: bool) -> dict[str, str]:
    """Return what this rank holds of each tensor.

    Args:
        checker: SGLang's weight checker.
        template_dir: A checkpoint with the tensors' names and shapes.
        numbers: Whether to answer with fingerprints, or with dtypes and the method.

    Returns:
        Tensor -> JSON of {"parts": [[offset, shape, strides], ...]} with positions in elements, and
        of "numbers" or "dtype" besides. Under RANK stands the JSON of {"not_fed": the parameters
        of this rank that no tensor goes into, "method": that of its fingerprints}.
    """
    model = checker._get_model()
    found = layout(model, tensor_shapes(template_dir))
    answer: dict[str, Any] = {
        name: {"parts": [_part(source) for _, source in placement.copies]}
        for name, placement in found.items()
    }
    held = [part for placement in found.values() for part, _ in placement.copies]
    device = held[0].device if held else torch.device("cpu")
    if numbers:
        # All at once: on a GPU tensors of one shape are then one operation.
        remaining = iter(fingerprints(held, [part.dtype for part in held], method_for(device)))
        for entry in answer.values():
            entry["numbers"] = [next(remaining) for _ in entry["parts"]]
    else:
        for name, placement in found.items():
            answer[name]["dtype"] = str(placement.copies[0][0].dtype).removeprefix("torch.")
    answer[RANK] = {"not_fed": _not_fed(model, found), "method": method_for(device)}
    return {name: json.dumps(entry) for name, entry in answer.items()}


def _not_fed(model: Any, found: Mapping[str, Placement]) -> list[str]:
    """Return the names of the parameters that no tensor goes into."""
    fed = {
        held.untyped_storage().data_ptr()
        for placement in found.values()
        for held, _ in placement.copies
    }
    # The scales of a cache in 8 bits have one element and come from no checkpoint.
    return [
        name
        for name, held in model.named_parameters()
        if held.numel() > 1 and held.untyped_storage().data_ptr() not in fed
    ]


def _part(source: Tensor) -> Part:
    # The tensor without data still knows where its part lies in the whole.
    return Part(int(source.storage_offset()), tuple(source.shape), source.stride())


def layout(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    """Return where the model holds these checkpoint tensors.

    Args:
        model: SGLang's model.
        shapes: The shapes of checkpoint tensors by name.

    Returns:
        A placement for each tensor of which this rank holds something.
    """
    # The answer is needed at every sync, and a run of the loader over a large model takes its time.
    # It stays right as long as the parameters stay where they are.
    parameters = tuple(parameter.data_ptr() for parameter in model.parameters())
    known = getattr(model, _REMEMBERED, None)
    if known is None or known[0] != parameters:
        known = (parameters, {})
        # torch.nn.Module's own way of setting an attribute would look for parameters in it.
        object.__setattr__(model, _REMEMBERED, known)
    placements: dict[tuple[str, tuple[int, ...]], Placement | None] = known[1]
    new = {name: shape for name, shape in shapes.items() if (name, shape) not in placements}
    if new:
        recorded = _recorded(model, new)
        placements.update({(name, shape): recorded.get(name) for name, shape in new.items()})
    asked = ((name, placements[name, shape]) for name, shape in shapes.items())
    return {name: placement for name, placement in asked if placement is not None}


def _recorded(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    """Run the loader on tensors without data and return where it would copy them."""
    sources = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    recorder = _Recorder()
    # Without gradients, as SGLang loads: a loader writes into parameters in place.
    with torch.no_grad(), recorder:
        model.load_weights(iter(sources.items()))
    # Slices of a tensor are other objects, but have the storage of the tensor.
    names = {source.untyped_storage()._cdata: name for name, source in sources.items()}
    found: dict[str, Placement] = {}
    for held, source in recorder.copies:
        name = names[source.untyped_storage()._cdata]
        # copy_() broadcasts, for example one value into a vector.
        if held.shape != source.shape:
            source = source.expand(held.shape)
        copied_only = held.untyped_storage().data_ptr() not in recorder.changed
        placement = found.setdefault(name, Placement([], copied_only))
        placement.copies.append((held.detach(), source))
    return found
