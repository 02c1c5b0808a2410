"""Megatron-Core on a CPU with gloo. Every patch here is skipped where CUDA is available.

They change names that Megatron-Core looks up when it calls them, so it does not matter whether it
was imported before.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device as device_context

from megatron_patches.registry import patch, replace, require

_CPU = torch.device("cpu")
_CHECKED = "megatron-core 0.16.1 with torch 2.13.0, 0.18.2 with torch 2.11.0"
_UNTIL = "Megatron-Core asks an accelerator interface (torch.accelerator) instead of torch.cuda"


class NullEvent:
    """A CUDA event on a machine where every operation is done when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class NullStream:
    """A CUDA stream on a CPU. All are one stream: equal, and with nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NullStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: NullEvent | None = None) -> NullEvent:
        return event or NullEvent()


@patch(
    upstream="torch/cuda: current_device, set_device",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def cpu_is_current_device() -> None:
    """Buffers and parameters are made on torch.cuda.current_device(); without CUDA that call fails.
    It now answers the CPU.
    """
    replace(torch.cuda, "current_device", lambda: _CPU)
    replace(torch.cuda, "set_device", lambda device: None)


@patch(
    upstream="torch/cuda: Stream, Event, stream, current_stream, default_stream, synchronize, nvtx",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def no_streams() -> None:
    """The token dispatcher, the gradient buffers and the pipeline schedule order work by streams
    and events. On a CPU everything is done in order: streams become one stream without effect,
    events are always past.
    """
    null = NullStream()
    replace(torch.cuda, "Stream", NullStream)
    replace(torch.cuda, "Event", NullEvent)
    replace(torch.cuda, "current_stream", lambda device=None: null)
    replace(torch.cuda, "default_stream", lambda device=None: null)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "synchronize", lambda device=None: None)
    replace(torch.cuda, "empty_cache", lambda: None)
    replace(torch.cuda.nvtx, "range_push", lambda msg: 0)
    replace(torch.cuda.nvtx, "range_pop", lambda: 0)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)


@patch(
    upstream="megatron/core/tensor_parallel/random.py:_get_cuda_rng_state, _set_cuda_rng_state; torch/cuda/random.py",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def cpu_random_state() -> None:
    """The tracker of random states per parallel region forks the CUDA generator. It now forks the
    CPU's, which then is what it warns about ("CPU RNG state changed within GPU RNG context"); that
    warning is dropped.
    """
    import megatron.core.tensor_parallel.random as random

    require(random, "_get_cuda_rng_state", parameters=("device", "clone", "graph_safe"))
    require(random, "_set_cuda_rng_state", parameters=("new_state", "device", "graph_safe"))
    replace(
        random,
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
    )
    replace(
        random,
        "_set_cuda_rng_state",
        lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )
    replace(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
    replace(
        torch.cuda, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state)
    )

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    replace(torch.cuda, "manual_seed", seed)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


@patch(
    upstream="torch: tensor, zeros, ones, empty, empty_like, arange; Tensor.cuda, Module.cuda. Written as device='cuda' "
    "in schedules.py, clip_grads.py, optimizer.py, token_dispatcher.py",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def literal_cuda_is_cpu() -> None:
    """Schedules, gradient clipping and the optimizers ask for device='cuda' by that word, and move
    tensors by .cuda(). Both now mean the CPU.
    """
    # ``with torch.device(...)`` looks functions up in a set that it makes at its first use, and
    # must find torch's own there: ours call them. Made after the change it would hold ours, the
    # context would be ignored, and a model of transformers built under "meta" would keep
    # uninitialised buffers.
    require(device_context, "_device_constructors", parameters=())()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like", "arange"):
        replace(torch, name, _on_cpu(getattr(torch, name)))
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(torch.nn.Module, "cuda", lambda self, device=None: self)


@patch(
    upstream="megatron/core/optimizer/optimizer.py, distrib_optimizer.py, clip_grads.py: param.type() == 'torch.cuda.FloatTensor'",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def type_names_say_cuda() -> None:
    """The optimizers sort parameters by the name of their tensor type and accept CUDA names only.
    Asked by Megatron-Core, and by it alone, a CPU tensor now gives the CUDA name of its type.
    """
    original = require(torch.Tensor, "type")

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if (
            isinstance(answer, str)
            and "cuda" not in answer
            and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.")
        ):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    replace(torch.Tensor, "type", type_name)


@patch(
    upstream="megatron/core/jit.py:jit_fuser (torch.compile)",
    checked=_CHECKED,
    until="never on a CPU without a compiler",
    without_cuda=True,
)
def no_compilation() -> None:
    """Small fused functions are decorated with torch.compile at import. On a CPU that needs a C++
    compiler and minutes for no gain: they run as written.
    """
    import torch._dynamo

    require(torch._dynamo.config, "disable")
    torch._dynamo.config.disable = True


@patch(
    upstream="megatron/core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu (used in token_dispatcher.py)",
    checked=_CHECKED,
    until=_UNTIL,
    without_cuda=True,
)
def split_sizes_from_cpu_tensors() -> None:
    """The all-to-all dispatcher turns its split sizes into numpy only where they come from a GPU; a
    CPU tensor reaches all_to_all_single, which refuses it. CPU tensors are now turned too.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    original = require(
        moe_utils, "maybe_move_tensor_to_cpu", parameters=("tensor", "as_numpy", "record_stream")
    )
    require(token_dispatcher, "maybe_move_tensor_to_cpu")

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and as_numpy and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", move)


@patch(
    upstream="megatron/core/tensor_parallel/mappings.py:_gather_along_first_dim",
    checked=_CHECKED,
    until="gloo gathers uneven sizes",
    without_cuda=True,
)
def gather_uneven_over_gloo() -> None:
    """gloo's all_gather takes equal sizes only, NCCL's any. The all-to-all dispatcher gathers
    uneven ones with expert_tensor > 1: pad, gather, cut.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    original = require(
        mappings,
        "_gather_along_first_dim",
        parameters=("input_", "group", "output_split_sizes", "use_global_buffer"),
    )

    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros((max(output_split_sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat(
            [part[:size] for part, size in zip(parts, output_split_sizes, strict=True)]
        )

    replace(mappings, "_gather_along_first_dim", gather)
